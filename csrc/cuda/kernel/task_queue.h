// Segments on their way from the producer to the consumer warps, each with its q rows. The producer stays
// ahead, so that neither the schedule's arithmetic nor the trip for q stands between the consumers and
// the next tile.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "mma.h"
#include "new_row.h"
#include "ring.h"
#include "vector.h"

namespace leanattn {

template <class Traits>
class TaskQueue {
 public:
  using Task = typename Traits::Task;
  using SharedStorage = typename Traits::SharedStorage;

  // `bulk_copies`: of q's rows, one by one, by the copy engine; else by cp.async, which can swizzle them.
  __device__ __forceinline__ TaskQueue(SharedStorage& smem, bool bulk_copies)
      : smem_(smem), bulk_copies_(!Traits::kWgmma && bulk_copies) {}

  // By one lane of the producer: the first task's barriers, before its first copy, and the others, before
  // the set-up barrier.
  __device__ __forceinline__ void init_first() { init(0, 1); }
  __device__ __forceinline__ void init_rest() { init(1, Traits::kTasks); }

  // Producer, whole warp: has the segment's q brought, when the consumers have left room.
  __device__ __forceinline__ void copy_queries(const DecodeParams& params, const Segment& segment) {
    Task& task = wait_for_room();
    const int rows = item_rows<kPlainItems>(params.problem, segment.sequence, segment.row_block);
    if (bulk_copies_) {
      if constexpr (Traits::kAppends) {
        new_position_ = new_position(params, segment.seq);
        if (cute::elect_one_sync()) {
          copy_new_row<Traits>(params, segment, new_position_, task.new_row, full_barrier());
        }
      }
      copy_rows(params, segment, rows, task.q);
    } else {
      copy_chunks(params, segment, rows, task.q);
      ptx::cp_async_mbarrier_arrive_noinc(full_barrier());
    }
  }

  // Producer, after that: all else that the consumers need to know. `shares`: of the walk that the segment
  // is from.
  __device__ __forceinline__ void push(const DecodeParams& params, const Shares& shares,
                                       const Segment& segment) {
    if (cute::elect_one_sync()) {
      Task& task = smem_.tasks[position_.stage];
      task.segment = segment;
      task.num_rows = item_rows<kPlainItems>(params.problem, segment.sequence, segment.row_block);
      if constexpr (Traits::kAppends) task.new_row.position = new_position_;
      if (!segment.is_whole()) {
        task.partial_slot = own_slot(shares, segment, blockIdx.x);
        CutSegment& cut = smem_.cuts[num_cuts_];
        cut.segment = segment;
        cut.shares = shares;
      }
      ptx::mbarrier_arrive(full_barrier());
    }
    num_cuts_ += !segment.is_whole();
    position_.advance(Traits::kTasks);
  }

  // Producer, once, after the last push. `shares`: of the walk.
  __device__ __forceinline__ void close(const Shares& shares) {
    Task& task = wait_for_room();
    if (!bulk_copies_) {
      cute::cp_async_wait<0>();  // nothing is promised of the copies of a thread that has exited
      ptx::mbarrier_arrive(full_barrier());
    } else if constexpr (Traits::kAppends && Traits::Features::kPaged) {
      if (cute::elect_one_sync()) ptx::mbarrier_arrive(full_barrier());
    }
    __syncwarp();  // whichever lane wrote the cuts
    if (cute::elect_one_sync()) {
#pragma unroll 1
      for (int cut = 0; cut < num_cuts_; ++cut) {
        smem_.cuts[cut].units = participants(shares, smem_.cuts[cut].segment);
      }
      smem_.num_cuts = num_cuts_;
      task.num_rows = 0;
      ptx::mbarrier_arrive(full_barrier());
    }
  }

  // Consumers, before the set-up barrier: columns of q beyond the head dim, which bulk copies leave alone.
  __device__ __forceinline__ void clear_columns(int head_dim) const {
    if (!bulk_copies_ || head_dim == Traits::kHeadDim) return;
    const int first = head_dim / 8;
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < Traits::kTasks * Traits::kRows;
         row += Traits::kConsumerWarps) {
      uint8_t* q_smem = smem_.tasks[row / Traits::kRows].q;
#pragma unroll 1
      for (int chunk = first + threadIdx.x % 32; chunk < kRowChunks; chunk += 32) {
        *reinterpret_cast<uint4*>(q_smem + query_offset<Traits>(row % Traits::kRows, chunk)) =
            uint4{};
      }
    }
  }

  // Consumer: the next task, or null. The wait acquires what the producer wrote.
  __device__ __forceinline__ Task* front() const {
    ptx::mbarrier_wait_parity(full_barrier(), position_.phase);
    Task& task = smem_.tasks[position_.stage];
    return task.num_rows > 0 ? &task : nullptr;
  }

  // Consumer, whole warp: done with the task. The lanes' reads come before lane 0's arrival.
  __device__ __forceinline__ void pop() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&smem_.task_empty[position_.stage]);
    position_.advance(Traits::kTasks);
  }

  // With float8 caches, by all consumer warps: q becomes fp16. bf16 reaches further, so its rows are
  // taken into fp16's range by a power of two, and the products back by task.q_factors.
  static __device__ __forceinline__ void narrow_queries(const DecodeParams& params, Task& task) {
    constexpr int kLanes = min_of(kRowChunks, 32);
    constexpr int kRowsAtOnce = 32 / kLanes;  // by a warp, which stays together for its shuffles
    const bool is_bf16 = is_bfloat16<Traits>(params);
#pragma unroll 1
    for (int first = threadIdx.x / 32 * kRowsAtOnce; first < task.num_rows;
         first += Traits::kConsumerWarps * kRowsAtOnce) {
      const int row = first + threadIdx.x % 32 / kLanes;
      const int lane = threadIdx.x % kLanes;
      const float factor = is_bf16 ? narrow_row<kLanes>(task.q, row, lane) : 1.0f;
      if (lane == 0) task.q_factors[row] = factor;
    }
  }

 private:
  using CutSegment = typename Traits::CutSegment;
  static constexpr bool kPlainItems = Traits::kPlainItems;
  static constexpr int kRowChunks = Traits::kHeadDim / 8;  // of 16 bytes, a row of q

  __device__ __forceinline__ uint64_t* full_barrier() const {
    return &smem_.task_full[position_.stage];
  }

  __device__ __forceinline__ void init(int begin, int end) const {
#pragma unroll
    for (int task = begin; task < end; ++task) {
      // One lane when the task is written, and by cp.async every lane when its part of q has landed, or
      // one when a new row's page id has; bulk copies are counted in bytes.
      constexpr int kBulkArrivals = Traits::kAppends && Traits::Features::kPaged ? 2 : 1;
      ptx::mbarrier_init(&smem_.task_full[task], bulk_copies_ ? kBulkArrivals : 32 + 1);
      ptx::mbarrier_init(&smem_.task_empty[task], Traits::kConsumerWarps);
    }
  }

  // A fresh barrier counts as just past the phase of parity 1; see Ring.
  __device__ __forceinline__ Task& wait_for_room() const {
    ptx::mbarrier_wait_parity(&smem_.task_empty[position_.stage], position_.phase ^ 1);
    __syncwarp();  // no lane may fall a whole round behind: it would wait for a phase long gone
    return smem_.tasks[position_.stage];
  }

  __device__ __forceinline__ const Float16* query_source(const DecodeParams& params,
                                                         const Segment& segment, int row) const {
    const QueryRow r = query_row<kPlainItems>(params, segment, row);
    return static_cast<const Float16*>(params.q) +
           q_offset(params, segment.seq, segment.sequence, r.query, r.head);
  }

  // q rows of the item by bulk copies. Of the rows beyond it, and of what comes of them, nobody reads.
  __device__ __forceinline__ void copy_rows(const DecodeParams& params, const Segment& segment,
                                            int rows, uint8_t* q_smem) const {
#if LEANATTN_ARCH >= 900
    if (!cute::elect_one_sync()) return;
    const bool paired = Traits::kPairsHeads && params.head_pairs;
    const int bytes = (paired ? Traits::kHeadDim / 2 : params.head_dim) * 2;
    cutlass::arch::ClusterTransactionBarrier::expect_transaction(full_barrier(),
                                                                 rows * bytes * (paired ? 2 : 1));
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      const Float16* source = query_source(params, segment, row);
      uint8_t* row_smem = q_smem + row * Traits::kQueryPitch;
      cute::SM90_BULK_COPY_G2S::copy(source, full_barrier(), row_smem, bytes);
      if (paired) {  // in both halves
        cute::SM90_BULK_COPY_G2S::copy(source, full_barrier(), row_smem + bytes, bytes);
      }
    }
#endif
  }

  // The same by cp.async; rows and columns beyond it become zero.
  __device__ __forceinline__ void copy_chunks(const DecodeParams& params, const Segment& segment,
                                              int rows, uint8_t* q_smem) const {
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < Traits::kRows * kRowChunks; i += 32) {
      const int row = i / kRowChunks;
      const int chunk = i % kRowChunks;
      int column = chunk * 8;
      const bool inside = row < rows && column < params.head_dim;
      if constexpr (Traits::kPairsHeads) {
        if (params.head_pairs) column %= Traits::kHeadDim / 2;  // in both halves
      }
      const Float16* source =
          query_source(params, segment, row < rows ? row : 0) + (inside ? column : 0);
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(
          *reinterpret_cast<const uint4*>(source),
          *reinterpret_cast<uint4*>(q_smem + query_offset<Traits>(row, chunk)), inside);
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
        uint8_t* chunk_smem = q_smem + query_offset<Traits>(row, chunk);
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
  bool bulk_copies_;
  int num_cuts_ = 0;
  int new_position_ = 0;  // of kAppends: of the segment's new token
  RingPosition position_;
};

}  // namespace leanattn
