#include "schedule_op.h"

#include <limits>
#include <utility>
#include <vector>

#include "new_tensor.h"
#include "plan/schedule_host.h"

namespace leanattn {
namespace {

constexpr int kColumns = 10;

void append_row(std::vector<int64_t>& table, const Shares& shares, const Segment& s, int unit) {
  const Participants units = participants(shares, s);
  const int64_t row[kColumns] = {unit,       s.seq,        s.head,     s.row_block, s.tile_begin,
                                 s.tile_end, s.item.begin, s.item.end, units.first, units.last};
  table.insert(table.end(), row, row + kColumns);
}

}  // namespace

Tensor schedule(Tensor cache_seqlens, int64_t num_heads_kv, int64_t group_size, int64_t capacity,
                int64_t head_dim, int64_t num_units, int64_t rows_per_item, int64_t seqlen_q,
                OptionalTensor cu_seqlens_q, bool causal, int64_t window_left,
                int64_t window_right) {
  const Checker check("schedule");
  constexpr int64_t kMax = std::numeric_limits<int>::max();
  const auto in_range = [&](int64_t value, const char* name, int64_t low, int64_t high) {
    check.require(low <= value && value <= high, name, "must be from ", low, " to ", high, ", got ",
                  value);
    return static_cast<int>(value);
  };
  check.require(cache_seqlens.is_cpu(), "cache_seqlens", "must be on the CPU, got ",
                device_of(cache_seqlens));
  check.dtype(cache_seqlens, "cache_seqlens", ScalarType::Int);
  check.require(cache_seqlens.dim() == 1, "cache_seqlens", "must be [batch], got shape ",
                shape_of(cache_seqlens));
  const int64_t batch = cache_seqlens.size(0);
  Problem problem{};
  problem.cache_seqlens = static_cast<const int32_t*>(cache_seqlens.const_data_ptr());
  problem.cache_seqlens_stride = cache_seqlens.stride(0);
  if (cu_seqlens_q) {
    check.same_device(*cu_seqlens_q, "cu_seqlens_q", cache_seqlens);
    check.dtype(*cu_seqlens_q, "cu_seqlens_q", ScalarType::Int);
    check.shape(*cu_seqlens_q, "cu_seqlens_q", "[batch + 1]", {batch + 1});
    problem.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q->const_data_ptr());
    problem.cu_seqlens_q_stride = cu_seqlens_q->stride(0);
    problem.total_q = std::max(0, problem.cu_seqlens_q[batch * problem.cu_seqlens_q_stride]);
  }
  problem.batch = in_range(batch, "cache_seqlens", 0, kMax);
  problem.num_heads_kv = in_range(num_heads_kv, "num_heads_kv", 1, kMax);
  problem.group_size = in_range(group_size, "group_size", 1, kMax);
  problem.seqlen_q = in_range(seqlen_q, "seqlen_q", 0, kMax);
  // As decode does: rows are counted in int.
  const int64_t queries = cu_seqlens_q ? problem.total_q : seqlen_q;
  check.require(queries * group_size <= kMax, "group_size", "times ", queries,
                " queries must be at most ", kMax, " rows, got ", queries * group_size);
  problem.capacity = in_range(capacity, "capacity", 0, kMax);
  // As kernels by wgmma have it.
  const bool is_wide = in_range(head_dim, "head_dim", 8, kMaxHeadDim) > 256;
  problem.tile_tokens_log2 = is_wide ? kWideTileTokensLog2 : tile_tokens_log2_for(head_dim);
  problem.rows_per_item = in_range(rows_per_item, "rows_per_item", 1, kMax);
  problem.row_blocks = row_blocks_of(problem.seqlen_q, problem.group_size, problem.rows_per_item);
  check.require(!causal || window_right <= 0, "window_right",
                "must be -1 or 0 when causal is True, got ", window_right);
  for (const auto& [size, name] :
       {std::pair{window_left, "window_left"}, {window_right, "window_right"}}) {
    check.require(size >= -1, name, "must be >= -1 (-1 is no limit), got ", size);
  }
  problem.mask = make_mask(causal, window_left, window_right);
  check.require(max_tiles(problem) <= kMaxTiles, "cache_seqlens", "may hold at most ", kMaxTiles,
                " tiles over all heads, got room for ", max_tiles(problem));

  const HostLine line(problem, in_range(num_units, "num_units", 1, 65536));
  std::vector<int64_t> table;
  for (int unit = 0; unit < line.shares().num_units; ++unit) {
    SegmentWalker walker = line.walk(unit);
    for (Segment segment; walker.next(segment);) append_row(table, line.shares(), segment, unit);
  }
  const int64_t rows = static_cast<int64_t>(table.size()) / kColumns;
  const Tensor out = empty_beside(cache_seqlens, {rows, kColumns}, ScalarType::Long);
  std::copy(table.begin(), table.end(), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace leanattn
