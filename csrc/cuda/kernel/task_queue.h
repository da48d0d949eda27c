// Segments on their way from the task warp to the consumer warps, each with its q rows. The task warp
// stays ahead, so that neither the schedule's arithmetic nor the trip for q stands between the
// consumers and the next tile.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "ring.h"

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
    ptx::cp_async_mbarrier_arrive_noinc(&smem_.task_full[position_.stage]);
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
    ptx::cp_async_mbarrier_arrive_noinc(&smem_.task_full[position_.stage]);
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
  // A fresh barrier counts as just past the phase of parity 1; see Ring.
  __device__ __forceinline__ Task& wait_for_room() const {
    ptx::mbarrier_wait_parity(&smem_.task_empty[position_.stage], position_.phase ^ 1);
    __syncwarp();  // no lane may fall a whole round behind: it would wait for a phase long gone
    return smem_.tasks[position_.stage];
  }

  // q rows of the item; rows and columns beyond it become zero.
  __device__ __forceinline__ void copy_queries(const DecodeParams& params, const Segment& segment,
                                               int rows, uint8_t* q_smem) const {
    using Element = typename Traits::Element;
    constexpr int kChunks = Traits::kHeadDim / 8;  // of 16 bytes, a row
    const Element* q = static_cast<const Element*>(params.q);
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < Traits::kRows * kChunks; i += 32) {
      const int row = i / kChunks;
      const int chunk = i % kChunks;
      const bool inside = row < rows && chunk * 8 < params.head_dim;
      const QueryRow r = query_row(params, segment, inside ? row : 0);
      const Element* source = q + q_offset(params, segment.seq, segment.sequence, r.query, r.head) +
                              (inside ? chunk * 8 : 0);
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(
          *reinterpret_cast<const uint4*>(source),
          *reinterpret_cast<uint4*>(q_smem + swizzled_offset<Traits::kQueryRows>(row, chunk)),
          inside);
    }
  }

  SharedStorage& smem_;
  RingPosition position_;
};

}  // namespace leanattn
