// The kernel, in the order in which things happen. One CTA is one unit: it finds its share, and then
// the producer warp copies and the consumer warps compute it, segment by segment.
// Reading order: schedule.h, softmax_state.h, traits.h, ring.h, task_queue.h, loaders.h,
// loaders_paged.h, mainloop.h, warp_merge.h, fixup.h, cluster_fixup.h.
#pragma once

#include "cluster_fixup.h"
#include "empty_rows.h"
#include "fixup.h"
#include "loaders_paged.h"
#include "locate.h"
#include "mainloop.h"
#include "task_queue.h"
#include "warp_merge.h"

namespace leanattn {

// The consumer warps' whole life.
template <class Traits>
__device__ __forceinline__ void consume(const DecodeParams& params, const Place& unit_place,
                                        int unit, Ring<Traits> ring, TaskQueue<Traits> tasks,
                                        typename Traits::SharedStorage& smem) {
  const WarpPlace<Traits> place(threadIdx.x / 32);
  MainLoop<Traits> main_loop(params, place);
  const bool in_cluster = unit_place.in_teams && params.is_clustered;
  int num_cuts = 0;
  while (const auto* task = tasks.front()) {
    const Segment& segment = task->segment;
    WarpState<Traits> state;
    main_loop.run(*task, ring, state);
    const auto merge = [&](const auto& visit) {
      merge_warps<Traits>(smem, place, state, task->num_rows, params.head_dim_v, visit);
    };
    if (segment.is_whole()) {
      merge([&](int row, int dim, const QuadState& merged) {
        write_quad<Traits>(params, segment, row, dim, merged);
      });
    } else {
      if (in_cluster) {
        merge([&](int row, int dim, const QuadState& merged) {
          store_cluster_partial<Traits>(smem, row, dim, merged);
        });
      } else {
        const int64_t index = task->units.partial_index(unit);
        merge([&](int row, int dim, const QuadState& merged) {
          store_partial<Traits>(params, index, row, dim, merged);
        });
      }
      if (threadIdx.x == 0) smem.cuts[num_cuts] = {segment, task->units, false};
      ++num_cuts;
    }
    tasks.pop();
  }
  if (in_cluster) {
    cluster_fix_up<Traits>(params, unit, num_cuts, smem);
  } else {
    fix_up<Traits>(params, num_cuts, smem);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params,
                  const __grid_constant__ TensorMaps maps, int num_stages) {
  extern __shared__ __align__(1024) uint8_t dynamic_smem[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(dynamic_smem);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  Ring<Traits> ring(smem, num_stages);
  TaskQueue<Traits> tasks(smem);
  if (warp == Traits::kProducerWarp) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0 && maps.usable) {
      cute::prefetch_tma_descriptor(&maps.k.tile);
      cute::prefetch_tma_descriptor(&maps.v.tile);
    }
#endif
    ring.init(lane, maps.usable ? TmaLoader<Traits>::kArrivals : CpAsyncLoader<Traits>::kArrivals);
#if __CUDA_ARCH__ >= 900
    cutlass::arch::fence_barrier_init();  // before the copy engine arrives on them
#endif
    __syncwarp();  // all are initialised before lane 0 copies
  } else if (warp == Traits::kTaskWarp) {
    tasks.init(lane);
    __syncwarp();  // all are initialised before any lane arrives
  }
  const int unit = blockIdx.x;
  const Place place = locate<Traits>(params, unit, smem);

  // The consumers wait for the barriers' initialisation; those who did it do not wait for them.
  if (warp == Traits::kProducerWarp) {
    ptx::bar_arrive(kSetupBarrier, Traits::kThreads);
    const SegmentWalker walker = make_walker(params, place, unit);
    const auto produce_with = [&](const auto& loader) {
      produce(params, maps, walker, loader, ring);
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
  } else if (warp == Traits::kTaskWarp) {
    ptx::bar_arrive(kSetupBarrier, Traits::kThreads);
    SegmentWalker walker = make_walker(params, place, unit);
    for (Segment segment; walker.next(segment);) tasks.push(params, walker.shares(), segment);
    tasks.close();
  } else {
    ptx::bar_sync(kSetupBarrier, Traits::kThreads);
    consume<Traits>(params, place, unit, ring, tasks, smem);
  }
  write_empty_rows<Traits>(params, place, smem);
}

}  // namespace leanattn
