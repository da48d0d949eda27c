// From tensors to DecodeParams: checks everything that the host can see, allocates, and hands over to
// the CPU implementation or to the launcher.
#include "decode.h"

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string_view>
#include <vector>

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include "cost_model.h"
#include "cpu/decode_cpu.h"
#include "params.h"
#include "torch_parallel_for.h"
#include "tree_fold.h"
#include "value_checks.h"
#ifdef LEANATTN_WITH_CUDA
#include "cuda/device_guard.h"
#include "cuda/launch.h"
#include "cuda_stream.h"
#endif

namespace leanattn {
namespace {

struct Arguments {
  Tensor q, k_cache, v_cache;
  OptionalTensor cache_seqlens, block_table, cu_seqlens_q;
  std::optional<int64_t> max_seqlen_q;
  std::optional<double> softmax_scale;
  bool causal;
  int64_t window_left, window_right;
  double softcap;
  OptionalTensor alibi_slopes, sinks, k_scale, v_scale;
  bool batch_invariant;
  OptionalTensor counters;
};

#define LEANATTN_PACK_ARGUMENTS                                                                 \
  Arguments {                                                                                   \
    q, k_cache, v_cache, cache_seqlens, block_table, cu_seqlens_q, max_seqlen_q, softmax_scale, \
        causal, window_left, window_right, softcap, alibi_slopes, sinks, k_scale, v_scale,      \
        batch_invariant, counters                                                               \
  }

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();
constexpr int64_t kMaxHeadDim = 256;

// --- Checks --------------------------------------------------------------------------------------

// Sequences. With cu_seqlens_q, q does not tell.
int64_t batch_of(const Arguments& a) {
  return a.block_table ? a.block_table->size(0) : a.k_cache.size(0);
}

void check_not_built(const Checker& check, const Arguments& a) {
  check.require(!a.k_scale, "k_scale", "is not supported yet: got a tensor; allowed is None");
  check.require(!a.v_scale, "v_scale", "is not supported yet: got a tensor; allowed is None");
}

ElementType check_dtypes(const Checker& check, const Arguments& a) {
  const ScalarType type = a.q.scalar_type();
  const bool sixteen_bit = type == ScalarType::Half || type == ScalarType::BFloat16;
  check.require(sixteen_bit || (type == ScalarType::Float && a.q.is_cpu()), "q",
                "must be Half or BFloat16 (Float too on the CPU), got ", toString(type), " on ",
                device_string(a.q));
  const auto cache = [&](const Tensor& t, const char* name) {
    const ScalarType got = t.scalar_type();
    check.require(got != ScalarType::Float8_e4m3fn && got != ScalarType::Float8_e5m2, name,
                  "of dtype ", toString(got), " is not supported yet; allowed is q's dtype, ",
                  toString(type));
    check.dtype(t, name, type);
  };
  cache(a.k_cache, "k_cache");
  cache(a.v_cache, "v_cache");
  if (type == ScalarType::Float) return ElementType::kFloat32;
  return type == ScalarType::Half ? ElementType::kFloat16 : ElementType::kBFloat16;
}

void check_devices(const Checker& check, const Arguments& a) {
  check.supported_device(a.q, "q");
  check.same_device(a.k_cache, "k_cache", a.q);
  check.same_device(a.v_cache, "v_cache", a.q);
  const auto optional = [&](const OptionalTensor& t, const char* name) {
    if (t) check.same_device(*t, name, a.q);
  };
  optional(a.cache_seqlens, "cache_seqlens");
  optional(a.block_table, "block_table");
  optional(a.cu_seqlens_q, "cu_seqlens_q");
  optional(a.alibi_slopes, "alibi_slopes");
  optional(a.sinks, "sinks");
  optional(a.counters, "counters");
}

void check_head_dim(const Checker& check, const char* name, int64_t head_dim) {
  check.require(head_dim <= kMaxHeadDim, name, "has head dim ", head_dim,
                ", which is not supported yet; allowed are multiples of 8 from 8 to ", kMaxHeadDim);
  check.require(head_dim >= 8 && head_dim % 8 == 0, name, "has head dim ", head_dim,
                "; allowed are multiples of 8 from 8 to ", kMaxHeadDim);
}

void check_block_table(const Checker& check, const Arguments& a) {
  const Tensor& table = *a.block_table;
  check.dtype(table, "block_table", ScalarType::Int);
  check.require(table.dim() == 2, "block_table", "must be [batch, max_pages], got shape ",
                shape_string(table));
  check.require(table.size(0) <= kMaxInt, "block_table",
                "must have fewer than 2^31 rows, got shape ", shape_string(table));
  check.require(a.k_cache.size(1) >= 1, "k_cache",
                "must have pages of at least 1 token with block_table, got shape ",
                shape_string(a.k_cache));
}

void check_shapes(const Checker& check, const Arguments& a) {
  const int64_t q_dims = a.q.dim();
  if (a.cu_seqlens_q) {
    check.require(q_dims == 3, "q",
                  "must be [total_q, num_heads_q, head_dim] with cu_seqlens_q, got shape ",
                  shape_string(a.q));
  } else {
    check.require(q_dims == 3 || q_dims == 4, "q",
                  "must be [batch, seqlen_q, num_heads_q, head_dim] or [batch, num_heads_q, "
                  "head_dim], got shape ",
                  shape_string(a.q));
  }
  const char* rows = a.block_table ? "[num_pages, page_size" : "[batch, seqlen";
  check.require(a.k_cache.dim() == 4, "k_cache", "must be ", rows,
                ", num_heads_kv, head_dim], got shape ", shape_string(a.k_cache));
  check.require(a.v_cache.dim() == 4, "v_cache", "must be ", rows,
                ", num_heads_kv, head_dim_v], got shape ", shape_string(a.v_cache));
  if (a.block_table) check_block_table(check, a);
  const int64_t batch = batch_of(a);
  const int64_t heads_q = a.q.size(q_dims - 2);
  const int64_t heads_kv = a.k_cache.size(2);
  const int64_t head_dim = a.q.size(q_dims - 1);
  const int64_t head_dim_v = a.v_cache.size(3);
  check_head_dim(check, "q", head_dim);
  check_head_dim(check, "v_cache", head_dim_v);
  if (!a.cu_seqlens_q) {
    check.require(a.q.size(0) == batch, "q", "must have ",
                  a.block_table ? "block_table's" : "k_cache's", " batch, ", batch, ", got ",
                  a.q.size(0));
  }
  check.require(a.k_cache.size(3) == head_dim, "k_cache", "must have q's head dim, ", head_dim,
                ", got ", a.k_cache.size(3));
  check.shape(a.v_cache, "v_cache",
              a.block_table ? "[num_pages, page_size, num_heads_kv, head_dim_v] like k_cache's"
                            : "[batch, seqlen, num_heads_kv, head_dim_v] like k_cache's",
              {a.k_cache.size(0), a.k_cache.size(1), heads_kv, head_dim_v});
  check.require(heads_kv >= 1, "k_cache", "must have at least one head, got ", heads_kv);
  check.require(heads_q >= 1 && heads_q % heads_kv == 0, "q", "must have a multiple of k_cache's ",
                heads_kv, " heads, got ", heads_q);
  check.require(a.k_cache.size(0) <= kMaxInt && a.k_cache.size(1) <= kMaxInt, "k_cache",
                a.block_table ? "must have fewer than 2^31 pages and tokens each, got shape "
                              : "must have fewer than 2^31 sequences and tokens each, got shape ",
                shape_string(a.k_cache));
  // Query rows are counted in int.
  int64_t query_rows = heads_q;
  for (int64_t i = 0; i < q_dims - 2; ++i) query_rows *= a.q.size(i);
  check.require(query_rows <= kMaxInt, "q", "must have fewer than 2^31 rows in all, got shape ",
                shape_string(a.q));
}

void check_optional_tensors(const Checker& check, const Arguments& a) {
  const int64_t batch = batch_of(a);
  const int64_t heads_q = a.q.size(a.q.dim() - 2);
  if (a.cache_seqlens) {
    check.dtype(*a.cache_seqlens, "cache_seqlens", ScalarType::Int);
    check.shape(*a.cache_seqlens, "cache_seqlens",
                a.block_table ? "[batch] with block_table's batch" : "[batch]", {batch});
  }
  if (a.cu_seqlens_q) {
    check.dtype(*a.cu_seqlens_q, "cu_seqlens_q", ScalarType::Int);
    check.shape(*a.cu_seqlens_q, "cu_seqlens_q",
                a.block_table ? "[batch + 1] with block_table's batch" : "[batch + 1]",
                {batch + 1});
  }
  if (a.alibi_slopes) {
    check.dtype(*a.alibi_slopes, "alibi_slopes", ScalarType::Float);
    if (a.alibi_slopes->dim() == 1) {
      check.shape(*a.alibi_slopes, "alibi_slopes", "[num_heads_q] or [batch, num_heads_q]",
                  {heads_q});
    } else {
      check.shape(*a.alibi_slopes, "alibi_slopes", "[num_heads_q] or [batch, num_heads_q]",
                  {batch, heads_q});
    }
  }
  if (a.sinks) {
    check.dtype(*a.sinks, "sinks", ScalarType::Float);
    check.shape(*a.sinks, "sinks", "[num_heads_q]", {heads_q});
  }
  if (a.counters) {
    check.dtype(*a.counters, "counters", ScalarType::Int);
    check.require(a.counters->dim() == 1 && a.counters->is_contiguous(), "counters",
                  "must be 1-D and contiguous, got shape ", shape_string(*a.counters),
                  " and strides ", list_string(a.counters->strides()));
  }
}

void check_scalars(const Checker& check, const Arguments& a) {
  // Scores are fp32.
  const auto finite = [](double value) { return std::isfinite(static_cast<float>(value)); };
  if (a.softmax_scale) {
    check.require(finite(*a.softmax_scale), "softmax_scale", "must be a finite fp32 number, got ",
                  *a.softmax_scale);
  }
  check.require(finite(a.softcap) && a.softcap >= 0, "softcap",
                "must be a finite fp32 number >= 0 (0 is off), got ", a.softcap);
  check.require(a.window_left >= -1, "window_left", "must be >= -1 (-1 is no limit), got ",
                a.window_left);
  check.require(a.window_right >= -1, "window_right", "must be >= -1 (-1 is no limit), got ",
                a.window_right);
  check.require(!a.causal || a.window_right <= 0, "window_right",
                "must be -1 or 0 when causal is True, got ", a.window_right);
  if (a.max_seqlen_q) {
    check.require(a.cu_seqlens_q.has_value(), "max_seqlen_q", "goes with cu_seqlens_q only, got ",
                  *a.max_seqlen_q, " without it");
    check.require(*a.max_seqlen_q >= 0, "max_seqlen_q", "must be >= 0, got ", *a.max_seqlen_q);
  }
}

void check_out(const Checker& check, const Arguments& a, const Tensor& out,
               const OptionalTensor& lse) {
  std::vector<int64_t> shape(a.q.sizes().begin(), a.q.sizes().end());
  const auto check_shape = [&](const Tensor& t, const char* name, const char* text) {
    const auto sizes = t.sizes();
    const bool equal =
        sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin());
    check.require(equal, name, "must have shape ", text, " = ", list_string(shape), ", got ",
                  shape_string(t));
    for (int64_t i = 0; i < t.dim(); ++i) {
      check.require(t.size(i) <= 1 || t.stride(i) != 0, name,
                    "must not overlap itself, got strides ", list_string(t.strides()));
    }
  };
  shape.back() = a.v_cache.size(3);
  check.dtype(out, "out", a.q.scalar_type());
  check.same_device(out, "out", a.q);
  check_shape(out, "out", "q's with v_cache's head dim");
  if (out.is_cuda()) check.cuda_layout(out, "out");
  if (!lse) return;
  shape.pop_back();
  check.dtype(*lse, "lse", ScalarType::Float);
  check.same_device(*lse, "lse", a.q);
  check_shape(*lse, "lse", "q's without the head dim");
}

ElementType check_arguments(const Checker& check, const Arguments& a) {
  check_not_built(check, a);
  check_devices(check, a);
  const ElementType type = check_dtypes(check, a);
  check_shapes(check, a);
  check_optional_tensors(check, a);
  check_scalars(check, a);
  if (a.q.is_cuda()) {
    check.cuda_layout(a.q, "q");
    check.cuda_layout(a.k_cache, "k_cache");
    check.cuda_layout(a.v_cache, "v_cache");
  }
  return type;
}

// --- Parameters ----------------------------------------------------------------------------------

// A window that reaches past every int is none.
int window(int64_t value) { return value > kMaxInt ? -1 : static_cast<int>(value); }

const int32_t* int_data(const OptionalTensor& t) {
  return t ? static_cast<const int32_t*>(t->const_data_ptr()) : nullptr;
}

const float* float_data(const OptionalTensor& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// Tokens that a sequence can hold. Lengths are int32, so more than that cannot be used.
int capacity_of(const Arguments& a) {
  if (!a.block_table) return static_cast<int>(a.k_cache.size(1));
  if (a.k_cache.size(0) == 0) return 0;
  const int64_t max_pages = std::min(a.block_table->size(1), kMaxInt);
  return static_cast<int>(std::min(max_pages * a.k_cache.size(1), kMaxInt));
}

DecodeParams make_params(const Arguments& a, ElementType type, const Tensor& out,
                         const OptionalTensor& lse) {
  DecodeParams p{};
  const int64_t q_dims = a.q.dim();
  const bool ragged = a.cu_seqlens_q.has_value();
  p.element_type = type;
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
  problem.mask = {window(a.window_left), a.causal ? 0 : window(a.window_right)};

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

Layout stream_k_layout(const Checker& check, const Problem& problem, int available) {
  const std::string_view forced = environment("LEANATTN_NUM_UNITS");
  const int units = forced.empty()
                        ? static_cast<int>(std::clamp<int64_t>(max_tiles(problem), 1, available))
                        : forced_number(check, "LEANATTN_NUM_UNITS", forced);
  return {units, 0, 1, 0, 0};
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

int64_t round_up(int64_t bytes) { return ceil_div<int64_t>(bytes, 256) * 256; }

// Counters, stats and o of the partials, in one allocation; none where no partial goes through it.
struct Workspace {
  std::optional<Tensor> memory;
  int num_counters;
  bool owns_counters;
};

// Whether the layout, whatever the lengths are, merges in registers and shared memory alone. A fixed
// tree keeps states in the workspace even where no item is cut.
bool stays_on_chip(const DecodeParams& p) {
  if (p.batch_invariant) return false;
  const bool teams_for_sure = has_teams(p.layout) && (p.is_uniform || p.problem.batch == 1);
  return teams_for_sure && (p.is_clustered || p.layout.team_size == 1);
}

Workspace make_workspace(const Checker& check, const Arguments& a, DecodeParams& p) {
  const Problem& problem = p.problem;
  // See counter_index: with few items, each has its own counter.
  int64_t num_counters = p.layout.num_units;
  if (!problem.cu_seqlens_q) {
    const int64_t items = int64_t{problem.batch} * problem.num_heads_kv * problem.row_blocks;
    p.counter_per_item = items <= num_counters;
    num_counters = std::min(num_counters, items);
  }
  if (a.counters) {
    check.require(a.counters->numel() >= num_counters, "counters", "must have at least ",
                  num_counters, " elements for this call, got ", a.counters->numel());
  }
  if (stays_on_chip(p)) return {std::nullopt, 0, false};
  const int64_t rows = int64_t{p.layout.num_units} * 2 * p.max_nodes * problem.rows_per_item;
  const int64_t counter_bytes = a.counters ? 0 : round_up(num_counters * 4);
  const int64_t stats_bytes = round_up(rows * 2 * 4);
  const int64_t o_bytes = round_up(rows * p.head_dim_v * 4);
  // See DecodeParams::fold_states: half as many levels as nodes.
  const int64_t quads = padded_head_dim(std::max(p.head_dim, p.head_dim_v)) / 4;
  const int64_t fold_bytes =
      p.batch_invariant && !a.q.is_cpu() ? rows / 4 * quads * int64_t{sizeof(SoftmaxState<4>)} : 0;
  Workspace workspace{torch::stable::empty({counter_bytes + stats_bytes + o_bytes + fold_bytes},
                                           ScalarType::Byte, std::nullopt, a.q.device()),
                      static_cast<int>(num_counters), !a.counters};
  char* memory = static_cast<char*>(workspace.memory->mutable_data_ptr());
  p.counters = a.counters ? static_cast<int32_t*>(a.counters->mutable_data_ptr())
                          : reinterpret_cast<int32_t*>(memory);
  p.partial_stats = reinterpret_cast<float*>(memory + counter_bytes);
  p.partial_o = reinterpret_cast<float*>(memory + counter_bytes + stats_bytes);
  p.fold_states =
      reinterpret_cast<SoftmaxState<4>*>(memory + counter_bytes + stats_bytes + o_bytes);
  return workspace;
}

// --- Running -------------------------------------------------------------------------------------

void run_cpu(const Checker& check, const Arguments& a, DecodeParams& p) {
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
  return {num_items(problem), ceil_div<int>(tiles, max_of<int>(problem.row_blocks, 1)),
          static_cast<double>(int64_t{p.head_dim + p.head_dim_v} * 2 << problem.tile_tokens_log2),
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

void plan_layout(const Checker& check, DecodeParams& p, int device) {
  const Problem& problem = p.problem;
  const Machine machine = machine_for(p, device);
  p.is_uniform = !problem.cache_seqlens && !problem.cu_seqlens_q;
  p.layout = stream_k_layout(check, problem, machine.num_sms);
  // Teams need as many items in every sequence.
  if (!problem.cu_seqlens_q && environment("LEANATTN_NUM_UNITS").empty()) {
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
  }
  if (p.is_uniform) p.uniform = make_uniform_line(problem, p.layout.num_units);
}

void run_cuda(const Checker& check, const Arguments& a, DecodeParams& p) {
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
  set_rows_per_item(problem, rows_per_item_for(p, rows, device));
  check_tiles(check, p);
  plan_layout(check, p, device);
  const Workspace workspace = make_workspace(check, a, p);
  if (value_checks_wanted()) check_values_on_device(check, p, a.max_seqlen_q, stream);
  launch_decode(p, workspace.num_counters, workspace.owns_counters, device, stream);
}
#endif

void run(const Checker& check, const Arguments& a, ElementType type, const Tensor& out,
         const OptionalTensor& lse) {
  if (out.numel() == 0) return;
  DecodeParams params = make_params(a, type, out, lse);
  if (a.q.is_cpu()) return run_cpu(check, a, params);
#ifdef LEANATTN_WITH_CUDA
  run_cuda(check, a, params);
#endif
}

Tensor empty_like_query(const Arguments& a, int64_t last, bool with_last, ScalarType type) {
  std::vector<int64_t> shape(a.q.sizes().begin(), a.q.sizes().end());
  if (with_last) {
    shape.back() = last;
  } else {
    shape.pop_back();
  }
  return torch::stable::empty(shape, type, std::nullopt, a.q.device());
}

Tensor make_out(const Arguments& a) {
  return empty_like_query(a, a.v_cache.size(3), true, a.q.scalar_type());
}

Tensor make_lse(const Arguments& a) { return empty_like_query(a, 0, false, ScalarType::Float); }

}  // namespace

Tensor decode(LEANATTN_DECODE_ARGUMENTS) {
  const Checker check("decode");
  const Arguments arguments = LEANATTN_PACK_ARGUMENTS;
  const ElementType type = check_arguments(check, arguments);
  const Tensor out = make_out(arguments);
  run(check, arguments, type, out, std::nullopt);
  return out;
}

std::tuple<Tensor, Tensor> decode_with_lse(LEANATTN_DECODE_ARGUMENTS) {
  const Checker check("decode_with_lse");
  const Arguments arguments = LEANATTN_PACK_ARGUMENTS;
  const ElementType type = check_arguments(check, arguments);
  const Tensor out = make_out(arguments);
  const Tensor lse = make_lse(arguments);
  run(check, arguments, type, out, lse);
  return {out, lse};
}

void decode_out(LEANATTN_DECODE_ARGUMENTS, Tensor out) {
  const Checker check("decode_out");
  const Arguments arguments = LEANATTN_PACK_ARGUMENTS;
  const ElementType type = check_arguments(check, arguments);
  check_out(check, arguments, out, std::nullopt);
  run(check, arguments, type, out, std::nullopt);
}

void decode_with_lse_out(LEANATTN_DECODE_ARGUMENTS, Tensor out, Tensor lse) {
  const Checker check("decode_with_lse_out");
  const Arguments arguments = LEANATTN_PACK_ARGUMENTS;
  const ElementType type = check_arguments(check, arguments);
  check_out(check, arguments, out, lse);
  run(check, arguments, type, out, lse);
}

void decode_check(LEANATTN_DECODE_ARGUMENTS) {
  const Checker check("decode");
  check_arguments(check, LEANATTN_PACK_ARGUMENTS);
}

}  // namespace leanattn
