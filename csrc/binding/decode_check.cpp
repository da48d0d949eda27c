#include "decode_check.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/schedule.h"

namespace leanattn {
namespace {

// Bytes that the kernels' smallest copies have: of the caches' rows, and of those of q and out.
constexpr int64_t kCacheGrain = 4;
constexpr int64_t kRowGrain = 16;

void check_dtypes(const Checker& check, const DecodeArguments& a) {
  const ScalarType type = a.q.scalar_type();
  const bool sixteen_bit = type == ScalarType::Half || type == ScalarType::BFloat16;
  check.require(sixteen_bit || (type == ScalarType::Float && a.q.is_cpu()), "q",
                "must be float16 or bfloat16 (float32 too on the CPU), got ", name_of(type), " on ",
                device_of(a.q));
  const ScalarType cache_type = a.k_cache.scalar_type();
  check.require(cache_type == type || (sixteen_bit && is_fp8(a.k_cache)), "k_cache",
                "must be q's dtype, ", name_of(type),
                sixteen_bit ? ", float8_e4m3fn or float8_e5m2" : "", ", got ", name_of(cache_type));
  check.require(a.v_cache.scalar_type() == cache_type, "v_cache", "must be k_cache's dtype, ",
                name_of(cache_type), ", got ", name_of(a.v_cache.scalar_type()));
}

void check_devices(const Checker& check, const DecodeArguments& a) {
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
  optional(a.k_scale, "k_scale");
  optional(a.v_scale, "v_scale");
  optional(a.counters, "counters");
}

// grain: on CUDA, what copies of a row are made of at least.
void check_head_dim(const Checker& check, const char* name, int64_t head_dim, int64_t grain,
                    int64_t largest) {
  check.require(head_dim <= largest, name, "has head dim ", head_dim,
                ", which is not supported; allowed are multiples of ", grain, " from ", grain,
                " to ", largest);
  check.require(head_dim >= grain && head_dim % grain == 0, name, "has head dim ", head_dim,
                "; allowed are multiples of ", grain, " from ", grain, " to ", largest);
}

void check_block_table(const Checker& check, const DecodeArguments& a) {
  const Tensor& table = *a.block_table;
  check.dtype(table, "block_table", ScalarType::Int);
  check.require(table.dim() == 2, "block_table", "must be [batch, max_pages], got shape ",
                shape_of(table));
  check.require(table.size(0) <= kMaxInt, "block_table",
                "must have fewer than 2^31 rows, got shape ", shape_of(table));
  check.require(a.k_cache.size(1) >= 1, "k_cache",
                "must have pages of at least 1 token with block_table, got shape ",
                shape_of(a.k_cache));
}

void check_shapes(const Checker& check, const DecodeArguments& a) {
  const int64_t q_dims = a.q.dim();
  if (a.cu_seqlens_q) {
    check.require(q_dims == 3, "q",
                  "must be [total_q, num_heads_q, head_dim] with cu_seqlens_q, got shape ",
                  shape_of(a.q));
  } else {
    check.require(q_dims == 3 || q_dims == 4, "q",
                  "must be [batch, seqlen_q, num_heads_q, head_dim] or [batch, num_heads_q, "
                  "head_dim], got shape ",
                  shape_of(a.q));
  }
  const char* rows = a.block_table ? "[num_pages, page_size" : "[batch, seqlen";
  check.require(a.k_cache.dim() == 4, "k_cache", "must be ", rows,
                ", num_heads_kv, head_dim], got shape ", shape_of(a.k_cache));
  check.require(a.v_cache.dim() == 4, "v_cache", "must be ", rows,
                ", num_heads_kv, head_dim_v], got shape ", shape_of(a.v_cache));
  if (a.block_table) check_block_table(check, a);
  const int64_t batch = batch_of(a);
  const int64_t heads_q = a.q.size(q_dims - 2);
  const int64_t heads_kv = a.k_cache.size(2);
  const int64_t head_dim = a.q.size(q_dims - 1);
  const int64_t head_dim_v = a.v_cache.size(3);
  const int64_t grain =
      a.q.is_cuda() ? kCacheGrain / static_cast<int64_t>(a.k_cache.element_size()) : 1;
  check_head_dim(check, "q", head_dim, grain, kMaxHeadDim);
  check_head_dim(check, "v_cache", head_dim_v, grain, kMaxHeadDimV);
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
                shape_of(a.k_cache));
  // Query rows are counted in int.
  int64_t query_rows = heads_q;
  for (int64_t i = 0; i < q_dims - 2; ++i) query_rows *= a.q.size(i);
  check.require(query_rows <= kMaxInt, "q", "must have fewer than 2^31 rows in all, got shape ",
                shape_of(a.q));
}

void check_optional_tensors(const Checker& check, const DecodeArguments& a) {
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
  check.scale(a.k_scale, "k_scale", a.k_cache, batch);
  check.scale(a.v_scale, "v_scale", a.k_cache, batch);
  if (a.counters) {
    check.dtype(*a.counters, "counters", ScalarType::Int);
    check.require(a.counters->dim() == 1 && a.counters->is_contiguous(), "counters",
                  "must be 1-D and contiguous, got shape ", shape_of(*a.counters), " and strides ",
                  strides_of(*a.counters));
  }
}

void check_scalars(const Checker& check, const DecodeArguments& a) {
  // Scores are fp32.
  const auto finite = [](double value) { return std::isfinite(static_cast<float>(value)); };
  if (a.softmax_scale) {
    check.require(finite(*a.softmax_scale), "softmax_scale", "must be a finite fp32 number, got ",
                  *a.softmax_scale);
  }
  // One too small for fp32 would be taken for 0, which is something else.
  const bool vanishes = a.softcap != 0 && static_cast<float>(a.softcap) == 0.0f;
  check.require(finite(a.softcap) && a.softcap >= 0 && !vanishes, "softcap",
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
  check_context_parallel(check, a.cp);
}

}  // namespace

void check_arguments(const Checker& check, const DecodeArguments& a) {
  check_devices(check, a);
  check_dtypes(check, a);
  check_shapes(check, a);
  check_optional_tensors(check, a);
  check_scalars(check, a);
  if (a.q.is_cuda()) {
    if (!needs_padding(a)) check.cuda_layout(a.q, "q", kRowGrain);
    check.cuda_layout(a.k_cache, "k_cache", kCacheGrain);
    check.cuda_layout(a.v_cache, "v_cache", kCacheGrain);
  }
}

void check_out(const Checker& check, const DecodeArguments& a, const Tensor& out,
               const OptionalTensor& lse) {
  std::vector<int64_t> shape(a.q.sizes().begin(), a.q.sizes().end());
  const auto check_shape = [&](const Tensor& t, const char* name, const char* text) {
    const auto sizes = t.sizes();
    const bool equal =
        sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin());
    check.require(equal, name, "must have shape ", text, " = ", list_of(shape), ", got ",
                  shape_of(t));
    for (int64_t i = 0; i < t.dim(); ++i) {
      check.require(t.size(i) <= 1 || t.stride(i) != 0, name,
                    "must not overlap itself, got strides ", strides_of(t));
    }
  };
  shape.back() = a.v_cache.size(3);
  check.same_device(out, "out", a.q);
  const ScalarType type = out.scalar_type();
  check.require(type == a.q.scalar_type() || type == ScalarType::Float, "out",
                "must be q's dtype, ", name_of(a.q.scalar_type()), ", or float32, got ",
                name_of(type));
  check_shape(out, "out", "q's with v_cache's head dim");
  if (out.is_cuda() && !needs_padding(a)) check.cuda_layout(out, "out", kRowGrain);
  if (!lse) return;
  shape.pop_back();
  check.same_device(*lse, "lse", a.q);
  check.dtype(*lse, "lse", ScalarType::Float);
  check_shape(*lse, "lse", "q's without the head dim");
}

}  // namespace leanattn
