// The schedule on the host: where each unit starts, by a prefix sum over all sequences. The kernel
// does the same with a scan over its threads (cuda/kernel/locate.h).
#pragma once

#include <algorithm>
#include <vector>

#include "core/segment_walker.h"

namespace leanattn {

class HostLine {
 public:
  HostLine(const Problem& problem, int max_units) : problem_(problem) {
    Position position{0, first_query_row(problem), 0};
    for (; position.seq < problem.batch; ++position.seq) {
      positions_.push_back(position);
      const Sequence sequence = load_sequence(problem, position.seq, position.query_begin);
      position.line += problem.num_heads_kv * tiles_per_head(problem, sequence);
      position.query_begin = next_query_begin(problem, sequence);
    }
    query_end_ = position.query_begin;
    shares_ = make_shares(position.line, max_units);
  }

  const Shares& shares() const { return shares_; }
  int query_end() const { return query_end_; }

  Sequence sequence(int seq) const {
    return load_sequence(problem_, seq, positions_[seq].query_begin);
  }

  SegmentWalker walk(int unit) const {
    Position start{0, 0, 0};
    if (unit < shares_.num_units) {
      // The last sequence that begins at or before the unit's first tile: those without tiles begin
      // where the next one does.
      const int first = shares_.begin(unit);
      const auto after =
          std::upper_bound(positions_.begin(), positions_.end(), first,
                           [](int line, const Position& position) { return line < position.line; });
      start = *(after - 1);
    }
    const Sequence sequence = load_sequence(problem_, start.seq, start.query_begin);
    return SegmentWalker(problem_, shares_, unit, start, sequence);
  }

 private:
  const Problem& problem_;
  std::vector<Position> positions_;
  Shares shares_;
  int query_end_;
};

}  // namespace leanattn
