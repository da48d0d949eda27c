// The producers' two ways of filling a stage with one tile of K or V: bulk tensor copies (sm_90 and
// later) and cp.async (sm_80 and later). Both write the same swizzled layout and both bring only
// rows that some query sees, rounded out to the copy's own grain; the rest of the stage keeps
// whatever it held, so consumers must not use it. Columns beyond the head dim are zero.
#pragma once

#include <cuda.h>

#include <cutlass/arch/barrier.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "core/segment_walker.h"
#include "ring.h"

namespace leanattn {

// Tensor maps of K or V, [B, Hkv, S, 128 bytes of D] from the outermost dimension ([num_pages, Hkv,
// page_size, 128 bytes of D] if paged), 128-byte swizzle. A copy costs its issuer the same whatever its
// size, so whole tiles have a map of their own; the small boxes are for tiles that are not seen
// as a whole.
struct CacheMaps {
  CUtensorMap tile;  // boxes of a tile's tokens, or of as many as fit into pages
  CUtensorMap rows;  // boxes of 1 << kBoxRowsLog2 tokens, or of as many as fit into pages
};

constexpr int kBoxRowsLog2 = 5;
constexpr int kMinBoxRowsLog2 = 3;  // the swizzle's pattern has 8 rows

struct TensorMaps {
  CacheMaps cache[2];  // of K and of V
  bool usable;
  int tile_box_rows_log2;  // of both caches' `tile` maps
  int rows_box_rows_log2;  // of both caches' `rows` maps
};

// One of K or V, as the loaders see it.
template <class Element>
struct CacheView {
  const CacheMaps* maps;
  const Element* data;  // [B, S, Hkv, columns], or paged [num_pages, page_size, Hkv, columns]
  int64_t batch_stride, seq_stride, head_stride;
  int columns;

  // What rows are whole pieces of, and begin on boundaries of, in bytes: a multiple of the copies' 16, of
  // 8, or else of 4.
  __device__ __forceinline__ int piece_bytes() const {
    const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
    const int64_t elements = batch_stride | seq_stride | head_stride | columns;
    const int64_t bytes = address | elements * static_cast<int64_t>(sizeof(Element));
    return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : 4;
  }
};

// 16 bytes by cp.async, or zeros.
__device__ __forceinline__ void copy_chunk(const void* from, uint8_t* chunk_smem, bool inside) {
  cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(*static_cast<const uint4*>(from),
                                                     *reinterpret_cast<uint4*>(chunk_smem), inside);
}

// The same in smaller pieces, of which the first `inside` bytes are there.
template <class Piece>
__device__ __forceinline__ void copy_pieces(const void* from, uint8_t* chunk_smem, int inside) {
#pragma unroll 1
  for (int i = 0; i < static_cast<int>(16 / sizeof(Piece)); ++i) {
    const bool is_there = i * static_cast<int>(sizeof(Piece)) < inside;
    cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<Piece>::copy(
        static_cast<const Piece*>(from)[is_there ? i : 0], reinterpret_cast<Piece*>(chunk_smem)[i],
        is_there);
  }
}

// A row of a tile by cp.async: a warp copies kRowsAtOnce of them together.
template <class Traits>
struct RowCopy {
  using Element = typename Traits::CacheElement;
  static constexpr int kChunks = Traits::kColumnBlocks * 8;  // of 16 bytes, a row
  static constexpr int kLanes = min_of(kChunks, 32);
  static constexpr int kRowsAtOnce = 32 / kLanes;

  const CacheView<Element>& cache;
  // Lean kernels have no others than whole chunks: allows_lean.
  int piece_bytes = Traits::Features::kFixedLoader ? 16 : cache.piece_bytes();
  int first_chunk = threadIdx.x % kLanes;

  // source: the row's first element.
  template <bool kInPieces>
  __device__ __forceinline__ void copy(const Element* source, uint8_t* stage_smem, int row) const {
#pragma unroll(kInPieces ? 1 : ceil_div(kChunks, kLanes))
    for (int i = 0; i < ceil_div(kChunks, kLanes); ++i) {
      const int chunk = first_chunk + i * kLanes;
      if (chunk >= kChunks) break;
      // What is beyond the row is not read, only zero-filled; its address must be legal.
      const int column = chunk * Traits::kChunkColumns;
      const bool inside = column < cache.columns;
      const Element* from = source + (inside ? column : 0);
      uint8_t* chunk_smem = stage_smem + swizzled_offset<Traits::kTile>(row, chunk);
      if constexpr (kInPieces) {
        const int bytes = (cache.columns - column) * static_cast<int>(sizeof(Element));
        if (piece_bytes == 8) {
          copy_pieces<uint2>(from, chunk_smem, bytes);
        } else {
          copy_pieces<uint32_t>(from, chunk_smem, bytes);
        }
      } else {
        copy_chunk(from, chunk_smem, inside);
      }
    }
  }
};

// What a warp copies of every tile: rows [begin, end).
template <class Traits>
__device__ __forceinline__ KeyRange whole_tile() {
  return {0, Traits::kTile};
}
template <class Traits>
__device__ __forceinline__ KeyRange part_of_tile(int copier) {
  constexpr int kRowsOfPart = Traits::kTile / Traits::kCopyWarps;
  return {copier * kRowsOfPart, (copier + 1) * kRowsOfPart};
}

// Rows of `part` of the tile that starts at token `tile_token` which hold visible keys.
__device__ __forceinline__ KeyRange visible_rows(const Segment& segment, int tile_token,
                                                 KeyRange part) {
  return {max_of(segment.keys.any.begin - tile_token, part.begin),
          min_of(segment.keys.any.end - tile_token, part.end)};
}

// By one lane. cute::elect_one_sync, and no comparison of the lane, tells the compiler that it is one:
// else it issues every copy in a loop over the lanes that might be there.
template <class Traits>
struct TmaLoader {
  static constexpr int kArrivals = 1;

  __device__ __forceinline__ void load(const CacheView<typename Traits::CacheElement>& cache,
                                       const Segment& segment, int tile_token,
                                       const Ring<Traits>& ring) const {
#if LEANATTN_ARCH >= 900
    if (!cute::elect_one_sync()) return;
    const KeyRange rows = visible_rows(segment, tile_token, whole_tile<Traits>());
    const bool whole = rows.begin == 0 && rows.end == Traits::kTile;
    const CUtensorMap* map = whole ? &cache.maps->tile : &cache.maps->rows;
    const int box_rows = whole ? Traits::kTile : 1 << kBoxRowsLog2;
    const int first = rows.begin >> kBoxRowsLog2 << kBoxRowsLog2;
    const int last = (rows.end + box_rows - 1) & -box_rows;
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(
        ring.full_barrier(), (last - first) * 128 * Traits::kColumnBlocks);
#pragma unroll 1
    for (int row = first; row < last; row += box_rows) {
#pragma unroll
      for (int block = 0; block < Traits::kColumnBlocks; ++block) {
        cute::SM90_TMA_LOAD_4D::copy(
            map, ring.full_barrier(), static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
            ring.stage_smem() + block * (Traits::kTile * 128) + row * 128,
            block * Traits::kBlockColumns, tile_token + row, segment.head, segment.seq);
      }
    }
#endif
  }
};

// By all lanes of all warps that copy.
template <class Traits>
struct CpAsyncLoader {
  static constexpr int kArrivals = Traits::kCopyWarps * 32;

  KeyRange part;  // of this warp

  __device__ __forceinline__ void load(const CacheView<typename Traits::CacheElement>& cache,
                                       const Segment& segment, int tile_token,
                                       const Ring<Traits>& ring) const {
    using Copy = RowCopy<Traits>;
    const Copy rows_of{cache};
    const int lane = threadIdx.x % 32;
    const KeyRange rows = visible_rows(segment, tile_token, part);
    const auto* source =
        cache.data + segment.seq * cache.batch_stride + segment.head * cache.head_stride;
    // Rows in pieces are rare: their loop is short rather than fast.
    const auto copy_all = [&]<bool kInPieces>() {
#pragma unroll(kInPieces ? 1 : 4)
      for (int row = rows.begin + lane / Copy::kLanes; row < rows.end; row += Copy::kRowsAtOnce) {
        rows_of.template copy<kInPieces>(source + (tile_token + row) * cache.seq_stride,
                                         ring.stage_smem(), row);
      }
    };
    if (rows_of.piece_bytes == 16) {
      copy_all.template operator()<false>();
    } else {
      copy_all.template operator()<true>();
    }
    ptx::cp_async_mbarrier_arrive_noinc(ring.full_barrier());
  }
};

// K of the call, or V: 0 or 1.
template <class Traits>
__device__ __forceinline__ CacheView<typename Traits::CacheElement> view_cache(
    const DecodeParams& params, const TensorMaps& maps, int which) {
  using Element = typename Traits::CacheElement;
  const bool is_k = which == 0;
  return {&maps.cache[which],
          static_cast<const Element*>(is_k ? params.k : params.v),
          is_k ? params.k_batch_stride : params.v_batch_stride,
          is_k ? params.k_seq_stride : params.v_seq_stride,
          is_k ? params.k_head_stride : params.v_head_stride,
          is_k ? params.k_columns : params.v_columns};
}

}  // namespace leanattn
