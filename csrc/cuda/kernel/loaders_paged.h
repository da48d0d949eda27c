// The loaders of loaders.h for paged caches, where a tile is made of pieces from anywhere. Which
// pages those are stands in device memory, and a trip there, behind all the copies in flight, takes
// longer than the ring lasts. So a producer has its table entries fetched into shared memory many
// tiles ahead, by a second walk of the share that runs in front of the first.
#pragma once

#include "loaders.h"
#include "locate.h"

namespace leanattn {

// The block table's entries for one producer warp's part of the next tiles of a share, one slot a tile.
template <class Traits>
class PageQueue {
 public:
  using Slot = int32_t[Traits::kTile / Traits::kCopyWarps];

  // `walker`: of the share's start. A whole tile as `part` is for pages of 8 tokens or more alone.
  // `first_alone`: the first tile does not wait until those of all slots have been asked for; for copies
  // that are not counted among these.
  __device__ __forceinline__ PageQueue(const DecodeParams& params, const WalkerOf<Traits>& walker,
                                       KeyRange part, bool first_alone,
                                       Slot (&slots_smem)[Traits::kPageSlots])
      : params_(params),
        walker_(walker),
        part_(part),
        slots_smem_(slots_smem),
        is_alone_(first_alone),
        free_slots_(first_alone ? 1 : Traits::kPageSlots) {
    segment_.tile_end = 0;
  }

  // Waits for the entries of the next tile, which starts at `tile_token`; the copies of the one before
  // are under way.
  __device__ __forceinline__ void begin_tile(const Segment& segment, int tile_token) {
    __syncwarp();  // every lane has read the entries of the tile before, whose slot is free now
#pragma unroll 1
    for (; free_slots_ > 0; --free_slots_) fetch();
    free_slots_ = 1;
    if (is_alone_) {
      is_alone_ = false;
      free_slots_ = Traits::kPageSlots;  // those of the others, and this one when it is done
      cute::cp_async_wait<0>();
    }
    slot_ = (slot_ + 1) % Traits::kPageSlots;
    // One group a tile: all but the newest kPageSlots - 1 must land. With the entries of this tile
    // those are copies of K and V of tiles at least kPageSlots ago, which the ring has let go of.
    static_assert((Traits::kWide ? 1 : 2) * Traits::kPageSlots >= Traits::kMaxStages);
    cute::cp_async_wait<Traits::kPageSlots - 1>();
    __syncwarp();  // the other lanes' entries have landed too
    first_page_ = (tile_token + rows(segment, tile_token).begin) / params_.page_size;
  }

  // Of the tile: those that this warp copies.
  __device__ __forceinline__ KeyRange rows(const Segment& segment, int tile_token) const {
    return visible_rows(segment, tile_token, part_);
  }

  // Where a token of this tile lives: one in the same page as a token that some query sees.
  __device__ __forceinline__ CacheRow find(int token) const {
    const int index = token / params_.page_size;
    return {page(index), token - index * params_.page_size};
  }

  // The `index`th of the sequence's pages, which is one of this tile's.
  __device__ __forceinline__ int page(int index) const {
    return clamp_page(params_, slots_smem_[slot_][index - first_page_]);
  }

 private:
  // Fills the next slot with the entries of the tile in front.
  __device__ __forceinline__ void fetch() {
    if (tile_ == segment_.tile_end && walker_.next(segment_)) tile_ = segment_.tile_begin;
    if (tile_ < segment_.tile_end) {
      const int tile_token = tile_ * Traits::kTile;
      const KeyRange mine = rows(segment_, tile_token);
      const int first = (tile_token + mine.begin) / params_.page_size;
      const int last = mine.empty() ? -1 : (tile_token + (mine.end - 1)) / params_.page_size;
#pragma unroll 1
      for (int index = first + static_cast<int>(threadIdx.x % 32); index <= last; index += 32) {
        cute::SM80_CP_ASYNC_CACHEALWAYS<int32_t>::copy(
            *block_table_entry(params_, segment_.seq, index),
            slots_smem_[next_slot_][index - first]);
      }
      ++tile_;
    }
    cute::cp_async_fence();  // an empty group beyond the last tile: begin_tile counts them
    next_slot_ = (next_slot_ + 1) % Traits::kPageSlots;
  }

  const DecodeParams& params_;
  WalkerOf<Traits> walker_;
  KeyRange part_;
  Slot (&slots_smem_)[Traits::kPageSlots];
  Segment segment_;  // of the tile to fetch for
  int tile_ = 0;     // the tile to fetch for
  bool is_alone_;
  int free_slots_;
  int next_slot_ = 0;   // to fetch into
  int slot_ = -1;       // of the current tile
  int first_page_ = 0;  // of the sequence, in the slot
};

template <class Traits>
class PagedLoader {
 public:
  __device__ __forceinline__ explicit PagedLoader(const PageQueue<Traits>& pages) : pages_(pages) {}

  __device__ __forceinline__ void begin_tile(const Segment& segment, int tile_token) {
    pages_.begin_tile(segment, tile_token);
  }

 protected:
  PageQueue<Traits> pages_;
};

// Boxes that lie inside one page: the tile's largest power of two that divides a page. By one lane, which looks
// up where a few of them lie before it copies the first: one by one, each would wait for its page's number.
template <class Traits>
class PagedTmaLoader : public PagedLoader<Traits> {
 public:
  __device__ __forceinline__ PagedTmaLoader(const TensorMaps& maps, const PageQueue<Traits>& pages)
      : PagedLoader<Traits>(pages), maps_(maps) {}

  __device__ __forceinline__ void load(const CacheView<typename Traits::CacheElement>& cache,
                                       const Segment& segment, int tile_token,
                                       const Ring<Traits>& ring) const {
#if LEANATTN_ARCH >= 900
    if (!cute::elect_one_sync()) return;
    const KeyRange rows = this->pages_.rows(segment, tile_token);
    const bool whole = rows.begin == 0 && rows.end == Traits::kTile;
    const CUtensorMap* map = whole ? &cache.maps->tile : &cache.maps->rows;
    const int box_rows_log2 = whole ? maps_.tile_box_rows_log2 : maps_.rows_box_rows_log2;
    const int first = rows.begin >> box_rows_log2;
    const int last = ((rows.end - 1) >> box_rows_log2) + 1;
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(
        ring.full_barrier(), ((last - first) << box_rows_log2) * 128 * Traits::kColumnBlocks);
#pragma unroll 1
    for (int box = first; box < last; box += kBoxesAtOnce) {
      CacheRow at[kBoxesAtOnce];
#pragma unroll
      for (int i = 0; i < kBoxesAtOnce; ++i) {
        // The last one again in place of those beyond it, whose pages are not known.
        at[i] = this->pages_.find(tile_token + (min_of(box + i, last - 1) << box_rows_log2));
      }
#pragma unroll
      for (int i = 0; i < kBoxesAtOnce; ++i) {
        if (box + i >= last) break;
        uint8_t* box_smem = ring.stage_smem() + ((box + i) << box_rows_log2) * 128;
#pragma unroll
        for (int block = 0; block < Traits::kColumnBlocks; ++block) {
          cute::SM90_TMA_LOAD_4D::copy(
              map, ring.full_barrier(),
              static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
              box_smem + block * (Traits::kTile * 128), block * Traits::kBlockColumns, at[i].row,
              segment.head, at[i].page);
        }
      }
    }
#endif
  }

 private:
  static constexpr int kBoxesAtOnce = 4;

  const TensorMaps& maps_;
};

// Any page size, by all warps that copy. A lane works out where one row in 32 lies and the others ask it.
template <class Traits>
class PagedCpAsyncLoader : public PagedLoader<Traits> {
 public:
  using PagedLoader<Traits>::PagedLoader;

  __device__ __forceinline__ void load(const CacheView<typename Traits::CacheElement>& cache,
                                       const Segment& segment, int tile_token,
                                       const Ring<Traits>& ring) const {
    using Copy = RowCopy<Traits>;
    const Copy rows_of{cache};
    const int lane = threadIdx.x % 32;
    const KeyRange rows = this->pages_.rows(segment, tile_token);
    const auto* source = cache.data + segment.head * cache.head_stride;
#pragma unroll 1
    for (int group = rows.begin / 32 * 32; group < rows.end; group += 32) {
      int64_t my_offset = 0;
      if (rows.contains(group + lane)) {
        const CacheRow at = this->pages_.find(tile_token + group + lane);
        my_offset = at.page * cache.batch_stride + at.row * cache.seq_stride;
      }
      const auto copy_group = [&]<bool kInPieces>() {
#pragma unroll(kInPieces ? 1 : 4)
        for (int i = 0; i < 32; i += Copy::kRowsAtOnce) {
          const int row = group + i + lane / Copy::kLanes;
          const int64_t offset = __shfl_sync(~0u, my_offset, i + lane / Copy::kLanes);
          if (!rows.contains(row)) continue;
          rows_of.template copy<kInPieces>(source + offset, ring.stage_smem(), row);
        }
      };
      if (rows_of.piece_bytes == 16) {
        copy_group.template operator()<false>();
      } else {
        copy_group.template operator()<true>();
      }
    }
    ptx::cp_async_mbarrier_arrive_noinc(ring.full_barrier());
  }
};

// One of the two, as the call wants: the share is walked by the same code.
template <class Traits, class Contiguous, class Paged>
class EitherLoader {
 public:
  __device__ __forceinline__ EitherLoader(const DecodeParams& params, const Contiguous& contiguous,
                                          const Paged& paged)
      : is_paged_(is_paged<Traits>(params)), contiguous_(contiguous), paged_(paged) {}

  __device__ __forceinline__ void begin_tile(const Segment& segment, int tile_token) {
    if (is_paged_) paged_.begin_tile(segment, tile_token);
  }

  template <class View, class Ring>
  __device__ __forceinline__ void load(const View& cache, const Segment& segment, int tile_token,
                                       const Ring& ring) const {
    if (is_paged_) {
      paged_.load(cache, segment, tile_token, ring);
    } else {
      contiguous_.load(cache, segment, tile_token, ring);
    }
  }

 private:
  bool is_paged_;
  Contiguous contiguous_;
  Paged paged_;
};

}  // namespace leanattn
