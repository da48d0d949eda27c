// The kernel, in the order in which things happen. One CTA is one unit: its producer finds its share and
// copies it, segment by segment, and its consumers compute it.
// Reading order: in core/ schedule.h, segment_walker.h, softmax_state.h, head_pairs.h; here traits.h,
// locate.h, ring.h, rope.h, new_row.h, task_queue.h, loaders.h, loaders_paged.h, produce.h, empty_rows.h,
// scoring.h, cache_fragments.h, depth_split.h, mainloop.h, step_values.h, mainloop_warpgroup.h, wide_tile.h,
// mainloop_keys.h, mainloop_wide_rows.h, warp_merge.h, output.h, fixup.h, cluster_fixup.h, tree_fixup.h.
//
// The start is short on purpose. In a model its code and parameters come cold from memory, a line at a
// time, and all wait for the producer: so it copies the unit's first K, q and V before it does anything else.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "cluster_fixup.h"
#include "empty_rows.h"
#include "fixup.h"
#include "locate.h"
#include "mainloop.h"
#include "produce.h"
#include "tree_fixup.h"
#include "warp_merge.h"

namespace leanattn {

// Of each kind of products: by mma, by wgmma, and by that with the keys as its rows.
template <class Traits, class ByMma, class ByWgmma, class ByKeys>
using OfKind = std::conditional_t<Traits::kKeysAsRows, ByKeys,
                                  std::conditional_t<Traits::kWgmma, ByWgmma, ByMma>>;
template <class Traits>
using PlaceOf = OfKind<Traits, WarpPlace<Traits>, WarpgroupPlace<Traits>, KeysPlace<Traits>>;
template <class Traits>
using StateOf = OfKind<Traits, WarpState<Traits>, WarpgroupState<Traits>, KeysState<Traits>>;

// Tiles [tile_begin, tile_end) of a task's segment, with products of fp16 or bf16.
template <class Traits>
__device__ __forceinline__ void run_main_loop(const DecodeParams& params,
                                              const PlaceOf<Traits>& place,
                                              const typename Traits::Task& task, int tile_begin,
                                              int tile_end, Ring<Traits>& ring,
                                              typename Traits::SharedStorage& smem,
                                              StateOf<Traits>& state) {
  const auto run = [&]<class Element>() {
    using ByWgmma = std::conditional_t<Traits::kWide, WideRowsMainLoop<Traits, Element>,
                                       WarpgroupMainLoop<Traits, Element>>;
    using Loop = OfKind<Traits, MainLoop<Traits, Element>, ByWgmma, KeysMainLoop<Traits, Element>>;
    Loop(params, place, smem).run(task, tile_begin, tile_end, ring, state);
  };
  using Features = typename Traits::Features;
  // float8 is widened to fp16, whatever q is.
  if constexpr (Traits::kFloat8 || !Features::kBFloat16) {
    run.template operator()<__half>();
  } else if constexpr (!Features::kFloat16) {
    run.template operator()<__nv_bfloat16>();
  } else if (is_bfloat16<Traits>(params)) {
    run.template operator()<__nv_bfloat16>();
  } else {
    run.template operator()<__half>();
  }
}

// The next task, its q ready for the products; null when the share is done.
template <class Traits>
__device__ __forceinline__ const typename Traits::Task* next_task(const DecodeParams& params,
                                                                  const TaskQueue<Traits>& tasks) {
  typename Traits::Task* task = tasks.front();
  if constexpr (Traits::kFloat8) {
    if (task) {
      TaskQueue<Traits>::narrow_queries(params, *task);
      sync_consumers<Traits>();  // every row is narrow
    }
  }
  if constexpr (Traits::kAppends) {
    if (task) rotate_rows<Traits>(params, *task);
  }
  return task;
}

// The consumer warps' whole life: each segment as a whole.
template <class Traits>
__device__ __forceinline__ void consume(const DecodeParams& params, int unit, Ring<Traits> ring,
                                        TaskQueue<Traits> tasks,
                                        typename Traits::SharedStorage& smem) {
  const PlaceOf<Traits> place(threadIdx.x / 32);
  bool is_first = true;
  while (const auto* task = next_task(params, tasks)) {
    mark(params, Mark::kFirstTask, is_first && threadIdx.x == 0);
    is_first = false;
    const Segment& segment = task->segment;
    const bool is_whole = segment.is_whole();
    StateOf<Traits> state;
    run_main_loop<Traits>(params, place, *task, segment.tile_begin, segment.tile_end, ring, smem,
                          state);
    mark(params, Mark::kLoopEnd, threadIdx.x == 0);
    const auto finish = [&](int row, int dim, const QuadState& merged) {
      if (is_whole) {
        if (has_output<Traits>(params, segment, row, dim)) {
          write_quad<Traits>(params, segment, row, dim, merged);
        }
      } else if (params.cluster_size > 1 && smem.in_teams) {
        store_cluster_partial<Traits>(smem, row, dim, merged);
      } else {
        store_partial<Traits>(params, partial_index(params, task->partial_slot, 0), row, dim,
                              merged);
      }
    };
    merge_warps<Traits>(smem, place, state, task->num_rows, params.head_dim_v, finish);
    mark(params, Mark::kMerged, threadIdx.x == 0);
    tasks.pop();
  }
  if (params.cluster_size > 1 && smem.in_teams) {
    cluster_fix_up<Traits>(params, unit, smem);
  } else {
    fix_up<Traits>(params, smem, [&](const typename Traits::CutSegment& cut) {
      merge_partials<Traits>(params, cut.segment, cut.units, ring);
    });
  }
  mark(params, Mark::kExit, threadIdx.x == 0);
}

// The same for Kind::kTree, tile by tile.
template <class Traits>
__device__ __forceinline__ void consume_in_tree(const DecodeParams& params, int unit,
                                                const RoomPlan& room, Ring<Traits> ring,
                                                TaskQueue<Traits> tasks,
                                                typename Traits::SharedStorage& smem) {
  const PlaceOf<Traits> place(threadIdx.x / 32);
  const FoldMemory<Traits> fold = fold_memory<Traits>(params, unit, room, smem);
  while (const auto* task = next_task(params, tasks)) {
    const Segment& segment = task->segment;
    const TileRange item = segment.item;
    const auto partial = [&](int node) { return partial_index(params, task->partial_slot, node); };
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
    }
    tasks.pop();
  }
  fix_up<Traits>(params, smem, [&](const typename Traits::CutSegment& cut) {
    fold_partials<Traits>(params, cut.segment, cut.units, cut.shares, fold);
  });
}

// The whole life of the producer, and of the helpers, who by cp.async share the copying. copier: 0 is the
// producer.
template <class Traits>
__device__ __forceinline__ void bring_share(const DecodeParams& params, const TensorMaps& maps,
                                            int copier, Ring<Traits> ring, TaskQueue<Traits> tasks,
                                            typename Traits::SharedStorage& smem) {
  constexpr bool kHasCpAsync = !Traits::Features::kFixedLoader || LEANATTN_ARCH < 900;
  const bool is_producer = copier == 0;
  const bool by_tma = uses_tma<Traits>(maps);
  const int arrivals = by_tma ? TmaLoader<Traits>::kArrivals : CpAsyncLoader<Traits>::kArrivals;
  mark(params, Mark::kEntry, is_producer && threadIdx.x % 32 == 0);
  const auto init_first = [&] {
    // elect_one_sync, because ptxas then knows that it is one lane: it has a loop over lanes otherwise.
    if (is_producer && cute::elect_one_sync()) {
      ring.init_first(arrivals);
      tasks.init_first();
#if LEANATTN_ARCH >= 900
      cutlass::arch::fence_barrier_init();  // before the copy engine arrives on them
#endif
    }
    __syncwarp();  // all are initialised before another lane copies or arrives
  };
  const auto set_up = [&] {
    if (cute::elect_one_sync()) {
      ring.init_rest(arrivals);
      tasks.init_rest();
#if LEANATTN_ARCH >= 900
      cutlass::arch::fence_barrier_init();
#endif
    }
    __syncwarp();
    // Of those who wait alone: a warp that has left would seem to be missing at a barrier of all threads.
    ptx::bar_arrive(kSetupBarrier, Traits::kConsumerThreads + 32);
    if (!by_tma) ptx::bar_arrive(kHelperBarrier, Traits::kCopyWarps * 32);
  };
  const auto walker = locate<Traits>(params, blockIdx.x, smem, init_first);
  if (is_producer && cute::elect_one_sync()) smem.in_teams = walker.in_team();
  if (by_tma) {
    PageQueue<Traits> pages(params, walker, whole_tile<Traits>(), true, smem.page_ids[0]);
    EitherLoader<Traits, TmaLoader<Traits>, PagedTmaLoader<Traits>> loader(
        params, {}, PagedTmaLoader<Traits>(maps, pages));
    produce<Traits>(params, maps, walker, loader, ring, tasks, true, set_up);
  } else if constexpr (kHasCpAsync) {
    if (is_producer) {
      set_up();  // before the first copy, since the helpers copy too
    } else {
      ptx::bar_sync(kHelperBarrier, Traits::kCopyWarps * 32);
    }
    const KeyRange part = part_of_tile<Traits>(copier);
    PageQueue<Traits> pages(params, walker, part, false, smem.page_ids[copier]);
    EitherLoader<Traits, CpAsyncLoader<Traits>, PagedCpAsyncLoader<Traits>> loader(
        params, {part}, PagedCpAsyncLoader<Traits>(pages));
    produce<Traits>(params, maps, walker, loader, ring, tasks, is_producer, [] {});
    cute::cp_async_wait<0>();  // nothing is promised of the copies of a thread that has exited
  }
}

// A helper where the producer needs no help to copy.
__device__ __forceinline__ void fetch_descriptors(const TensorMaps& maps) {
#if LEANATTN_ARCH >= 900
  if (cute::elect_one_sync()) {
    for (const CacheMaps& cache : maps.cache) {
      cute::prefetch_tma_descriptor(&cache.tile);
      cute::prefetch_tma_descriptor(&cache.rows);
    }
  }
  __syncwarp();
#endif
}

// A CTA's whole life.
template <class Traits>
__device__ __forceinline__ void decode_share(const DecodeParams& params, const TensorMaps& maps,
                                             const RoomPlan& room) {
  auto& smem =
      *ptx::pin_smem(reinterpret_cast<typename Traits::SharedStorage*>(ptx::dynamic_smem()));
  const int warp = threadIdx.x / 32;
  Ring<Traits> ring(smem, room.num_stages, uses_tma<Traits>(maps));
  TaskQueue<Traits> tasks(smem, uses_tma<Traits>(maps));
  if (needs_all_threads(params)) locate_by_all<Traits>(params, smem);
  if (warp < Traits::kConsumerWarps) {
    if constexpr (Traits::kMovesRegisters) {
      cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    }
    tasks.clear_columns(params.head_dim);
    ptx::bar_sync(kSetupBarrier, Traits::kConsumerThreads + 32);
    if constexpr (Traits::kTree) {
      consume_in_tree<Traits>(params, blockIdx.x, room, ring, tasks, smem);
    } else {
      consume<Traits>(params, blockIdx.x, ring, tasks, smem);
    }
    return;
  }
  if constexpr (Traits::kMovesRegisters) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
  }
  const int copier = warp - Traits::kProducerWarp;
  if (copier == 0 || !uses_tma<Traits>(maps)) {
    bring_share<Traits>(params, maps, copier, ring, tasks, smem);
  } else if (warp == Traits::kHelperWarp) {
    fetch_descriptors(maps);
  }
  // With a token of its own every row sees a key.
  if constexpr (!Traits::kAppends) {
    if (warp == Traits::kHelperWarp) write_empty_rows<Traits>(params);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    decode_kernel(const __grid_constant__ typename Traits::Params params,
                  const __grid_constant__ TensorMaps maps, RoomPlan room) {
  if constexpr (has_code<Traits>()) {
    decode_share<Traits>(params, maps, room);
  } else {
    __trap();  // never launched: make_key(), KernelSetup::has_tma
  }
}

}  // namespace leanattn
