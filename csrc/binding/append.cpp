// From tensors to AppendParams: checks everything that the host can see, and hands over to the CPU
// implementation or to the launcher.
#include "append.h"

#include <algorithm>

#include <torch/csrc/stable/device.h>

#include "append_value_checks.h"
#include "cpu/append_cpu.h"
#include "tensor_params.h"
#include "torch_parallel_for.h"
#include "value_checks.h"
#ifdef LEANATTN_WITH_CUDA
#include "cuda/append.h"
#include "cuda/device_guard.h"
#include "cuda/launch.h"
#include "cuda_stream.h"
#endif

namespace leanattn {
namespace {

// --- Checks --------------------------------------------------------------------------------------

// Calls visit(tensor, name) for every tensor that is there.
template <class Visit>
void for_each_tensor(const AppendArguments& a, Visit visit) {
  const auto optional = [&](const OptionalTensor& t, const char* name) {
    if (t) visit(*t, name);
  };
  optional(a.q, "q");
  visit(a.k, "k");
  visit(a.v, "v");
  visit(a.k_cache, "k_cache");
  visit(a.v_cache, "v_cache");
  visit(a.cache_seqlens, "cache_seqlens");
  optional(a.block_table, "block_table");
  optional(a.cos, "cos");
  optional(a.sin, "sin");
  optional(a.cu_seqlens, "cu_seqlens");
  optional(a.k_scale, "k_scale");
  optional(a.v_scale, "v_scale");
}

void check_devices(const Checker& check, const AppendArguments& a) {
  check.supported_device(a.k, "k");
  for_each_tensor(a,
                  [&](const Tensor& t, const char* name) { check.same_device(t, name, a.k, "k"); });
}

void check_dtypes(const Checker& check, const AppendArguments& a) {
  const auto is_float = [&](ScalarType type) {
    return type == ScalarType::Half || type == ScalarType::BFloat16 ||
           (type == ScalarType::Float && a.k.is_cpu());
  };
  const ScalarType type = a.k.scalar_type();
  const ScalarType cache_type = a.k_cache.scalar_type();
  check.require(is_float(type), "k", "must be float16 or bfloat16 (float32 too on the CPU), got ",
                name_of(type), " on ", device_of(a.k));
  check.require(
      is_float(cache_type) || is_fp8(a.k_cache), "k_cache",
      "must be float16, bfloat16, float8_e4m3fn or float8_e5m2 (float32 too on the CPU), got ",
      name_of(cache_type), " on ", device_of(a.k_cache));
  check.dtype(a.v, "v", type);
  check.dtype(a.v_cache, "v_cache", cache_type);
  check.dtype(a.cache_seqlens, "cache_seqlens", ScalarType::Int);
  if (a.q) check.dtype(*a.q, "q", type);
  if (a.block_table) check.dtype(*a.block_table, "block_table", ScalarType::Int);
  if (a.cu_seqlens) check.dtype(*a.cu_seqlens, "cu_seqlens", ScalarType::Int);
  if (a.cos) {
    const ScalarType table_type = a.cos->scalar_type();
    check.require(table_type == ScalarType::Float || table_type == type, "cos",
                  "must be float32 or q's dtype, ", name_of(type), ", got ", name_of(table_type));
    check.dtype(*a.sin, "sin", table_type);
  }
}

int64_t batch_of(const AppendArguments& a) {
  return a.block_table ? a.block_table->size(0) : a.k_cache.size(0);
}

// New rows: [B, Sn, heads, dim] or [B, heads, dim], with cu_seqlens [total, heads, dim].
void check_new_rows(const Checker& check, const AppendArguments& a, const Tensor& t,
                    const char* name) {
  const int64_t dims = t.dim();
  if (a.cu_seqlens) {
    check.require(dims == 3, name,
                  "must be [total, num_heads, head_dim] with cu_seqlens, got shape ", shape_of(t));
    return;
  }
  check.require(dims == 3 || dims == 4, name,
                "must be [batch, seqlen_new, num_heads, head_dim] or [batch, num_heads, head_dim], "
                "got shape ",
                shape_of(t));
  check.require(t.size(0) == batch_of(a), name, "must have ",
                a.block_table ? "block_table's" : "k_cache's", " batch, ", batch_of(a),
                ", got shape ", shape_of(t));
}

// That a tensor has k's tokens.
void check_tokens(const Checker& check, const AppendArguments& a, const Tensor& t,
                  const char* name) {
  bool equal = t.dim() == a.k.dim();
  for (int64_t i = 0; equal && i < t.dim() - 2; ++i) equal = t.size(i) == a.k.size(i);
  check.require(equal, name, "must have k's tokens, k is ", shape_of(a.k), ", got shape ",
                shape_of(t));
}

void check_caches(const Checker& check, const AppendArguments& a) {
  const char* names = a.block_table ? "[num_pages, page_size, num_heads_kv, head_dim]"
                                    : "[batch, seqlen, num_heads_kv, head_dim]";
  for (const auto& [cache, name] : {std::pair(&a.k_cache, "k_cache"), {&a.v_cache, "v_cache"}}) {
    check.require(cache->dim() == 4, name, "must be ", names, ", got shape ", shape_of(*cache));
    check.require(cache->size(0) <= kMaxInt && cache->size(1) <= kMaxInt, name,
                  "must have fewer than 2^31 sequences, pages and tokens each, got shape ",
                  shape_of(*cache));
  }
  check.shape(a.v_cache, "v_cache", "like k_cache's with a head dim of its own",
              {a.k_cache.size(0), a.k_cache.size(1), a.k_cache.size(2), a.v_cache.size(3)});
  if (!a.block_table) return;
  check.require(a.block_table->dim() == 2, "block_table", "must be [batch, max_pages], got shape ",
                shape_of(*a.block_table));
  check.require(a.block_table->size(0) <= kMaxInt, "block_table",
                "must have fewer than 2^31 sequences, got shape ", shape_of(*a.block_table));
  check.require(a.k_cache.size(0) == 0 || a.k_cache.size(1) >= 1, "k_cache",
                "must have pages of at least one token, got shape ", shape_of(a.k_cache));
}

void check_shapes(const Checker& check, const AppendArguments& a) {
  check_caches(check, a);
  check_new_rows(check, a, a.k, "k");
  check_new_rows(check, a, a.v, "v");
  check_tokens(check, a, a.v, "v");
  const int64_t dims = a.k.dim();
  const int64_t heads_kv = a.k_cache.size(2);
  check.require(heads_kv >= 1, "k_cache", "must have at least one head, got ", heads_kv);
  const auto row = [&](const Tensor& t, const char* name, const Tensor& cache,
                       const char* cache_name) {
    check.require(t.size(dims - 2) == heads_kv, name, "must have ", cache_name, "'s ", heads_kv,
                  " heads, got ", t.size(dims - 2));
    check.require(t.size(dims - 1) == cache.size(3) && t.size(dims - 1) >= 1, name, "must have ",
                  cache_name, "'s head dim, ", cache.size(3), ", at least 1, got ",
                  t.size(dims - 1));
  };
  row(a.k, "k", a.k_cache, "k_cache");
  row(a.v, "v", a.v_cache, "v_cache");
  const int64_t batch = batch_of(a);
  check.shape(a.cache_seqlens, "cache_seqlens", "[batch]", {batch});
  if (a.cu_seqlens) check.shape(*a.cu_seqlens, "cu_seqlens", "[batch + 1]", {batch + 1});
  int64_t heads = heads_kv;
  if (a.q) {
    check_new_rows(check, a, *a.q, "q");
    check_tokens(check, a, *a.q, "q");
    check.require(a.q->size(dims - 2) >= 1, "q", "must have at least one head, got shape ",
                  shape_of(*a.q));
    check.require(a.q->size(dims - 1) == a.k.size(dims - 1), "q", "must have k's head dim, ",
                  a.k.size(dims - 1), ", got ", a.q->size(dims - 1));
    heads = std::max(heads, a.q->size(dims - 2));
  }
  // Elements of a token and tokens are counted in int.
  int64_t tokens = 1;
  for (int64_t i = 0; i < dims - 2; ++i) tokens *= a.k.size(i);
  check.require(tokens <= kMaxInt, "k", "must have fewer than 2^31 tokens, got shape ",
                shape_of(a.k));
  check.require(3 * heads * std::max(a.k.size(dims - 1), a.v.size(dims - 1)) <= kMaxInt, "k",
                "must have fewer than 2^31 numbers a token, got shape ", shape_of(a.k));
}

void check_rope(const Checker& check, const AppendArguments& a) {
  if (!a.cos) return;
  const int64_t head_dim = a.k.size(a.k.dim() - 1);
  check.require(a.cos->dim() == 2, "cos", "must be [max_position, rotary_dim / 2], got shape ",
                shape_of(*a.cos));
  check.shape(*a.sin, "sin", "like cos'", {a.cos->size(0), a.cos->size(1)});
  check.require(2 * a.cos->size(1) <= head_dim, "cos",
                "must be [max_position, rotary_dim / 2] with a rotary_dim up to the head dim, ",
                head_dim, ", got shape ", shape_of(*a.cos));
  check.require(a.cos->size(0) >= 1 && a.cos->size(0) <= kMaxInt, "cos",
                "must have at least one position and fewer than 2^31, got shape ",
                shape_of(*a.cos));
}

// What is written must not overlap itself.
void check_no_overlap(const Checker& check, const Tensor& t, const char* name) {
  for (int64_t i = 0; i < t.dim(); ++i) {
    check.require(t.size(i) <= 1 || t.stride(i) != 0, name, "must not overlap itself, got strides ",
                  strides_of(t));
  }
}

}  // namespace

void check_append_arguments(const Checker& check, const AppendArguments& a) {
  check_devices(check, a);
  check_dtypes(check, a);
  check_shapes(check, a);
  check_rope(check, a);
  check.scale(a.k_scale, "k_scale", a.k_cache, batch_of(a));
  check.scale(a.v_scale, "v_scale", a.k_cache, batch_of(a));
  check_no_overlap(check, a.k_cache, "k_cache");
  check_no_overlap(check, a.v_cache, "v_cache");
  if (a.q && !a.keeps_q) check_no_overlap(check, *a.q, "q");
  check_context_parallel(check, a.cp);
}

namespace {

// --- Parameters ----------------------------------------------------------------------------------

// The stride of a single row means nothing.
int64_t stride_of(const Tensor& t, int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }

Rows cache_rows(const Tensor& t) {
  return {t.mutable_data_ptr(), stride_of(t, 0), stride_of(t, 1), stride_of(t, 2), stride_of(t, 3)};
}

// [B, Sn, heads, dim], [B, heads, dim], or [total, heads, dim] with cu_seqlens. `data` apart, for
// only q is written to.
Rows new_rows(const AppendArguments& a, const Tensor& t, const void* data) {
  const int64_t dims = t.dim();
  Rows rows{const_cast<void*>(data), 0, 0, stride_of(t, dims - 2), stride_of(t, dims - 1)};
  if (a.cu_seqlens) {
    rows.seq_stride = stride_of(t, 0);
  } else {
    rows.batch_stride = stride_of(t, 0);
    rows.seq_stride = dims == 4 ? stride_of(t, 1) : 0;
  }
  return rows;
}

RopeTable make_table(const Tensor& t) {
  return {t.const_data_ptr(), stride_of(t, 0), stride_of(t, 1)};
}

}  // namespace

AppendParams make_append_params(const AppendArguments& a) {
  AppendParams p{};
  const int64_t dims = a.k.dim();
  p.element_type = element_type_of(a.k);
  p.cache_type = cache_type_of(a.k_cache);
  p.batch = static_cast<int>(batch_of(a));
  p.num_heads_kv = static_cast<int>(a.k_cache.size(2));
  p.head_dim = static_cast<int>(a.k_cache.size(3));
  p.head_dim_v = static_cast<int>(a.v_cache.size(3));
  const int seqlen_new = dims == 4 ? static_cast<int>(a.k.size(1)) : 1;
  p.seqlen_new = FastDivisor(std::max(seqlen_new, 1));
  p.num_tokens = static_cast<int>(a.cu_seqlens ? a.k.size(0) : a.k.size(0) * seqlen_new);
  if (a.cu_seqlens) {
    p.cu_seqlens = int_data(a.cu_seqlens);
    p.cu_seqlens_stride = a.cu_seqlens->stride(0);
  }
  p.cache_seqlens = int_data(a.cache_seqlens);
  p.cache_seqlens_stride = a.cache_seqlens.stride(0);
  int64_t capacity = a.k_cache.size(1);
  p.page_size = FastDivisor(1);
  if (a.block_table) {
    p.block_table = int_data(a.block_table);
    p.block_table_batch_stride = a.block_table->stride(0);
    p.block_table_page_stride = a.block_table->stride(1);
    p.num_pages = static_cast<int>(a.k_cache.size(0));
    p.page_size = FastDivisor(std::max(static_cast<int>(a.k_cache.size(1)), 1));
    // Lengths are int32: no more can be used of a wider table.
    const int64_t max_pages = std::min(a.block_table->size(1), kMaxInt);
    capacity = p.num_pages == 0 ? 0 : std::min(max_pages * a.k_cache.size(1), kMaxInt);
  }
  p.capacity = static_cast<int>(capacity);
  p.shard = make_shard(a.cp, p.capacity);
  p.k = new_rows(a, a.k, a.k.const_data_ptr());
  p.v = new_rows(a, a.v, a.v.const_data_ptr());
  p.k_cache = cache_rows(a.k_cache);
  p.v_cache = cache_rows(a.v_cache);
  p.k_scale = make_scales(a.k_scale);
  p.v_scale = make_scales(a.v_scale);
  if (a.cos && a.cos->size(1) > 0) {
    p.num_heads_q = static_cast<int>(a.q->size(dims - 2));
    p.q = new_rows(a, *a.q, a.keeps_q ? a.q->const_data_ptr() : a.q->mutable_data_ptr());
    p.q_out = p.q;
    p.rope.num_pairs = static_cast<int>(a.cos->size(1));
    p.rope.interleaved = a.interleaved;
    p.rope.max_position = static_cast<int>(a.cos->size(0));
    p.rope.tables_are_float32 = a.cos->scalar_type() == ScalarType::Float;
    p.rope.cos = make_table(*a.cos);
    p.rope.sin = make_table(*a.sin);
  }
  return p;
}

// --- Running -------------------------------------------------------------------------------------

void run_append_cpu(const AppendParams& p) {
  const int64_t token_work =
      int64_t{p.num_heads_q + p.num_heads_kv} * p.head_dim + int64_t{p.num_heads_kv} * p.head_dim_v;
  append_cpu(p, torch_parallel_for(std::max<int64_t>(1, 32768 / token_work)));
}

namespace {

#ifdef LEANATTN_WITH_CUDA
void run_cuda(const Checker& check, const AppendParams& p, int device) {
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_cuda_stream(device);
  if (value_checks_wanted() && !is_capturing(stream)) {
    check_append_values(check, p, [&](const int32_t* values, int64_t stride, int n) {
      return copy_to_host(values, stride, n, stream);
    });
  }
  launch_append(p, stream);
}
#endif

void run(const Checker& check, const AppendArguments& a) {
  check_append_arguments(check, a);
  const AppendParams params = make_append_params(a);
  if (params.num_tokens == 0) return;
  if (a.k.is_cpu()) {
    if (value_checks_wanted()) check_append_values(check, params, read_from_host);
    return run_append_cpu(params);
  }
#ifdef LEANATTN_WITH_CUDA
  run_cuda(check, params, a.k.get_device_index());
#endif
}

}  // namespace

void append_kv(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
               OptionalTensor block_table, OptionalTensor cu_seqlens, OptionalTensor k_scale,
               OptionalTensor v_scale, int64_t cp_world_size, int64_t cp_rank,
               int64_t cp_interleave) {
  const ContextParallel cp{cp_world_size, cp_rank, cp_interleave};
  run(Checker("append_kv"), {std::nullopt, k, v, k_cache, v_cache, cache_seqlens, block_table,
                             std::nullopt, std::nullopt, false, cu_seqlens, k_scale, v_scale, cp});
}

void rope_append_kv(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache,
                    Tensor cache_seqlens, OptionalTensor block_table, Tensor cos, Tensor sin,
                    bool interleaved, OptionalTensor cu_seqlens, OptionalTensor k_scale,
                    OptionalTensor v_scale, int64_t cp_world_size, int64_t cp_rank,
                    int64_t cp_interleave) {
  const ContextParallel cp{cp_world_size, cp_rank, cp_interleave};
  run(Checker("rope_append_kv"), {q, k, v, k_cache, v_cache, cache_seqlens, block_table, cos, sin,
                                  interleaved, cu_seqlens, k_scale, v_scale, cp});
}

}  // namespace leanattn
