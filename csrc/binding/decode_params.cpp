#include "decode_params.h"

#include <algorithm>
#include <cmath>

#include "core/tree_fold.h"
#include "tensor_params.h"

namespace leanattn {
namespace {

// Tokens that a sequence can hold. Lengths are int32, so more than that cannot be used.
int capacity_of(const DecodeArguments& a) {
  if (!a.block_table) return static_cast<int>(a.k_cache.size(1));
  if (a.k_cache.size(0) == 0) return 0;
  const int64_t max_pages = std::min(a.block_table->size(1), kMaxInt);
  return static_cast<int>(std::min(max_pages * a.k_cache.size(1), kMaxInt));
}

// The stride of a single row means nothing, and 0 says of it that rows begin where they may.
int64_t row_stride(const Tensor& cache, int64_t dim) {
  return cache.size(dim) == 1 ? 0 : cache.stride(dim);
}

}  // namespace

DecodeParams make_params(const DecodeArguments& a, const Tensor& out, const OptionalTensor& lse) {
  DecodeParams p{};
  const int64_t q_dims = a.q.dim();
  const bool ragged = a.cu_seqlens_q.has_value();
  p.element_type = element_type_of(a.q);
  p.cache_type = cache_type_of(a.k_cache);
  p.head_dim = static_cast<int>(a.q.size(q_dims - 1));
  p.head_dim_v = static_cast<int>(out.size(q_dims - 1));
  p.k_columns = static_cast<int>(a.k_cache.size(3));
  p.v_columns = static_cast<int>(a.v_cache.size(3));
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
  problem.shard = make_shard(a.cp, problem.capacity);

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
  p.float32_out = out.scalar_type() == ScalarType::Float && p.element_type != ElementType::kFloat32;
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
  p.k_batch_stride = row_stride(a.k_cache, 0);
  p.k_seq_stride = row_stride(a.k_cache, 1);
  p.k_head_stride = row_stride(a.k_cache, 2);
  p.k_dim_stride = a.k_cache.stride(3);
  p.v = a.v_cache.const_data_ptr();
  p.v_batch_stride = row_stride(a.v_cache, 0);
  p.v_seq_stride = row_stride(a.v_cache, 1);
  p.v_head_stride = row_stride(a.v_cache, 2);
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
  p.softmax_scale = static_cast<float>(a.softmax_scale.value_or(1.0 / std::sqrt(p.k_columns)));
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

}  // namespace leanattn
