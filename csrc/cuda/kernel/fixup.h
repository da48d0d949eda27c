// The fixup: puts an item together again that several units have computed parts of (the paper's
// host-block reduction). Every unit leaves its partials in the workspace and, at the end of its share,
// draws a ticket for each; the unit that draws an item's last ticket merges its partials in the order
// of the units, so that the result does not depend on who came last. Nobody waits, so it needs no CTA
// to run beside another. Tickets are drawn at the end because the copies in flight make any trip to
// memory long while the share lasts, and because an item's other part ends no sooner anyway.
//
// Memory ordering, CTA i to the last CTA:
//   partial stores of all threads of i  ->  sync_consumers  ->  thread 0: fence, atomicInc (release)
//   last CTA's thread 0: atomicInc, fence (acquire)  ->  sync_consumers  ->  loads of all its threads
// The loads go to L2 (__ldcg, cp.async): the non-coherent path could hold the slot's old contents.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "output.h"
#include "timeline.h"
#include "warp_merge.h"

namespace leanattn {

template <class Traits>
__device__ __forceinline__ unsigned* counter_of(const DecodeParams& params,
                                                const typename Traits::CutSegment& cut) {
  int32_t* counter =
      params.counters + counter_index<Traits::kPlainItems>(params, cut.segment, cut.units.first);
  return reinterpret_cast<unsigned*>(counter);
}

template <class Traits>
__device__ __forceinline__ void store_partial(const DecodeParams& params, int64_t index, int row,
                                              int dim, const QuadState& state) {
  const int64_t slot_row = index * params.problem.rows_per_item + row;
  const float4 o{state.o[0], state.o[1], state.o[2], state.o[3]};
  __stcg(reinterpret_cast<float4*>(params.partial_o + slot_row * params.head_dim_v + dim), o);
  if (dim == 0) {
    __stcg(reinterpret_cast<float2*>(params.partial_stats + slot_row * 2),
           float2{state.max, state.sum});
  }
}

template <class Traits>
__device__ __forceinline__ QuadState load_partial(const DecodeParams& params, int64_t index,
                                                  int row, int dim) {
  const int64_t slot_row = index * params.problem.rows_per_item + row;
  const float4 o = __ldcg(
      reinterpret_cast<const float4*>(params.partial_o + slot_row * params.head_dim_v + dim));
  const float2 stats = __ldcg(reinterpret_cast<const float2*>(params.partial_stats + slot_row * 2));
  return make_quad_state(stats, o);
}

// By all consumer threads, after their stores: draws a ticket for each of the unit's cut segments. The
// last ticket of an item takes its counter back to zero.
template <class Traits>
__device__ __forceinline__ void draw_tickets(const DecodeParams& params, int num_cuts,
                                             typename Traits::SharedStorage& smem) {
  sync_consumers<Traits>();  // all partial stores of this CTA come before the release below
  if (threadIdx.x == 0) {
    ptx::fence_acq_rel_gpu();
    unsigned tickets[2];
    unsigned last[2];
#pragma unroll
    for (int cut = 0; cut < 2; ++cut) {  // both are under way before the first is looked at
      if (cut >= num_cuts) continue;
      last[cut] = smem.cuts[cut].units.count() - 1;
      tickets[cut] = atomicInc(counter_of<Traits>(params, smem.cuts[cut]), last[cut]);
    }
    ptx::fence_acq_rel_gpu();
#pragma unroll
    for (int cut = 0; cut < 2; ++cut) {
      if (cut < num_cuts) smem.cuts[cut].is_last_to_arrive = tickets[cut] == last[cut];
    }
  }
  sync_consumers<Traits>();  // the answers are there; the acquire covers the whole CTA
}

// By all consumer threads of the unit that came last. Each has all partials of its elements brought at once,
// as far as there is room, into a place of its own in the ring, where every tile has been read: one trip to
// memory, however many they are.
template <class Traits>
__device__ __forceinline__ void merge_partials(const DecodeParams& params, const Segment& segment,
                                               const Participants& units,
                                               const Ring<Traits>& ring) {
  constexpr int kAtOnce = Traits::kPartialsAtOnce;
  auto* o_smem = reinterpret_cast<float4(*)[Traits::kConsumerThreads]>(ring.stages_smem());
  // Whole groups, so that the order of a merge does not depend on the room.
  const int ring_bytes = ring.num_stages() * Traits::kStageBytes;
  const int room = ring_bytes / Traits::kPartialBytes / kAtOnce * kAtOnce;
  auto* stats_smem = reinterpret_cast<float2(*)[Traits::kConsumerThreads]>(o_smem + room);
  const int me = threadIdx.x;
  const int rows =
      item_rows<Traits::kPlainItems>(params.problem, segment.sequence, segment.row_block);
  for_each_quad<Traits>(0, rows, params.head_dim_v, [&](int row, int dim) {
    if (!has_output<Traits>(params, segment, row, dim)) return;
    QuadState merged;
    LEANATTN_KEEP_ROLLED
    for (int first = units.first; first <= units.last; first += room) {
      const int count = min_of(room, units.last - first + 1);
#pragma unroll 2
      for (int i = 0; i < count; ++i) {
        const int64_t slot = partial_index(params, units.slot(first + i), 0);
        const int64_t slot_row = slot * params.problem.rows_per_item + row;
        cute::SM80_CP_ASYNC_CACHEGLOBAL<uint4>::copy(
            *reinterpret_cast<const uint4*>(params.partial_o + slot_row * params.head_dim_v + dim),
            *reinterpret_cast<uint4*>(&o_smem[i][me]));
        cute::SM80_CP_ASYNC_CACHEALWAYS<uint2>::copy(
            *reinterpret_cast<const uint2*>(params.partial_stats + slot_row * 2),
            *reinterpret_cast<uint2*>(&stats_smem[i][me]));
      }
      cute::cp_async_fence();
      cute::cp_async_wait<0>();
      LEANATTN_KEEP_ROLLED
      for (int next = 0; next < count; next += kAtOnce) {
        QuadState batch[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (next + i >= count) continue;
          batch[i] = make_quad_state(stats_smem[next + i][me], o_smem[next + i][me]);
        }
        merged.merge(batch);
      }
    }
    write_quad<Traits>(params, segment, row, dim, merged);
  });
}

// By all consumer threads, when the share is done. merge(cut) is called for each cut segment whose item
// is complete.
template <class Traits, class Merge>
__device__ __forceinline__ void fix_up(const DecodeParams& params,
                                       typename Traits::SharedStorage& smem, const Merge& merge) {
  const int num_cuts = smem.num_cuts;
  if (num_cuts == 0) return;
  draw_tickets<Traits>(params, num_cuts, smem);
  mark(params, Mark::kTicket, threadIdx.x == 0);
  for (int cut = 0; cut < num_cuts; ++cut) {
    if (smem.cuts[cut].is_last_to_arrive) merge(smem.cuts[cut]);
  }
}

}  // namespace leanattn
