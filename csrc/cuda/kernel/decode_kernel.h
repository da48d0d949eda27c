// The kernel, in the order in which things happen. One CTA is one unit: it finds its share of the
// line, and then the producer warp copies and the consumer warps compute it, segment by segment.
// Reading order: schedule.h, softmax_state.h, traits.h, ring.h, task_queue.h, loaders.h,
// loaders_paged.h, mainloop.h, warp_merge.h, fixup.h.
#pragma once

#include "empty_rows.h"
#include "fixup.h"
#include "loaders_paged.h"
#include "locate.h"
#include "mainloop.h"
#include "warp_merge.h"

namespace leanattn {

// The consumer warps' whole life.
template <class Traits>
__device__ __forceinline__ void consume(const DecodeParams& params, const Shares& shares, int unit,
                                        Ring<Traits> ring, TaskQueue<Traits> tasks,
                                        typename Traits::SharedStorage& smem) {
  const WarpPlace<Traits> place(threadIdx.x / 32);
  MainLoop<Traits> main_loop(params, place);
  int num_cuts = 0;
  while (const auto* task = tasks.front()) {
    const Segment& segment = task->segment;
    WarpState<Traits> state;
    main_loop.run(*task, ring, state);
    if (segment.is_whole()) {
      merge_warps<Traits>(smem, place, state, task->num_rows, params.head_dim_v,
                          [&](int row, int dim, const QuadState& merged) {
                            write_quad<Traits>(params, segment, row, dim, merged);
                          });
    } else {
      const int64_t index = partial_index(shares, segment, unit);
      merge_warps<Traits>(smem, place, state, task->num_rows, params.head_dim_v,
                          [&](int row, int dim, const QuadState& merged) {
                            store_partial<Traits>(params, index, row, dim, merged);
                          });
      if (threadIdx.x == 0) smem.cuts[num_cuts] = {segment, task->units, false};
      ++num_cuts;
    }
    tasks.pop();
  }
  fix_up<Traits>(params, shares, num_cuts, smem);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params,
                  const __grid_constant__ TensorMaps maps, int num_stages) {
  extern __shared__ __align__(1024) uint8_t dynamic_smem[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(dynamic_smem);
  const bool is_producer = threadIdx.x >= Traits::kConsumerThreads;

  Ring<Traits> ring(smem, num_stages);
  TaskQueue<Traits> tasks(smem);
  if (is_producer) {
    const int lane = threadIdx.x % 32;
    ring.init(lane, maps.usable ? TmaLoader<Traits>::kArrivals : CpAsyncLoader<Traits>::kArrivals);
    tasks.init(lane);
#if __CUDA_ARCH__ >= 900
    cutlass::arch::fence_barrier_init();  // before the copy engine arrives on them
    if (lane == 0 && maps.usable) {
      cute::prefetch_tma_descriptor(&maps.k.tile);
      cute::prefetch_tma_descriptor(&maps.v.tile);
    }
#endif
  }
  const int unit = blockIdx.x;
  const Place place = locate<Traits>(params, unit, smem);
  __syncthreads();  // the barriers are initialised

  if (is_producer) {
    const SegmentWalker walker(params.problem, place.shares, unit, place.start);
    const auto produce_with = [&](const auto& loader) {
      produce(params, maps, place.shares, walker, loader, ring, tasks);
    };
    if (params.block_table) {
      const PageQueue<Traits> pages(params, walker, smem);
      if (maps.usable) {
        produce_with(PagedTmaLoader<Traits>(maps, pages));
      } else {
        produce_with(PagedCpAsyncLoader<Traits>(pages));
      }
    } else if (maps.usable) {
      produce_with(TmaLoader<Traits>{});
    } else {
      produce_with(CpAsyncLoader<Traits>{});
    }
  } else {
    consume<Traits>(params, place.shares, unit, ring, tasks, smem);
  }
  write_empty_rows<Traits>(params, place, smem);
}

}  // namespace leanattn
