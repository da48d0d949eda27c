#include "plan_decode.h"

#include <algorithm>
#include <string_view>

#include "knobs.h"
#include "pair_heads.h"
#include "plan_error.h"

namespace leanattn {
namespace {

// LEANATTN_LAYOUT must not name another layout where `reason` leaves stream-K alone.
void check_stream_k(const char* reason) {
  const std::string_view forced = knob("LEANATTN_LAYOUT");
  if (forced.empty() || forced == "stream_k") return;
  throw PlanError("LEANATTN_LAYOUT", "must be 'stream_k' or unset with ", reason, ", got '", forced,
                  "'");
}

Layout stream_k_layout(const Problem& problem, int available) {
  const std::string_view forced = knob("LEANATTN_NUM_UNITS");
  if (forced.empty()) {
    const int64_t units = std::clamp<int64_t>(max_tiles(problem), 1, available);
    return {static_cast<int>(units), 0, 1, 1, 0, 0, 1};
  }
  check_stream_k("LEANATTN_NUM_UNITS");
  return {knob_number("LEANATTN_NUM_UNITS", forced), 0, 1, 1, 0, 0, 1};
}

void set_rows_per_item(DecodeParams& p, int rows) {
  Problem& problem = p.problem;
  problem.rows_per_item = rows;
  problem.row_blocks = row_blocks_of(problem.seqlen_q, problem.group_size, rows);
  if (max_tiles(problem) <= kMaxTiles) return;
  throw PlanError(p.block_table ? "block_table" : "k_cache", "must hold at most ", kMaxTiles,
                  " tiles of ", 1 << problem.tile_tokens_log2, " tokens over all heads, got ",
                  max_tiles(problem));
}

// The items, taken to be as long as the cache where only the device knows their lengths.
Items items_of(const DecodeParams& p) {
  Problem problem = p.problem;
  problem.cache_seqlens = nullptr;
  const int tiles = tiles_per_head(problem, load_sequence(problem, 0, 0));
  const int64_t token_bytes = int64_t{p.head_dim + (p.values_in_keys ? 0 : p.head_dim_v)} *
                              (is_float8(p.cache_type) ? 1 : 2);
  Items items{num_items(problem), ceil_div<int>(tiles, max_of<int>(problem.row_blocks, 1)),
              problem.rows_per_item, static_cast<double>(token_bytes << problem.tile_tokens_log2),
              static_cast<double>(int64_t{problem.rows_per_item} * p.head_dim_v * 4)};
  if (kernel_head_dim(p) == kMaxHeadDim) items.copy_bytes_per_us = kWideBytesPerUs;
  if (p.block_table) {
    const double of_pages = page_bytes_per_us(p.page_size, 1 << problem.tile_tokens_log2);
    items.copy_bytes_per_us = std::min(items.copy_bytes_per_us, of_pages);
  }
  return items;
}

// The layout that LEANATTN_LAYOUT names, for tests and the sweep of bench/tune.py.
LayoutChoice forced_layout(const DecodeParams& p, const Items& items, const Machine& machine,
                           std::string_view name) {
  if (name == "stream_k") return stream_k(items, machine);
  const auto require = [&](bool condition, const auto&... text) {
    if (!condition) throw PlanError("LEANATTN_LAYOUT", text..., ", got '", name, "'");
  };
  const bool clustered = name.starts_with("clusters:");
  require(clustered || name.starts_with("teams:"),
          "must be 'stream_k', 'teams:N', 'clusters:N' or 'clusters:N*M'");
  std::string_view numbers = name.substr(name.find(':') + 1);
  int num_clusters = 1;
  if (const size_t star = numbers.find('*'); clustered && star != numbers.npos) {
    num_clusters = knob_number("LEANATTN_LAYOUT", numbers.substr(star + 1));
    numbers = numbers.substr(0, star);
  }
  const int size = knob_number("LEANATTN_LAYOUT", numbers);
  require(!clustered || (size >= 2 && size <= kMaxClusterSize && machine.max_clusters[size]),
          "must name clusters of 2 to ", kMaxClusterSize, " CTAs on a GPU that has them");
  require(!clustered || !p.batch_invariant, "must not name clusters with batch_invariant");
  require(int64_t{items.count} * size * num_clusters <= INT32_MAX,
          "must ask for fewer than 2^31 units");
  LayoutChoice choice =
      clustered ? teams(items, machine, size, num_clusters) : teams(items, machine, 1, size);
  choice.layout.slack_tiles = 1 << 30;  // whatever the lengths are
  return choice;
}

// Sets rows_per_item, for as many rows as a sequence has of a KV head, and the layout. Returns what the
// cost model says of it, us; 0 where there is no choice.
double plan_layout(DecodeParams& p, int64_t rows, const Device& device) {
  Problem& problem = p.problem;
  const ItemShape shape = device.item_shape(p, rows);
  problem.tile_tokens_log2 = shape.tile_tokens_log2;
  set_rows_per_item(p, shape.rows);
  Machine machine = device.machine(p);
  if (can_pair_heads(p, rows)) machine.bytes_per_us *= kShortRowSpeed;  // what pairs compete with
  double us = 0.0;
  p.is_uniform = !problem.cache_seqlens && !problem.cu_seqlens_q;
  p.layout = stream_k_layout(problem, machine.num_sms);
  p.cluster_size = 1;
  if (problem.cu_seqlens_q) {
    check_stream_k("cu_seqlens_q");  // teams need as many items in every sequence
  } else if (knob("LEANATTN_NUM_UNITS").empty()) {
    const Items items = items_of(p);
    const std::string_view forced = knob("LEANATTN_LAYOUT");
    Machine choosable = machine;
    if (p.batch_invariant) choosable.max_clusters = {};  // a fixed tree is not folded in clusters
    LayoutChoice choice =
        forced.empty() ? choose_layout(items, choosable) : forced_layout(p, items, machine, forced);
    if (has_teams(choice.layout) && !p.is_uniform && problem.batch > 1) {
      // The device may fall back on stream-K, which wants all SMs.
      const int size = choice.layout.team_size;
      const int clusters =
          choice.cluster_size > 1 ? machine.max_clusters[choice.cluster_size] : machine.num_sms;
      const int fit = clusters / (size / choice.cluster_size);
      choice.layout.team_slots = max_of(choice.layout.num_teams, fit);
      choice.layout.num_units = choice.layout.team_slots * size;
    }
    p.layout = choice.layout;
    p.cluster_size = choice.cluster_size;
    us = choice.us;
  }
  return us;
}

// Packed query rows that a sequence has of a KV head.
int64_t rows_of(const DecodeParams& p) {
  const Problem& problem = p.problem;
  // Batch-invariant: by the model alone, not by the queries.
  if (p.batch_invariant) return std::min<int64_t>(problem.group_size, kFoldRows);
  if (problem.cu_seqlens_q) {
    // What a sequence has on average; the lengths themselves are on the device.
    return ceil_div<int64_t>(problem.total_q, std::max(problem.batch, 1)) * problem.group_size;
  }
  return int64_t{problem.seqlen_q} * problem.group_size;
}

}  // namespace

void plan_decode(DecodeParams& p, const Device& device) {
  const std::string_view forced = knob("LEANATTN_HEAD_PAIRS");
  if (!forced.empty() && forced != "0" && forced != "1") {
    throw PlanError("LEANATTN_HEAD_PAIRS", "must be '0', '1' or unset, got '", forced, "'");
  }
  const int64_t rows = rows_of(p);
  const double us = plan_layout(p, rows, device);
  // By themselves not on older GPUs: what short rows cost is known of an H200 alone, and the smaller ones
  // have little shared memory for long rows.
  const bool wanted = forced.empty() ? device.capability() >= 90 : forced == "1";
  if (wanted && can_pair_heads(p, rows)) {
    DecodeParams pairs = pair_heads(p);
    const double pairs_us = plan_layout(pairs, 2 * rows, device);
    if (forced == "1" || pairs_us <= us) p = pairs;
  }
  if (p.is_uniform) p.uniform = make_uniform_line(p.problem, p.layout.num_units);
}

void plan_decode_on_cpu(DecodeParams& p, int num_threads) {
  // As many rows as a query tile of the largest kernel: K is converted once for all of them.
  set_rows_per_item(p, 64);
  p.layout = stream_k_layout(p.problem, num_threads);
  p.cluster_size = 1;
}

}  // namespace leanattn
