// The append_decode ops: what is behind the schemas in ops.cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "check.h"

namespace leanattn {

// The arguments that all three ops have, in the order of the schema.
#define LEANATTN_APPEND_DECODE_ARGUMENTS                                                           \
  Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,              \
      OptionalTensor block_table, OptionalTensor cos, OptionalTensor sin, bool interleaved,        \
      OptionalTensor cu_seqlens, std::optional<int64_t> max_seqlen_q,                              \
      std::optional<double> softmax_scale, bool causal, int64_t window_left, int64_t window_right, \
      double softcap, OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor k_scale,   \
      OptionalTensor v_scale, bool batch_invariant, OptionalTensor counters

Tensor append_decode(LEANATTN_APPEND_DECODE_ARGUMENTS);
std::tuple<Tensor, Tensor> append_decode_with_lse(LEANATTN_APPEND_DECODE_ARGUMENTS);
void append_decode_out(LEANATTN_APPEND_DECODE_ARGUMENTS, Tensor out);

}  // namespace leanattn
