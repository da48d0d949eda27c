// The fixup inside a cluster: its CTAs have shared one item out among them and merge their partials
// through distributed shared memory. They run together, so one barrier takes the place of tickets. A team of
// several clusters has both: what each cluster makes of an item meets in global memory.
#pragma once

#include <cooperative_groups.h>

#include "fixup.h"
#include "ring.h"

namespace leanattn {

// In the ring: when a unit merges its warps' states of its only segment, every stage has been read.
template <class Traits>
__device__ __forceinline__ typename Traits::ClusterPartial& cluster_partial(
    typename Traits::SharedStorage& smem) {
  return *reinterpret_cast<typename Traits::ClusterPartial*>(reinterpret_cast<uint8_t*>(&smem) +
                                                             Traits::kRingOffset);
}

template <class Traits>
__device__ __forceinline__ void store_cluster_partial(typename Traits::SharedStorage& smem, int row,
                                                      int dim, const QuadState& state) {
  auto& partial = cluster_partial<Traits>(smem);
  *reinterpret_cast<float4*>(&partial.o[row][dim]) =
      float4{state.o[0], state.o[1], state.o[2], state.o[3]};
  if (dim == 0) partial.stats[row] = float2{state.max, state.sum};
}

// Four elements of a row of the item, of the partials of the cluster's first `count` CTAs, in the order of the
// units.
template <class Traits, class Cluster>
__device__ __forceinline__ QuadState merge_cluster(const Cluster& cluster,
                                                   typename Traits::SharedStorage& smem, int count,
                                                   int row, int dim) {
  QuadState states[kMaxClusterSize];
#pragma unroll
  for (int rank = 0; rank < kMaxClusterSize; ++rank) {
    if (rank >= count) continue;
    const auto* partial = cluster.map_shared_rank(&cluster_partial<Traits>(smem), rank);
    const float4 o = *reinterpret_cast<const float4*>(&partial->o[row][dim]);
    states[rank] = make_quad_state(partial->stats[row], o);
  }
  QuadState merged;
  merged.merge(states);
  return merged;
}

// Where a team has several clusters: row r is the matter of rank r modulo the cluster's size, in every
// cluster. It leaves what its cluster makes of the row in global memory, and of all CTAs of its rank the one
// that draws the last ticket merges these. Ordering in memory is as in fixup.h. Out of line, since one cluster
// alone, which small launches are, must not fetch this.
template <class Traits>
LEANATTN_OUT_OF_LINE void merge_clusters(const DecodeParams& params,
                                         typename Traits::SharedStorage& smem, int unit, int rows) {
  const auto cluster = cooperative_groups::this_cluster();
  typename Traits::CutSegment& cut = smem.cuts[0];
  const int size = params.cluster_size;
  const int first_unit = unit - (unit - cut.units.first) % size;  // of this cluster
  const int count = min_of(cut.units.last - first_unit + 1, size);
  const int num_clusters = (cut.units.last - cut.units.first) / size + 1;
  const auto slot_of = [&](int i) {
    return partial_index(params, cut.units.slot(cut.units.first + i * size), 0);
  };
  const int64_t own_slot = slot_of((first_unit - cut.units.first) / size);
  const auto for_each_quad_of = [&](int rank, auto visit) {
    for_each_quad<Traits>(0, ceil_div(max_of(rows - rank, 0), size), params.head_dim_v,
                          [&](int i, int dim) { visit(rank + i * size, dim); });
  };
  // Where not all of the cluster have a part of the item, these stand in for the others.
  LEANATTN_KEEP_ROLLED
  for (int rank = unit - first_unit; rank < size; rank += count) {
    for_each_quad_of(rank, [&](int row, int dim) {
      store_partial<Traits>(params, own_slot, row, dim,
                            merge_cluster<Traits>(cluster, smem, count, row, dim));
    });
    sync_consumers<Traits>();  // all partial stores of this CTA come before the release below
    if (threadIdx.x == 0) {
      int32_t* counter =
          params.counters + rank_counter_index<Traits::kPlainItems>(params, cut.segment, rank);
      const unsigned last = num_clusters - 1;
      ptx::fence_acq_rel_gpu();
      const unsigned ticket = atomicInc(reinterpret_cast<unsigned*>(counter), last);
      ptx::fence_acq_rel_gpu();
      cut.is_last_to_arrive = ticket == last;
    }
    sync_consumers<Traits>();  // the answer is there; the acquire covers the whole CTA
    if (!cut.is_last_to_arrive) continue;
    for_each_quad_of(rank, [&](int row, int dim) {
      if (!has_output<Traits>(params, cut.segment, row, dim)) return;
      constexpr int kAtOnce = 4;
      QuadState merged;
      LEANATTN_KEEP_ROLLED
      for (int first = 0; first < num_clusters; first += kAtOnce) {
        QuadState batch[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i >= num_clusters) continue;
          batch[i] = load_partial<Traits>(params, slot_of(first + i), row, dim);
        }
        merged.merge(batch);
      }
      write_quad<Traits>(params, cut.segment, row, dim, merged);
    });
  }
}

// By all consumer threads of all CTAs of the cluster, whether they had a segment or not.
template <class Traits>
__device__ __forceinline__ void cluster_fix_up(const DecodeParams& params, int unit,
                                               typename Traits::SharedStorage& smem) {
#if LEANATTN_ARCH >= 900
  auto cluster = cooperative_groups::this_cluster();
  // All partials are there. Warps that are done have left, which counts as arriving.
  cluster.barrier_wait(cluster.barrier_arrive());
  if (smem.num_cuts > 0) {
    const Segment& segment = smem.cuts[0].segment;
    const Participants& units = smem.cuts[0].units;
    const int rows =
        item_rows<Traits::kPlainItems>(params.problem, segment.sequence, segment.row_block);
    if (units.count() > params.cluster_size) {
      merge_clusters<Traits>(params, smem, unit, rows);
    } else {
      // They are the cluster's first ones. Each CTA merges a part of the rows and dims.
      constexpr int kQuads = Traits::kHeadDimV / 4;
      for (int i = (unit - units.first) * Traits::kConsumerThreads + threadIdx.x; i < rows * kQuads;
           i += units.count() * Traits::kConsumerThreads) {
        const int row = i / kQuads;
        const int dim = i % kQuads * 4;
        if (dim >= params.head_dim_v || !has_output<Traits>(params, segment, row, dim)) continue;
        write_quad<Traits>(params, segment, row, dim,
                           merge_cluster<Traits>(cluster, smem, units.count(), row, dim));
      }
    }
  }
  // Nobody leaves while others read its shared memory. A release would wait for the stores of out.
  ptx::cluster_sync_relaxed();
#endif
}

}  // namespace leanattn
