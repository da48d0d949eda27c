// Batch-invariant decode: every tile's states are merged over the warps and then folded into the
// item's fixed tree (tree_fold.h), by the thread that holds those four elements of that row. States
// that wait for their sibling lie in shared memory for the low levels, which come up all the time,
// and in the workspace for the high ones.
#pragma once

#include "core/tree_fold.h"
#include "fixup.h"

namespace leanattn {

// The waiting states of one unit.
template <class Traits>
struct FoldMemory {
  QuadState* near_smem;  // [near_levels, kRows, kHeadDimV / 4]
  QuadState* far;  // [max_nodes / 2, kRows, kHeadDimV / 4]; the first near_levels are not used
  int near_levels;

  // The states of four elements of a row, one a level.
  struct Stack {
    QuadState* near_smem;
    QuadState* far;
    int near_levels;

    __device__ __forceinline__ QuadState& at(int level) {
      return (level < near_levels ? near_smem : far)[level * Traits::kFoldLevelStates];
    }
    __device__ __forceinline__ QuadState load(int level) { return at(level); }
    __device__ __forceinline__ void store(int level, const QuadState& state) { at(level) = state; }
  };

  __device__ __forceinline__ Stack stack(int row, int dim) const {
    const int quad = row * (Traits::kHeadDimV / 4) + dim / 4;
    return {near_smem + quad, far + quad, near_levels};
  }
};

// The shared part lies behind the ring.
template <class Traits>
__device__ __forceinline__ FoldMemory<Traits> fold_memory(const DecodeParams& params, int unit,
                                                          const RoomPlan& room,
                                                          typename Traits::SharedStorage& smem) {
  uint8_t* behind_ring = reinterpret_cast<uint8_t*>(&smem) + Traits::kRingOffset +
                         room.num_stages * Traits::kStageBytes;
  return {reinterpret_cast<QuadState*>(behind_ring),
          params.fold_states + int64_t{unit} * (params.max_nodes / 2) * Traits::kFoldLevelStates,
          room.fold_levels};
}

// By all consumer threads of the unit that came last: folds the partials of all units, which are nodes
// of the tree, up to its root.
template <class Traits>
__device__ __forceinline__ void fold_partials(const DecodeParams& params, const Segment& segment,
                                              const Participants& units, const Shares& shares,
                                              const FoldMemory<Traits>& memory) {
  constexpr int kInFlight = 8;  // partials that a thread loads at once
  const int rows = item_rows(params.problem, segment.sequence, segment.row_block);
  for_each_quad<Traits>(0, rows, params.head_dim_v, [&](int row, int dim) {
    auto stack = memory.stack(row, dim);
    const auto emit = [&](const TreeNode&, const QuadState& state) {
      write_quad<Traits>(params, segment, row, dim, state);
    };
    int unit = units.first;
    int index = 0;
    TileRange own = tiles_of_unit(shares, segment, unit);
    int64_t at = own.begin;
    while (unit <= units.last) {
      TreeNode nodes[kInFlight];
      QuadState states[kInFlight];
      int count = 0;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (unit > units.last) continue;
        nodes[i] = next_node(segment.item, own.begin, own.end, at);
        states[i] =
            load_partial<Traits>(params, partial_index(params, units.slot(unit), index), row, dim);
        count = i + 1;
        at = nodes[i].end();
        ++index;
        if (at >= own.end && ++unit <= units.last) {
          own = tiles_of_unit(shares, segment, unit);
          at = own.begin;
          index = 0;
        }
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (i < count)
          fold_node(segment.item, segment.item.begin, nodes[i], states[i], stack, emit);
      }
    }
  });
}

}  // namespace leanattn
