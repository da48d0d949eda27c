// From checked arguments to DecodeParams: plans the layout, allocates, and hands over to the CPU
// implementation or to the launcher.
#include "decode.h"

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <string_view>
#include <vector>

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include "plan/cost_model.h"
#include "cpu/decode_cpu.h"
#include "decode_check.h"
#include "core/head_pairs.h"
#include "new_tensor.h"
#include "core/params.h"
#include "tensor_params.h"
#include "torch_parallel_for.h"
#include "core/tree_fold.h"
#include "value_checks.h"
#include "plan/workspace.h"
#ifdef LEANATTN_WITH_CUDA
#include "cuda/device_guard.h"
#include "cuda/launch.h"
#include "cuda_stream.h"
#endif

namespace leanattn {
namespace {

#define LEANATTN_PACK_ARGUMENTS                                                                 \
  DecodeArguments {                                                                             \
    q, k_cache, v_cache, cache_seqlens, block_table, cu_seqlens_q, max_seqlen_q, softmax_scale, \
        causal, window_left, window_right, softcap, alibi_slopes, sinks, k_scale, v_scale,      \
        batch_invariant, counters                                                               \
  }

// --- Parameters ----------------------------------------------------------------------------------

// Tokens that a sequence can hold. Lengths are int32, so more than that cannot be used.
int capacity_of(const DecodeArguments& a) {
  if (!a.block_table) return static_cast<int>(a.k_cache.size(1));
  if (a.k_cache.size(0) == 0) return 0;
  const int64_t max_pages = std::min(a.block_table->size(1), kMaxInt);
  return static_cast<int>(std::min(max_pages * a.k_cache.size(1), kMaxInt));
}

DecodeParams make_params(const DecodeArguments& a, const Tensor& out, const OptionalTensor& lse) {
  DecodeParams p{};
  const int64_t q_dims = a.q.dim();
  const bool ragged = a.cu_seqlens_q.has_value();
  p.element_type = element_type_of(a.q);
  p.cache_type = cache_type_of(a.k_cache);
  p.head_dim = static_cast<int>(a.q.size(q_dims - 1));
  p.head_dim_v = static_cast<int>(a.v_cache.size(3));
  p.num_heads_q = static_cast<int>(a.q.size(q_dims - 2));

  Problem& problem = p.problem;
  problem.cache_seqlens = int_data(a.cache_seqlens);
  problem.cache_seqlens_stride = a.cache_seqlens ? a.cache_seqlens->stride(0) : 0;
  problem.cu_seqlens_q = int_data(a.cu_seqlens_q);
  problem.cu_seqlens_q_stride = a.cu_seqlens_q ? a.cu_seqlens_q->stride(0) : 0;
  problem.batch = static_cast<int>(batch_of(a));
  problem.num_heads_kv = static_cast<int>(a.k_cache.size(2));
  problem.group_size = p.num_heads_q / problem.num_heads_kv;
  problem.seqlen_q = q_dims == 4 ? static_cast<int>(a.q.size(1)) : 1;
  problem.total_q = ragged ? static_cast<int>(a.q.size(0)) : 0;
  problem.capacity = capacity_of(a);
  problem.tile_tokens_log2 = tile_tokens_log2_for(std::max(p.head_dim, p.head_dim_v));
  problem.mask = make_mask(a.causal, a.window_left, a.window_right);

  // q, out and lse have no batch dimension with cu_seqlens_q, and no sequence dimension when 3-D
  // without it.
  const auto batch_stride = [&](const Tensor& t) { return ragged ? 0 : t.stride(0); };
  const auto seq_stride = [&](const Tensor& t) {
    return ragged ? t.stride(0) : q_dims == 4 ? t.stride(1) : 0;
  };
  p.q = a.q.const_data_ptr();
  p.q_batch_stride = batch_stride(a.q);
  p.q_seq_stride = seq_stride(a.q);
  p.q_head_stride = a.q.stride(q_dims - 2);
  p.q_dim_stride = a.q.stride(q_dims - 1);
  p.out = out.mutable_data_ptr();
  p.out_batch_stride = batch_stride(out);
  p.out_seq_stride = seq_stride(out);
  p.out_head_stride = out.stride(q_dims - 2);
  p.out_dim_stride = out.stride(q_dims - 1);
  if (lse) {
    p.lse = static_cast<float*>(lse->mutable_data_ptr());
    p.lse_batch_stride = batch_stride(*lse);
    p.lse_seq_stride = seq_stride(*lse);
    p.lse_head_stride = lse->stride(q_dims - 2);
  }
  p.k = a.k_cache.const_data_ptr();
  p.k_batch_stride = a.k_cache.stride(0);
  p.k_seq_stride = a.k_cache.stride(1);
  p.k_head_stride = a.k_cache.stride(2);
  p.k_dim_stride = a.k_cache.stride(3);
  p.v = a.v_cache.const_data_ptr();
  p.v_batch_stride = a.v_cache.stride(0);
  p.v_seq_stride = a.v_cache.stride(1);
  p.v_head_stride = a.v_cache.stride(2);
  p.v_dim_stride = a.v_cache.stride(3);
  p.values_in_keys = p.v == p.k && p.head_dim_v <= p.head_dim &&
                     p.v_batch_stride == p.k_batch_stride && p.v_seq_stride == p.k_seq_stride &&
                     p.v_head_stride == p.k_head_stride && p.v_dim_stride == p.k_dim_stride;
  p.block_table = int_data(a.block_table);
  if (a.block_table) {
    p.block_table_batch_stride = a.block_table->stride(0);
    p.block_table_page_stride = a.block_table->stride(1);
    p.num_pages = static_cast<int>(a.k_cache.size(0));
    p.page_size = static_cast<int>(a.k_cache.size(1));
  }

  p.batch_invariant = a.batch_invariant;
  const int64_t tiles = ceil_div<int64_t>(problem.capacity, 1 << problem.tile_tokens_log2);
  p.max_nodes = p.batch_invariant ? max_nodes(static_cast<int>(tiles)) : 1;

  p.k_scale = make_scales(a.k_scale);
  p.v_scale = make_scales(a.v_scale);
  p.softmax_scale = static_cast<float>(a.softmax_scale.value_or(1.0 / std::sqrt(p.head_dim)));
  p.softcap = static_cast<float>(a.softcap);
  p.alibi_slopes = float_data(a.alibi_slopes);
  if (a.alibi_slopes) {
    const bool per_sequence = a.alibi_slopes->dim() == 2;
    p.alibi_batch_stride = per_sequence ? a.alibi_slopes->stride(0) : 0;
    p.alibi_head_stride = a.alibi_slopes->stride(per_sequence ? 1 : 0);
  }
  p.sinks = float_data(a.sinks);
  p.sinks_stride = a.sinks ? a.sinks->stride(0) : 0;
  return p;
}

// The number that is all of `text`, the value of an environment variable or its end.
int forced_number(const Checker& check, const char* variable, std::string_view text) {
  int number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  check.require(
      error == std::errc{} && end == text.data() + text.size() && number >= 1 && number <= 65536,
      variable, "must hold a number from 1 to 65536, got '", text, "'");
  return number;
}

std::string_view environment(const char* variable) {
  const char* text = std::getenv(variable);
  return text ? text : "";
}

// LEANATTN_LAYOUT must not name another layout where `reason` leaves stream-K alone.
void check_stream_k(const Checker& check, const char* reason) {
  const std::string_view forced = environment("LEANATTN_LAYOUT");
  check.require(forced.empty() || forced == "stream_k", "LEANATTN_LAYOUT",
                "must be 'stream_k' or unset with ", reason, ", got '", forced, "'");
}

Layout stream_k_layout(const Checker& check, const Problem& problem, int available) {
  const std::string_view forced = environment("LEANATTN_NUM_UNITS");
  if (forced.empty()) {
    const int64_t units = std::clamp<int64_t>(max_tiles(problem), 1, available);
    return {static_cast<int>(units), 0, 1, 0, 0};
  }
  check_stream_k(check, "LEANATTN_NUM_UNITS");
  return {forced_number(check, "LEANATTN_NUM_UNITS", forced), 0, 1, 0, 0};
}

void set_rows_per_item(Problem& problem, int rows) {
  problem.rows_per_item = rows;
  problem.row_blocks = row_blocks_of(problem.seqlen_q, problem.group_size, rows);
}

void check_tiles(const Checker& check, const DecodeParams& p) {
  const Problem& problem = p.problem;
  check.require(max_tiles(problem) <= kMaxTiles, p.block_table ? "block_table" : "k_cache",
                "must hold at most ", kMaxTiles, " tiles of ", 1 << problem.tile_tokens_log2,
                " tokens over all heads, got ", max_tiles(problem));
}

// --- Workspace -----------------------------------------------------------------------------------

// What plan_workspace says, in one allocation; none where it says nothing.
struct Workspace {
  std::optional<Tensor> memory;
  bool has_counters;
};

Workspace make_workspace(const Checker& check, const DecodeArguments& a, DecodeParams& p) {
  p.counter_per_item = has_counter_per_item(p);
  if (a.counters) {
    const int64_t needed = may_leave_partials(p) ? num_counters(p) : 0;
    check.require(a.counters->numel() >= needed, "counters", "must have at least ", needed,
                  " elements for this call, got ", a.counters->numel());
    p.counters = static_cast<int32_t*>(a.counters->mutable_data_ptr());
  }
  const WorkspacePlan plan = plan_workspace(p, !a.counters, a.q.is_cuda());
  Workspace workspace{std::nullopt, plan.counters > 0};
  if (plan.size() == 0) return workspace;
  workspace.memory = empty_beside(a.q, {plan.size()}, ScalarType::Byte);
  char* next = static_cast<char*>(workspace.memory->mutable_data_ptr());
  const auto take = [&](int64_t bytes) -> void* {
    char* part = bytes > 0 ? next : nullptr;
    next += bytes;
    return part;
  };
  if (!a.counters) p.counters = static_cast<int32_t*>(take(plan.counters));
  p.partial_stats = static_cast<float*>(take(plan.partial_stats));
  p.partial_o = static_cast<float*>(take(plan.partial_o));
  p.fold_states = static_cast<SoftmaxState<4>*>(take(plan.fold_states));
  return workspace;
}

// --- Running -------------------------------------------------------------------------------------

void run_cpu(const Checker& check, const DecodeArguments& a, DecodeParams& p) {
  // As many rows as a query tile of the largest kernel: K is converted once for all of them.
  set_rows_per_item(p.problem, 64);
  check_tiles(check, p);
  p.layout = stream_k_layout(check, p.problem, static_cast<int>(torch::stable::get_num_threads()));
  const Workspace workspace = make_workspace(check, a, p);
  check_values(check, p, a.max_seqlen_q);
  decode_cpu(p, torch_parallel_for(1));
}

#ifdef LEANATTN_WITH_CUDA
// The items, taken to be as long as the cache where only the device knows their lengths.
Items items_of(const DecodeParams& p) {
  Problem problem = p.problem;
  problem.cache_seqlens = nullptr;
  const int tiles = tiles_per_head(problem, load_sequence(problem, 0, 0));
  const int64_t token_bytes = int64_t{p.head_dim + (p.values_in_keys ? 0 : p.head_dim_v)} *
                              (is_float8(p.cache_type) ? 1 : 2);
  return {num_items(problem), ceil_div<int>(tiles, max_of<int>(problem.row_blocks, 1)),
          static_cast<double>(token_bytes << problem.tile_tokens_log2),
          static_cast<double>(int64_t{problem.rows_per_item} * p.head_dim_v * 4)};
}

// The layout that LEANATTN_LAYOUT names, for tests and the sweep of bench/tune.py.
LayoutChoice forced_layout(const Checker& check, const DecodeParams& p, const Items& items,
                           const Machine& machine, std::string_view name) {
  if (name == "stream_k") return stream_k(items, machine);
  const bool clustered = name.starts_with("clusters:");
  check.require(clustered || name.starts_with("teams:"), "LEANATTN_LAYOUT",
                "must be 'stream_k', 'teams:N' or 'clusters:N', got '", name, "'");
  const int size = forced_number(check, "LEANATTN_LAYOUT", name.substr(name.find(':') + 1));
  check.require(!clustered || (size >= 2 && size <= kMaxClusterSize && machine.max_clusters[size]),
                "LEANATTN_LAYOUT", "must name clusters of 2 to ", kMaxClusterSize,
                " CTAs on a GPU that has them, got '", name, "'");
  check.require(!clustered || !p.batch_invariant, "LEANATTN_LAYOUT",
                "must not name clusters with batch_invariant, got '", name, "'");
  check.require(int64_t{items.count} * size <= kMaxInt, "LEANATTN_LAYOUT",
                "must ask for fewer than 2^31 units, got '", name, "'");
  LayoutChoice choice = teams(items, machine, size, clustered);
  choice.layout.slack_tiles = 1 << 30;  // whatever the lengths are
  return choice;
}

// Sets rows_per_item, for as many rows as a sequence has of a KV head, and the layout. Returns what the
// cost model says of it, us; 0 where there is no choice.
double plan(const Checker& check, DecodeParams& p, int64_t rows, int device) {
  Problem& problem = p.problem;
  set_rows_per_item(problem, rows_per_item_for(p, rows, device));
  check_tiles(check, p);
  Machine machine = machine_for(p, device);
  if (can_pair_heads(p, rows)) machine.bytes_per_us *= kShortRowSpeed;  // what pairs compete with
  double us = 0.0;
  p.is_uniform = !problem.cache_seqlens && !problem.cu_seqlens_q;
  p.layout = stream_k_layout(check, problem, machine.num_sms);
  if (problem.cu_seqlens_q) {
    check_stream_k(check, "cu_seqlens_q");  // teams need as many items in every sequence
  } else if (environment("LEANATTN_NUM_UNITS").empty()) {
    const Items items = items_of(p);
    const std::string_view forced = environment("LEANATTN_LAYOUT");
    Machine choosable = machine;
    if (p.batch_invariant) choosable.max_clusters = {};  // a fixed tree is not folded in clusters
    LayoutChoice choice = forced.empty() ? choose_layout(items, choosable)
                                         : forced_layout(check, p, items, machine, forced);
    if (has_teams(choice.layout) && !p.is_uniform && problem.batch > 1) {
      // The device may fall back on stream-K, which wants all SMs.
      const int size = choice.layout.team_size;
      const int fit = choice.is_clustered ? machine.max_clusters[size] : machine.num_sms / size;
      choice.layout.num_units = max_of(choice.layout.num_units, fit * size);
    }
    p.layout = choice.layout;
    p.is_clustered = choice.is_clustered;
    us = choice.us;
  }
  return us;
}

// The same, with pairs of heads where they can be and are expected to be no slower; and the line of the
// layout that it came to.
void plan_with_pairs(const Checker& check, DecodeParams& p, int64_t rows, int device) {
  const std::string_view forced = environment("LEANATTN_HEAD_PAIRS");
  check.require(forced.empty() || forced == "0" || forced == "1", "LEANATTN_HEAD_PAIRS",
                "must be '0', '1' or unset, got '", forced, "'");
  const double us = plan(check, p, rows, device);
  // By themselves not on older GPUs: what short rows cost is known of an H200 alone, and the smaller ones
  // have little shared memory for long rows.
  const bool wanted = forced.empty() ? device_limits(device).capability >= 90 : forced == "1";
  if (wanted && can_pair_heads(p, rows)) {
    DecodeParams pairs = pair_heads(p);
    const double pairs_us = plan(check, pairs, 2 * rows, device);
    if (forced == "1" || pairs_us <= us) p = pairs;
  }
  if (p.is_uniform) p.uniform = make_uniform_line(p.problem, p.layout.num_units);
}

void run_cuda(const Checker& check, const DecodeArguments& a, DecodeParams& p) {
  const int device = a.q.get_device_index();
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_cuda_stream(device);
  Problem& problem = p.problem;
  int64_t rows = int64_t{problem.seqlen_q} * problem.group_size;
  if (problem.cu_seqlens_q) {
    // What a sequence has on average; the lengths themselves are on the device.
    rows = ceil_div<int64_t>(problem.total_q, std::max(problem.batch, 1)) * problem.group_size;
  }
  // Batch-invariant: by the model alone, not by the queries.
  if (p.batch_invariant) rows = std::min<int64_t>(problem.group_size, kFoldRows);
  plan_with_pairs(check, p, rows, device);
  const Workspace workspace = make_workspace(check, a, p);
  if (value_checks_wanted()) check_values_on_device(check, p, a.max_seqlen_q, stream);
  launch_decode(p, num_counters(p), workspace.has_counters, device, stream);
}
#endif

void run(const Checker& check, const DecodeArguments& a, const Tensor& out,
         const OptionalTensor& lse) {
  if (out.numel() == 0) return;
  DecodeParams params = make_params(a, out, lse);
  if (a.q.is_cpu()) return run_cpu(check, a, params);
#ifdef LEANATTN_WITH_CUDA
  run_cuda(check, a, params);
#endif
}

Tensor empty_like_query(const DecodeArguments& a, int64_t last, bool with_last, ScalarType type) {
  std::vector<int64_t> shape(a.q.sizes().begin(), a.q.sizes().end());
  if (with_last) {
    shape.back() = last;
  } else {
    shape.pop_back();
  }
  return empty_beside(a.q, shape, type);
}

Tensor make_out(const DecodeArguments& a) {
  return empty_like_query(a, a.v_cache.size(3), true, a.q.scalar_type());
}

Tensor make_lse(const DecodeArguments& a) {
  return empty_like_query(a, 0, false, ScalarType::Float);
}

}  // namespace

Tensor decode(LEANATTN_DECODE_ARGUMENTS) {
  const Checker check("decode");
  const DecodeArguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  const Tensor out = make_out(arguments);
  run(check, arguments, out, std::nullopt);
  return out;
}

std::tuple<Tensor, Tensor> decode_with_lse(LEANATTN_DECODE_ARGUMENTS) {
  const Checker check("decode_with_lse");
  const DecodeArguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  const Tensor out = make_out(arguments);
  const Tensor lse = make_lse(arguments);
  run(check, arguments, out, lse);
  return {out, lse};
}

void decode_out(LEANATTN_DECODE_ARGUMENTS, Tensor out) {
  const Checker check("decode_out");
  const DecodeArguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  check_out(check, arguments, out, std::nullopt);
  run(check, arguments, out, std::nullopt);
}

void decode_with_lse_out(LEANATTN_DECODE_ARGUMENTS, Tensor out, Tensor lse) {
  const Checker check("decode_with_lse_out");
  const DecodeArguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  check_out(check, arguments, out, lse);
  run(check, arguments, out, lse);
}

void decode_check(LEANATTN_DECODE_ARGUMENTS, OptionalTensor out) {
  const Checker check("decode");
  const DecodeArguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  if (out) check_out(check, arguments, *out, std::nullopt);
#ifdef LEANATTN_WITH_CUDA
  if (!arguments.q.is_cuda()) return;
  const int device = arguments.q.get_device_index();
  const DeviceGuard guard(device);
  DecodeParams params{};  // all that the choice of a kernel depends on
  params.cache_type = cache_type_of(arguments.k_cache);
  params.head_dim = static_cast<int>(arguments.k_cache.size(3));
  params.head_dim_v = static_cast<int>(arguments.v_cache.size(3));
  params.batch_invariant = arguments.batch_invariant;
  rows_per_item_for(params, 1, device);  // throws where none has room
#endif
}

}  // namespace leanattn
