// Whether two neighbouring KV heads can be read as one, and the parameters of the pairs. What a pair is
// stands in core/head_pairs.h; whether it pays, the cost model says.
#pragma once

#include "core/head_pairs.h"

namespace leanattn {

// rows: packed query rows of a KV head.
inline bool can_pair_heads(const DecodeParams& p, int64_t rows) {
  if (p.head_pairs || p.batch_invariant || 2 * rows > kMaxPairRows) return false;
  if (p.problem.num_heads_kv % 2 != 0 || p.head_dim != p.head_dim_v) return false;
  // Twice the head dim is one that a kernel is for; rows of 256 bytes are long enough.
  if (p.head_dim != 64 && !(p.head_dim == 128 && is_float8(p.cache_type))) return false;
  return p.k_columns == p.k_head_stride && p.k_head_stride == p.head_dim &&
         p.v_columns == p.v_head_stride && p.v_head_stride == p.head_dim;
}

inline DecodeParams pair_heads(DecodeParams p) {
  p.head_pairs = true;
  p.head_dim *= 2;
  p.head_dim_v *= 2;
  p.k_columns *= 2;
  p.v_columns *= 2;
  p.k_head_stride *= 2;
  p.v_head_stride *= 2;
  p.problem.num_heads_kv = p.problem.num_heads_kv / 2;
  p.problem.group_size = p.problem.group_size * 2;
  p.problem.tile_tokens_log2 = tile_tokens_log2_for(p.head_dim);
  return p;
}

}  // namespace leanattn
