// How much global memory a launch needs beside its results, from what the host knows: the layout, and
// not the lengths. Pure arithmetic, no allocation.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace leanattn {

// In bytes, each part on a 256-byte boundary, in this order; 0 where nothing would use it.
struct WorkspacePlan {
  int64_t counters;  // where there are no others
  int64_t partial_stats;
  int64_t partial_o;
  int64_t fold_states;

  int64_t size() const { return counters + partial_stats + partial_o + fold_states; }
};

inline bool has_counter_per_item(const DecodeParams& p) {
  return !p.problem.cu_seqlens_q && num_items(p.problem) <= p.layout.num_units;
}

// See counter_index.
inline int num_counters(const DecodeParams& p) {
  if (!has_counter_per_item(p)) return p.layout.num_units;
  return num_items(p.problem) * (has_several_clusters(p) ? p.cluster_size : 1);
}

// Whether partials of cut items may go through global memory. Where teams take the items whatever the
// lengths are, a team of one unit cuts none, and a cluster merges in distributed shared memory.
inline bool may_leave_partials(const DecodeParams& p) {
  if (p.layout.num_units == 1) return false;
  const bool teams_for_sure = has_teams(p.layout) && (p.is_uniform || p.problem.batch == 1);
  return !teams_for_sure || p.layout.team_size > p.cluster_size;
}

inline WorkspacePlan plan_workspace(const DecodeParams& p, bool owns_counters, bool on_cuda) {
  const auto round_up = [](int64_t bytes) { return ceil_div<int64_t>(bytes, 256) * 256; };
  // Of all partials of all units.
  const int64_t rows = int64_t{p.layout.num_units} * 2 * p.max_nodes * p.problem.rows_per_item;
  WorkspacePlan plan{};
  if (may_leave_partials(p)) {
    plan.counters = owns_counters ? round_up(num_counters(p) * int64_t{sizeof(int32_t)}) : 0;
    plan.partial_stats = round_up(rows * 2 * int64_t{sizeof(float)});
    plan.partial_o = round_up(rows * p.head_dim_v * int64_t{sizeof(float)});
  }
  // The CPU has a stack of its own. Half as many levels as nodes, and one of two slots a unit.
  if (p.batch_invariant && on_cuda) {
    const int quads = padded_head_dim_v(kernel_head_dim(p)) / 4;
    plan.fold_states = rows / 4 * quads * int64_t{sizeof(SoftmaxState<4>)};
  }
  return plan;
}

}  // namespace leanattn
