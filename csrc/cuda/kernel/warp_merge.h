// Merges the states of a CTA's consumer warps, through shared memory: every warp has seen other
// tokens of the same item. Result: each thread holds whole states of some rows and dims.
#pragma once

#include "mainloop_keys.h"
#include "mainloop_wide_rows.h"
#include "output.h"

namespace leanattn {

template <class Traits>
__device__ __forceinline__ typename Traits::MergeMemory& merge_memory(
    typename Traits::SharedStorage& smem) {
  if constexpr (Traits::kMergesInQuery) {
    static_assert(Traits::kTasks == 1 &&
                  sizeof(smem.tasks[0].q) >= sizeof(typename Traits::MergeMemory));
    return *reinterpret_cast<typename Traits::MergeMemory*>(smem.tasks[0].q);
  } else {
    return smem.merge;
  }
}

// Puts 8 rows of the warp's row group, its step n, into the merge's memory; but for rows that the item does not
// have, which nobody reads.
template <class Traits>
__device__ __forceinline__ void store_for_merge(typename Traits::MergeMemory& merge,
                                                const WarpPlace<Traits>& place,
                                                const WarpState<Traits>& state, int n,
                                                int num_rows) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int row = place.row_group % Traits::kMergeGroups * 8 + place.t * 2 + c;
    if (place.row(n, c) >= num_rows) continue;
    if (place.g == 0 && place.dim_group == 0) {
      merge.max[place.slice][row] = state.max[n][c];
      merge.sum[place.slice][row] = state.sum[n][c];
    }
#pragma unroll
    for (int j = 0; j < Traits::kDimSteps; ++j) {
      merge.o[place.slice][row][place.dim(j, 0)] = state.o[j][n][c];
      merge.o[place.slice][row][place.dim(j, 1)] = state.o[j][n][c + 2];
    }
  }
}

template <class Traits>
__device__ __forceinline__ void store_for_merge(typename Traits::MergeMemory& merge,
                                                const WarpgroupPlace<Traits>& place,
                                                const WarpgroupState<Traits>& state, int n,
                                                int num_rows) {
  if (place.row(n) >= num_rows) return;
  const int row = place.row_group % Traits::kMergeGroups * 8 + place.g;
  if (place.t == 0 && place.dim_group == 0) {
    merge.max[place.slice][row] = state.max[n];
    merge.sum[place.slice][row] = state.sum[n];
  }
#pragma unroll
  for (int j = 0; j < Traits::kWarpDim / 8; ++j) {
    const int dim = place.dim_group * Traits::kWarpDim + j * 8 + place.t * 2;
    *reinterpret_cast<float2*>(&merge.o[place.slice][row][dim]) =
        float2{state.o[j][n * 2], state.o[j][n * 2 + 1]};
  }
}

template <class Traits>
__device__ __forceinline__ void store_for_merge(typename Traits::MergeMemory& merge,
                                                const KeysPlace<Traits>& place,
                                                const KeysState<Traits>& state, int n,
                                                int num_rows) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    if (place.row(n, c) >= num_rows) continue;
    const int row = place.t * 2 + c;
    if (place.g == 0 && place.warp == 0) {
      merge.max[place.slice][row] = state.max[n][c];
      merge.sum[place.slice][row] = state.sum[n][c];
    }
#pragma unroll
    for (int m = 0; m < KeysState<Traits>::kDimBlocks; ++m) {
      merge.o[place.slice][row][place.dim(m, 0)] = state.o[m][n][c];
      merge.o[place.slice][row][place.dim(m, 1)] = state.o[m][n][c + 2];
    }
  }
}

// Calls visit(row, dim, state) for every row of the item and every fourth element of Dv. Eight rows
// of kMergeGroups row groups at a time.
template <class Traits, class Place, class State, class Visit>
__device__ __forceinline__ void merge_warps(typename Traits::SharedStorage& smem,
                                            const Place& place, const State& state, int num_rows,
                                            int head_dim_v, Visit visit) {
  auto& merge = merge_memory<Traits>(smem);
#pragma unroll
  for (int n = 0; n < Traits::kRowSteps; ++n) {
    LEANATTN_KEEP_ROLLED
    for (int group = 0; group < Traits::kRowGroups; group += Traits::kMergeGroups) {
      if (group * Traits::kWarpRows + n * 8 >= num_rows) break;
      sync_consumers<Traits>();  // the main loop is done, and the visits of the rows before
      if (place.row_group / Traits::kMergeGroups * Traits::kMergeGroups == group) {
        store_for_merge<Traits>(merge, place, state, n, num_rows);
      }
      sync_consumers<Traits>();  // every warp's rows are there
      for_each_quad<Traits>(0, Traits::kMergeRows, head_dim_v, [&](int merge_row, int dim) {
        const int row = (group + merge_row / 8) * Traits::kWarpRows + n * 8 + merge_row % 8;
        if (row >= num_rows) return;
        QuadState slices[Traits::kSlices];
#pragma unroll
        for (int slice = 0; slice < Traits::kSlices; ++slice) {
          slices[slice] =
              make_quad_state(float2{merge.max[slice][merge_row], merge.sum[slice][merge_row]},
                              *reinterpret_cast<const float4*>(&merge.o[slice][merge_row][dim]));
        }
        QuadState merged;
        merged.merge(slices);
        visit(row, dim, merged);
      });
    }
  }
}

}  // namespace leanattn
