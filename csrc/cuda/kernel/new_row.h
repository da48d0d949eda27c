// A decode that appends on the way: the new row of K and V that a sequence's one query brings, and the
// query's rotation. Compiled into the kernels of AppendFeatures alone.
//
// Nobody waits for anybody. The row's tile is copied as it lies in memory, where the row may be there or
// not. With q the producer brings the row itself, and its cosines and sines, to the task, where q and the new
// key are rotated, and rounded as the cache has them. When the tile has arrived, the warp whose slice the row
// is in lays it over the stage, and writes it to memory: it is the only one on the GPU that has this tile of
// this head, as all rows of a plain item are one block.
//
// Hazards in shared memory, of a slice's rows in a stage, which no other warp reads or writes:
//   copy engine -> overlay: the wait for the full barrier.
//   overlay -> ldmatrix of the warp's other lanes: __syncwarp.
//   overlay -> copy engine, the next round: fence.proxy.async by each lane that wrote, then the warp's
//              arrival at the empty barrier, which the producer waits for.
// Of the rows of a task: likewise, with sync_consumers in the place of __syncwarp.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "ring.h"
#include "rope.h"

namespace leanattn {

// Of a kernel of AppendFeatures.
__device__ __forceinline__ const AppendParams& append_of(const DecodeParams& params) {
  return static_cast<const AppendDecodeParams&>(params).append;
}

// Where the one new token of a sequence stands: at its length before the append. What a decode has of its
// own is taken from there, whose parameters have been fetched already.
__device__ __forceinline__ int new_position(const DecodeParams& params, int seq) {
  const Problem& problem = params.problem;
  return clamp_to(problem.cache_seqlens[seq * problem.cache_seqlens_stride], 0, problem.capacity);
}

template <class Traits>
using ElementOf = std::conditional_t<Traits::Features::kBFloat16, __nv_bfloat16, __half>;

// --- The producer --------------------------------------------------------------------------------

// By the lane that copies q: what a task needs beside it. Counted in bytes at `full_barrier`, but for the
// page id, at whose arrival the lane arrives there.
template <class Traits>
__device__ __forceinline__ void copy_new_row(const DecodeParams& params, const Segment& segment,
                                             int position, typename Traits::NewRow& row,
                                             uint64_t* full_barrier) {
  const AppendParams& append = append_of(params);
  const Rope& rope = append.rope;
  const auto copy = [&](const void* from, uint8_t* to_smem, int bytes) {
    cute::SM90_BULK_COPY_G2S::copy(from, full_barrier, to_smem, bytes);
  };
  const bool has_row = segment.tile_end == segment.item.end && position < params.problem.capacity;
  const int number = rope.tables_are_float32 ? 4 : 2;  // bytes of one in the tables
  const int table_bytes = rope.num_pairs * number;
  const int row_bytes = has_row ? (params.head_dim + params.head_dim_v) * 2 : 0;
  cutlass::arch::ClusterTransactionBarrier::expect_transaction(full_barrier,
                                                               2 * table_bytes + row_bytes);
  if (table_bytes > 0) {
    const int at = rope_position(rope, position);
    const auto table_row = [&](const RopeTable& table) {
      return static_cast<const uint8_t*>(table.data) + at * table.position_stride * number;
    };
    copy(table_row(rope.cos), row.cos, table_bytes);
    copy(table_row(rope.sin), row.sin, table_bytes);
  }
  if (has_row) {
    const auto source = [&](const Rows& rows) {
      return static_cast<const Float16*>(rows.data) +
             row_offset(rows, {segment.seq, 0, 0}, segment.head);
    };
    copy(source(append.k), row.k, params.head_dim * 2);
    copy(source(append.v), row.v, params.head_dim_v * 2);
  }
  if constexpr (Traits::Features::kPaged) {
    if (has_row) {
      cute::SM80_CP_ASYNC_CACHEALWAYS<int32_t>::copy(
          *block_table_entry(params, segment.seq, position / params.page_size), row.page);
    }
    ptx::cp_async_mbarrier_arrive_noinc(full_barrier);
  }
}

// --- The consumers -------------------------------------------------------------------------------

// Eight numbers of a table's row in shared memory.
template <class Element>
__device__ __forceinline__ void load_table(const Rope& rope, const uint8_t* table_smem, int pair,
                                           float (&values)[8]) {
  const auto load = [&]<class Number>(const Number* numbers) {
    const auto loaded = load_vector<8>(numbers + pair);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = to_float(loaded.element[i]);
  };
  if (rope.tables_are_float32) {
    load(reinterpret_cast<const float*>(table_smem));
  } else {
    load(reinterpret_cast<const Element*>(table_smem));
  }
}

// By all consumer threads: the task's q, and its new key where it has one, in place.
template <class Traits>
__device__ __forceinline__ void rotate_rows(const DecodeParams& params,
                                            typename Traits::Task& task) {
  using Element = ElementOf<Traits>;
  const Rope& rope = append_of(params).rope;
  if (rope.num_pairs == 0) return;
  constexpr int kChunks = Traits::kHeadDim / 16;  // of eight pairs, at most
  static_assert((Traits::kRows + 1) * kChunks <= Traits::kConsumerThreads);
  const int row = threadIdx.x / kChunks;
  const int pair = threadIdx.x % kChunks * 8;
  const bool is_key = row == task.num_rows && task.segment.tile_end == task.segment.item.end;
  if ((row < task.num_rows || is_key) && pair < rope.num_pairs) {
    Element* const row_smem =
        reinterpret_cast<Element*>(is_key ? task.new_row.k : task.q + row * Traits::kQueryPitch);
    Element* const at[2] = {row_smem + (rope.interleaved ? 2 * pair : pair),
                            row_smem + (rope.interleaved ? 2 * pair + 8 : pair + rope.num_pairs)};
    const Vector<Element, 8> loaded[2] = {load_vector<8>(at[0]), load_vector<8>(at[1])};
    float cos[8], sin[8], rotated[2][8];
    load_table<Element>(rope, task.new_row.cos, pair, cos);
    load_table<Element>(rope, task.new_row.sin, pair, sin);
    rotate_pairs(loaded, rope.interleaved, cos, sin, rotated);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Vector<Element, 8> numbers;
#pragma unroll
      for (int d = 0; d < 8; ++d) numbers.element[d] = from_float<Element>(rotated[i][d]);
      store_vector(at[i], numbers);
    }
    ptx::fence_proxy_async();  // before the next task's rows are copied there
  }
  sync_consumers<Traits>();  // every row is rotated
}

// The new row of a task, for the warp whose slice it lies in.
template <class Traits>
class NewRowOverlay {
 public:
  NewRowOverlay() = default;
  __device__ __forceinline__ NewRowOverlay(const DecodeParams& params,
                                           const typename Traits::Task& task)
      : params_(&params), task_(&task), position_(-1) {
    const Segment& segment = task.segment;
    const int position = task.new_row.position;
    if (segment.tile_end != segment.item.end || position >= params.problem.capacity) return;
    // What append_kv would not write is not laid over a tile either.
    if constexpr (Traits::Features::kPaged) {
      if (task.new_row.page < 0 || task.new_row.page >= params.num_pages) return;
    }
    position_ = position;
  }

  // Whether there is one, in the slice that begins at `token`.
  __device__ __forceinline__ bool is_in_slice(int token) const {
    return static_cast<unsigned>(position_ - token) < Traits::kSliceTokens;
  }

  // By a warp: over its slice of a stage of K, or V, that has arrived, and into the cache.
  __device__ __forceinline__ void lay(bool is_key, uint8_t* stage_smem) const {
    const AppendParams& append = append_of(*params_);
    const Rows& cache = is_key ? append.k_cache : append.v_cache;
    const uint8_t* row_smem = is_key ? task_->new_row.k : task_->new_row.v;
    const int chunk = threadIdx.x % 32;
    if (chunk < (is_key ? params_->head_dim : params_->head_dim_v) / 8) {
      const uint4 numbers = reinterpret_cast<const uint4*>(row_smem)[chunk];
      const int row = position_ % Traits::kTile;
      *reinterpret_cast<uint4*>(stage_smem + swizzled_offset<Traits::kTile>(row, chunk)) = numbers;
      CacheSlot slot{task_->segment.seq, position_};
      if constexpr (Traits::Features::kPaged) {
        slot = {task_->new_row.page, position_ % params_->page_size};
      }
      Float16* to =
          static_cast<Float16*>(cache.data) + slot_offset(cache, slot, task_->segment.head);
      reinterpret_cast<uint4*>(to)[chunk] = numbers;
      ptx::fence_proxy_async();  // before the next tile is copied there
    }
    __syncwarp();  // the row is there for all lanes
  }

 private:
  const DecodeParams* params_;
  const typename Traits::Task* task_;
  int position_;  // -1: there is none
};

// What a main loop has of it.
template <class Traits>
using NewRowOf =
    std::conditional_t<Traits::kAppends, NewRowOverlay<Traits>, typename Traits::NoNewRow>;

}  // namespace leanattn
