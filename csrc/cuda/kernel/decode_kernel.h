// The kernel, in the order in which things happen. One CTA is one unit: it finds its share, and then
// the producer warps copy and the consumer warps compute it, segment by segment.
// Reading order: schedule.h, softmax_state.h, head_pairs.h, traits.h, ring.h, task_queue.h, loaders.h,
// loaders_paged.h, cache_fragments.h, depth_split.h, mainloop.h, mainloop_warpgroup.h, warp_merge.h,
// fixup.h, cluster_fixup.h, tree_fixup.h.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "cluster_fixup.h"
#include "empty_rows.h"
#include "fixup.h"
#include "loaders_paged.h"
#include "locate.h"
#include "mainloop.h"
#include "task_queue.h"
#include "tree_fixup.h"
#include "warp_merge.h"

namespace leanattn {

template <class Traits>
using PlaceOf = std::conditional_t<Traits::kWgmma, WarpgroupPlace<Traits>, WarpPlace<Traits>>;
template <class Traits>
using StateOf = std::conditional_t<Traits::kWgmma, WarpgroupState<Traits>, WarpState<Traits>>;

// Tiles [tile_begin, tile_end) of a task's segment, with products of fp16 or bf16.
template <class Traits>
__device__ __forceinline__ void run_main_loop(const DecodeParams& params,
                                              const PlaceOf<Traits>& place,
                                              const typename Traits::Task& task, int tile_begin,
                                              int tile_end, Ring<Traits>& ring,
                                              typename Traits::SharedStorage& smem,
                                              StateOf<Traits>& state) {
  const auto run = [&]<class Element>() {
    using Loop = std::conditional_t<Traits::kWgmma, WarpgroupMainLoop<Traits, Element>,
                                    MainLoop<Traits, Element>>;
    Loop(params, place, smem).run(task, tile_begin, tile_end, ring, state);
  };
  // float8 is widened to fp16, whatever q is.
  if (!Traits::kFloat8 && params.element_type == ElementType::kBFloat16) {
    run.template operator()<__nv_bfloat16>();
  } else {
    run.template operator()<__half>();
  }
}

// The consumer warps' whole life: each segment as a whole.
template <class Traits>
__device__ __forceinline__ void consume(const DecodeParams& params, const Place& unit_place,
                                        int unit, Ring<Traits> ring, TaskQueue<Traits> tasks,
                                        typename Traits::SharedStorage& smem) {
  const PlaceOf<Traits> place(threadIdx.x / 32);
  const bool in_cluster = unit_place.in_teams && params.is_clustered;
  int num_cuts = 0;
  while (const auto* task = tasks.front()) {
    const Segment& segment = task->segment;
    const bool is_whole = segment.is_whole();
    StateOf<Traits> state;
    run_main_loop<Traits>(params, place, *task, segment.tile_begin, segment.tile_end, ring, smem,
                          state);
    const auto finish = [&](int row, int dim, const QuadState& merged) {
      if (is_whole) {
        if (has_output<Traits>(params, segment, row, dim)) {
          write_quad<Traits>(params, segment, row, dim, merged);
        }
      } else if (in_cluster) {
        store_cluster_partial<Traits>(smem, row, dim, merged);
      } else {
        store_partial<Traits>(params, partial_index(params, task->units, unit, 0), row, dim,
                              merged);
      }
    };
    merge_warps<Traits>(smem, place, state, task->num_rows, params.head_dim_v, finish);
    if (!is_whole) note_cut<Traits>(*task, smem, num_cuts);
    tasks.pop();
  }
  if (in_cluster) {
    cluster_fix_up<Traits>(params, unit, num_cuts, smem);
  } else {
    fix_up<Traits>(params, num_cuts, smem, [&](const typename Traits::CutSegment& cut) {
      merge_partials<Traits>(params, cut.segment, cut.units);
    });
  }
}

// The same for Kind::kTree, tile by tile.
template <class Traits>
__device__ __forceinline__ void consume_in_tree(const DecodeParams& params, int unit,
                                                const RoomPlan& room, Ring<Traits> ring,
                                                TaskQueue<Traits> tasks,
                                                typename Traits::SharedStorage& smem) {
  const PlaceOf<Traits> place(threadIdx.x / 32);
  const FoldMemory<Traits> fold = fold_memory<Traits>(params, unit, room, smem);
  int num_cuts = 0;
  while (const auto* task = tasks.front()) {
    const Segment& segment = task->segment;
    const TileRange item = segment.item;
    const auto partial = [&](int node) { return partial_index(params, task->units, unit, node); };
    int num_partials = 0;
    for (int tile = segment.tile_begin; tile < segment.tile_end; ++tile) {
      StateOf<Traits> state;
      run_main_loop<Traits>(params, place, *task, tile, tile + 1, ring, smem, state);
      bool left_partial = false;
      const auto finish = [&](int row, int dim, const QuadState& merged) {
        auto stack = fold.stack(row, dim);
        fold_node(item, segment.tile_begin, {0, tile}, merged, stack,
                  [&](const TreeNode& node, const QuadState& folded) {
                    if (node.covers(item)) {
                      write_quad<Traits>(params, segment, row, dim, folded);
                    } else {
                      store_partial<Traits>(params, partial(num_partials), row, dim, folded);
                      left_partial = true;
                    }
                  });
      };
      merge_warps<Traits>(smem, place, state, task->num_rows, params.head_dim_v, finish);
      num_partials += left_partial;
    }
    if (!segment.is_whole()) {
      // Eight rows at a time, as merge_warps does: each thread has what it stored itself.
      for (int first = 0; first < task->num_rows; first += 8) {
        const int last = min_of(first + 8, task->num_rows);
        for_each_quad<Traits>(first, last, params.head_dim_v, [&](int row, int dim) {
          auto stack = fold.stack(row, dim);
          int node = num_partials;
          fold_rest<QuadState>(item, segment.tile_begin, segment.tile_end, stack,
                               [&](const TreeNode&, const QuadState& folded) {
                                 store_partial<Traits>(params, partial(node++), row, dim, folded);
                               });
        });
      }
      note_cut<Traits>(*task, smem, num_cuts);
    }
    tasks.pop();
  }
  fix_up<Traits>(params, num_cuts, smem, [&](const typename Traits::CutSegment& cut) {
    fold_partials<Traits>(params, cut.segment, cut.units, cut.shares, fold);
  });
}

// The whole life of a producer warp by bulk copies, which is the first one.
template <class Traits>
__device__ __forceinline__ void produce_share(const DecodeParams& params, const TensorMaps& maps,
                                              const Place& place, int unit,
                                              const Ring<Traits>& ring,
                                              typename Traits::SharedStorage& smem) {
  const SegmentWalker walker = make_walker(params, place, unit);
  const PageQueue<Traits> pages(params, walker, whole_tile<Traits>(), smem.page_ids[0]);
  const EitherLoader loader(params, TmaLoader<Traits>{}, PagedTmaLoader<Traits>(maps, pages));
  produce(params, maps, walker, loader, ring);
  ptx::let_next_kernel_launch();  // there is no room for it before CTAs leave anyway
}

// The same of each of the two by cp.async: a half of every tile.
template <class Traits>
__device__ __forceinline__ void produce_half_share(const DecodeParams& params,
                                                   const TensorMaps& maps, const Place& place,
                                                   int unit, bool second, const Ring<Traits>& ring,
                                                   typename Traits::SharedStorage& smem) {
  const SegmentWalker walker = make_walker(params, place, unit);
  const KeyRange part = half_tile<Traits>(second);
  const PageQueue<Traits> pages(params, walker, part, smem.page_ids[second]);
  const EitherLoader loader(params, CpAsyncLoader<Traits>{part}, PagedCpAsyncLoader<Traits>(pages));
  produce(params, maps, walker, loader, ring);
  cute::cp_async_wait<0>();  // nothing is promised of the copies of a thread that has exited
  ptx::let_next_kernel_launch();
}

// A CTA's whole life.
template <class Traits>
__device__ __forceinline__ void decode_share(const DecodeParams& params, const TensorMaps& maps,
                                             const RoomPlan& room) {
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(ptx::dynamic_smem());
  const int warp = threadIdx.x / 32;

  Ring<Traits> ring(smem, room.num_stages, maps.usable);
  TaskQueue<Traits> tasks(smem);
  // elect_one_sync, because ptxas then knows that it is one lane: it has a loop over lanes otherwise.
  if (warp == Traits::kProducerWarp) {
    if (cute::elect_one_sync()) {
      ring.init(maps.usable ? TmaLoader<Traits>::kArrivals : CpAsyncLoader<Traits>::kArrivals);
#if LEANATTN_ARCH >= 900
      cutlass::arch::fence_barrier_init();  // before the copy engine arrives on them
      if (maps.usable) {
        for (const CacheMaps* cache : {&maps.k, &maps.v}) {
          cute::prefetch_tma_descriptor(&cache->tile);
          cute::prefetch_tma_descriptor(&cache->rows);
        }
      }
#endif
    }
    __syncwarp();  // all are initialised before another lane copies or arrives
  } else if (warp == Traits::kTaskWarp) {
    if (cute::elect_one_sync()) tasks.init();
    __syncwarp();  // all are initialised before any lane arrives
  }
  // All so far, and the launch itself, may run beside the end of the kernel before. Its results may be
  // anything that this one reads, and what this one writes it may still read.
  ptx::wait_for_previous_kernel();
  const int unit = blockIdx.x;
  const Place place = locate<Traits>(params, unit, smem);

  // The others wait for the barriers' initialisation; those who did it do not wait for them.
  const bool second = warp == Traits::kSecondProducerWarp;
  const auto be_producer = [&] {
    ptx::bar_arrive(kSetupBarrier, Traits::kThreads);
    produce_share(params, maps, place, unit, ring, smem);
  };
  const auto be_half_producer = [&] {
    ptx::bar_sync(kSetupBarrier, Traits::kThreads);
    produce_half_share(params, maps, place, unit, second, ring, smem);
  };
  const auto be_task_warp = [&] {
    ptx::bar_arrive(kSetupBarrier, Traits::kThreads);
    SegmentWalker walker = make_walker(params, place, unit);
    for (Segment segment; walker.next(segment);) tasks.push(params, walker.shares(), segment);
    tasks.close();
  };
  const auto be_consumer = [&] {
    ptx::bar_sync(kSetupBarrier, Traits::kThreads);
    if constexpr (Traits::kTree) {
      consume_in_tree<Traits>(params, unit, room, ring, tasks, smem);
    } else {
      consume<Traits>(params, place, unit, ring, tasks, smem);
    }
  };

  if constexpr (Traits::kMovesRegisters) {
    write_empty_rows<Traits>(params, place, smem);  // now, while all have as many registers
    if (warp < Traits::kConsumerWarps) {
      cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
      be_consumer();
      return;
    }
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
  }
  // One way of copying a branch: with both in one, ptxas no longer sees that all lanes take it, and puts
  // code for lanes that do not around every copy.
  const bool first = warp == Traits::kProducerWarp;
  if (first && maps.usable) {
    be_producer();
  } else if ((first || second) && !maps.usable) {
    be_half_producer();
  } else if (warp == Traits::kTaskWarp) {
    be_task_warp();
  } else if (warp >= Traits::kConsumerWarps) {
    ptx::bar_arrive(kSetupBarrier, Traits::kThreads);
  } else if constexpr (!Traits::kMovesRegisters) {
    be_consumer();
  }
  if constexpr (!Traits::kMovesRegisters) write_empty_rows<Traits>(params, place, smem);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params,
                  const __grid_constant__ TensorMaps maps, RoomPlan room) {
  if constexpr (!Traits::kWgmma || LEANATTN_HAS_WGMMA) {
    decode_share<Traits>(params, maps, room);
  } else {
    __trap();  // never launched: can_use_wgmma()
  }
}

}  // namespace leanattn
