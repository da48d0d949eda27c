// Segments on their way from the task warp to the consumer warps, each with its q rows. The task warp
// stays ahead, so that neither the schedule's arithmetic nor the trip for q stands between the
// consumers and the next tile.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "mma.h"
#include "ring.h"
#include "vector.h"

namespace leanattn {

template <class Traits>
class TaskQueue {
 public:
  using Task = typename Traits::Task;
  using SharedStorage = typename Traits::SharedStorage;

  __device__ __forceinline__ explicit TaskQueue(SharedStorage& smem) : smem_(smem) {}

  // By one lane, before the CTA's first barrier.
  __device__ __forceinline__ void init() {
    for (int task = 0; task < Traits::kTasks; ++task) {
      // Every lane of the task warp when its q has landed, and lane 0 when the rest is written.
      ptx::mbarrier_init(&smem_.task_full[task], 32 + 1);
      ptx::mbarrier_init(&smem_.task_empty[task], Traits::kConsumerWarps);
    }
  }

  // Task warp. `shares`: of the walk that the segment is from.
  __device__ __forceinline__ void push(const DecodeParams& params, const Shares& shares,
                                       const Segment& segment) {
    Task& task = wait_for_room();
    const int rows = item_rows(params.problem, segment.sequence, segment.row_block);
    copy_queries(params, segment, rows, task.q);
    if constexpr (Traits::kFloat8) {
      narrow_queries(params, task);
      ptx::mbarrier_arrive(&smem_.task_full[position_.stage]);
    } else {
      ptx::cp_async_mbarrier_arrive_noinc(&smem_.task_full[position_.stage]);
    }
    if (threadIdx.x % 32 == 0) {
      task.segment = segment;
      task.num_rows = rows;
      if (!segment.is_whole()) {
        task.units = participants(shares, segment);
        task.shares = shares;
      }
      ptx::mbarrier_arrive(&smem_.task_full[position_.stage]);
    }
    position_.advance(Traits::kTasks);
  }

  // Task warp, once, after the last push.
  __device__ __forceinline__ void close() {
    Task& task = wait_for_room();
    cute::cp_async_wait<0>();  // nothing is promised of the copies of a thread that has exited
    ptx::mbarrier_arrive(&smem_.task_full[position_.stage]);
    if (threadIdx.x % 32 == 0) {
      task.num_rows = 0;
      ptx::mbarrier_arrive(&smem_.task_full[position_.stage]);
    }
  }

  // Consumer: the next task, or null. The wait acquires what the task warp wrote.
  __device__ __forceinline__ const Task* front() const {
    ptx::mbarrier_wait_parity(&smem_.task_full[position_.stage], position_.phase);
    const Task& task = smem_.tasks[position_.stage];
    return task.num_rows > 0 ? &task : nullptr;
  }

  // Consumer, whole warp: done with the task. The lanes' reads come before lane 0's arrival.
  __device__ __forceinline__ void pop() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&smem_.task_empty[position_.stage]);
    position_.advance(Traits::kTasks);
  }

 private:
  static constexpr int kRowChunks = Traits::kHeadDim / 8;  // of 16 bytes, a row of q

  // A fresh barrier counts as just past the phase of parity 1; see Ring.
  __device__ __forceinline__ Task& wait_for_room() const {
    ptx::mbarrier_wait_parity(&smem_.task_empty[position_.stage], position_.phase ^ 1);
    __syncwarp();  // no lane may fall a whole round behind: it would wait for a phase long gone
    return smem_.tasks[position_.stage];
  }

  // q rows of the item; rows and columns beyond it become zero.
  __device__ __forceinline__ void copy_queries(const DecodeParams& params, const Segment& segment,
                                               int rows, uint8_t* q_smem) const {
    const Float16* q = static_cast<const Float16*>(params.q);
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < Traits::kRows * kRowChunks; i += 32) {
      const int row = i / kRowChunks;
      const int chunk = i % kRowChunks;
      const QueryRow r = query_row(params, segment, row < rows ? row : 0);
      int column = chunk * 8;
      const bool inside = row < rows && column < params.head_dim;
      if constexpr (Traits::kPairsHeads) {
        if (params.head_pairs) column %= Traits::kHeadDim / 2;  // in both halves
      }
      const Float16* source = q + q_offset(params, segment.seq, segment.sequence, r.query, r.head) +
                              (inside ? column : 0);
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(
          *reinterpret_cast<const uint4*>(source),
          *reinterpret_cast<uint4*>(q_smem + swizzled_offset<Traits::kQueryRows>(row, chunk)),
          inside);
    }
  }

  // With float8 caches: q in shared memory becomes fp16. bf16 reaches further, so its rows are taken
  // into fp16's range by a power of two, and the products back by task.q_factors.
  __device__ __forceinline__ void narrow_queries(const DecodeParams& params, Task& task) const {
    constexpr int kLanes = min_of(kRowChunks, 32);
    const bool is_bf16 = params.element_type == ElementType::kBFloat16;
    cute::cp_async_fence();
    cute::cp_async_wait<0>();
    __syncwarp();  // the other lanes' chunks have landed too
#pragma unroll 1
    for (int row = threadIdx.x % 32 / kLanes; row < Traits::kRows; row += 32 / kLanes) {
      const int lane = threadIdx.x % kLanes;
      const float factor = is_bf16 ? narrow_row<kLanes>(task.q, row, lane) : 1.0f;
      if (lane == 0) task.q_factors[row] = factor;
    }
  }

  // A row of bf16 becomes fp16, by kLanes lanes; returns the factor that takes it back. Powers of two lose
  // nothing of numbers within 2^-28 of the largest.
  template <int kLanes>
  static __device__ __forceinline__ float narrow_row(uint8_t* q_smem, int row, int lane) {
    const auto for_each_chunk = [&](auto visit) {
#pragma unroll
      for (int i = 0; i < ceil_div(kRowChunks, kLanes); ++i) {
        const int chunk = lane + i * kLanes;
        if (chunk >= kRowChunks) break;
        uint8_t* chunk_smem = q_smem + swizzled_offset<Traits::kQueryRows>(row, chunk);
        visit(*reinterpret_cast<Vector<uint32_t, 4>*>(chunk_smem));
      }
    };
    // Magnitudes of bf16 are ordered like their bits.
    uint32_t largest = 0;
    for_each_chunk([&](const Vector<uint32_t, 4>& pairs) {
      for (const uint32_t pair : pairs.element) {
        largest = max_of(largest, max_of(pair & 0x7fff, pair >> 16 & 0x7fff));
      }
    });
    for (int distance = 1; distance < kLanes; distance *= 2) {
      largest = max_of(largest, __shfl_xor_sync(~0u, largest, distance));
    }
    const uint32_t exponent = largest >> 7;
    float scale = 1.0f, factor = 1.0f;
    // Not a row of zeros, nor one with NaN or Inf, which fp16 has too.
    if (exponent != 0 && exponent != 255) {
      const uint32_t scale_exponent = min_of(127 + 14 + 127 - exponent, 253u);  // to 2^14..2^15
      scale = __uint_as_float(scale_exponent << 23);
      factor = __uint_as_float((254 - scale_exponent) << 23);
    }
    for_each_chunk([&](Vector<uint32_t, 4>& pairs) {
      for (uint32_t& pair : pairs.element) {
        const float2 both = unpack<__nv_bfloat16>(pair);
        pair = pack<__half>(both.x * scale, both.y * scale);
      }
    });
    return factor;
  }

  SharedStorage& smem_;
  RingPosition position_;
};

}  // namespace leanattn
