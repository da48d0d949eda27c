// The decode ops: what is behind the schemas in ops.cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "core/append_params.h"
#include "decode_check.h"

namespace leanattn {

// The arguments that all four ops have, in the order of the schema.
#define LEANATTN_DECODE_ARGUMENTS                                                                 \
  Tensor q, Tensor k_cache, Tensor v_cache, OptionalTensor cache_seqlens,                         \
      OptionalTensor block_table, OptionalTensor cu_seqlens_q,                                    \
      std::optional<int64_t> max_seqlen_q, std::optional<double> softmax_scale, bool causal,      \
      int64_t window_left, int64_t window_right, double softcap, OptionalTensor alibi_slopes,     \
      OptionalTensor sinks, OptionalTensor k_scale, OptionalTensor v_scale, bool batch_invariant, \
      OptionalTensor counters, int64_t cp_world_size, int64_t cp_rank, int64_t cp_interleave

Tensor decode(LEANATTN_DECODE_ARGUMENTS);
std::tuple<Tensor, Tensor> decode_with_lse(LEANATTN_DECODE_ARGUMENTS);
void decode_out(LEANATTN_DECODE_ARGUMENTS, Tensor out);
void decode_with_lse_out(LEANATTN_DECODE_ARGUMENTS, Tensor out, Tensor lse);

// Only the checks: throws what the others would throw before a launch.
void decode_check(LEANATTN_DECODE_ARGUMENTS, OptionalTensor out);

// What these ops share with append_decode, from arguments that have been checked to a launch.
// `append`: of the new tokens that are to be appended first, or null; a.cache_seqlens are the lengths
// before that.
void run_decode(const Checker& check, const DecodeArguments& a, const Tensor& out,
                const OptionalTensor& lse, const AppendParams* append = nullptr);

Tensor make_out(const DecodeArguments& a);
Tensor make_lse(const DecodeArguments& a);

}  // namespace leanattn
