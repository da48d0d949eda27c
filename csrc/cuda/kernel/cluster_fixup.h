// The fixup inside a cluster: its CTAs have shared one item out among them and merge their partials
// through distributed shared memory. They run together, so one barrier takes the place of tickets.
#pragma once

#include <cooperative_groups.h>

#include "output.h"
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

// By all consumer threads of all CTAs of the cluster, whether they had a segment or not. Each CTA
// merges a part of the rows and dims, in the order of the units.
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
    constexpr int kQuads = Traits::kHeadDimV / 4;
    const int num_quads =
        item_rows<Traits::kPlainItems>(params.problem, segment.sequence, segment.row_block) *
        kQuads;
    const int step = units.count() * Traits::kConsumerThreads;
    for (int i = (unit - units.first) * Traits::kConsumerThreads + threadIdx.x; i < num_quads;
         i += step) {
      const int row = i / kQuads;
      const int dim = i % kQuads * 4;
      if (dim >= params.head_dim_v || !has_output<Traits>(params, segment, row, dim)) continue;
      QuadState states[kMaxClusterSize];
#pragma unroll
      for (int rank = 0; rank < kMaxClusterSize; ++rank) {
        if (rank >= units.count()) continue;
        const auto* partial = cluster.map_shared_rank(&cluster_partial<Traits>(smem), rank);
        const float4 o = *reinterpret_cast<const float4*>(&partial->o[row][dim]);
        states[rank] = make_quad_state(partial->stats[row], o);
      }
      QuadState merged;
      merged.merge(states);
      write_quad<Traits>(params, segment, row, dim, merged);
    }
  }
  // Nobody leaves while others read its shared memory. A release would wait for the stores of out.
  ptx::cluster_sync_relaxed();
#endif
}

}  // namespace leanattn
