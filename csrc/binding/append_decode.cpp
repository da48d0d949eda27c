// Appending and decoding in one op: an append's arguments and a decode's, with the checks of both.
#include "append_decode.h"

#include "append.h"
#include "decode.h"

namespace leanattn {
namespace {

struct Arguments {
  AppendArguments append;
  DecodeArguments decode;
};

#define LEANATTN_PACK_ARGUMENTS                                                                 \
  Arguments {                                                                                   \
    {q,   k,           v,          k_cache, v_cache, cache_seqlens, block_table,     cos,       \
     sin, interleaved, cu_seqlens, k_scale, v_scale, kOneRank,      /*keeps_q=*/true},          \
    {                                                                                           \
      q, k_cache, v_cache, cache_seqlens, block_table, cu_seqlens, max_seqlen_q, softmax_scale, \
          causal, window_left, window_right, softcap, alibi_slopes, sinks, k_scale, v_scale,    \
          batch_invariant, counters, kOneRank                                                   \
    }                                                                                           \
  }

void check_tables(const Checker& check, const AppendArguments& a) {
  check.require(a.cos || !a.sin, "cos", "must be given with sin, got None");
  check.require(a.sin || !a.cos, "sin", "must be given with cos, got None");
  check.require(a.cos || !a.interleaved, "interleaved", "goes with cos and sin only, got True");
}

// Whether `part` is the first columns of `whole`, [.., head_dim] both: the same memory.
bool is_first_columns(const Tensor& part, const Tensor& whole) {
  if (whole.numel() == 0 || part.dim() != whole.dim()) return false;
  if (part.const_data_ptr() != whole.const_data_ptr()) return false;
  for (int64_t i = 0; i < whole.dim(); ++i) {
    if (whole.size(i) > 1 && part.size(i) > 1 && part.stride(i) != whole.stride(i)) return false;
  }
  return true;
}

// Where the values are in the keys, both of a new token go to the same place: they must be the same.
void check_values_in_keys(const Checker& check, const AppendArguments& a) {
  if (a.k.numel() == 0 || !is_first_columns(a.v_cache, a.k_cache)) return;
  check.require(!a.cos, "cos",
                "is not supported where v_cache is a view of k_cache's first columns, which would "
                "be rotated");
  check.require(is_first_columns(a.v, a.k), "v",
                "must be a view of k's first columns, as v_cache is of k_cache's, got shape ",
                shape_of(a.v), " elsewhere");
}

void check_arguments(const Checker& check, const Arguments& a) {
  check_tables(check, a.append);
  check.require(a.decode.cu_seqlens_q || !a.decode.max_seqlen_q, "max_seqlen_q",
                "goes with cu_seqlens only, got ", a.decode.max_seqlen_q.value_or(0),
                " without it");
  check_append_arguments(check, a.append);
  check_arguments(check, a.decode);
  check_values_in_keys(check, a.append);
}

void run(const Checker& check, const Arguments& a, const Tensor& out, const OptionalTensor& lse) {
  const AppendParams append = make_append_params(a.append);
  run_decode(check, a.decode, out, lse, &append);
}

}  // namespace

Tensor append_decode(LEANATTN_APPEND_DECODE_ARGUMENTS) {
  const Checker check("append_decode");
  const Arguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  const Tensor out = make_out(arguments.decode);
  run(check, arguments, out, std::nullopt);
  return out;
}

std::tuple<Tensor, Tensor> append_decode_with_lse(LEANATTN_APPEND_DECODE_ARGUMENTS) {
  const Checker check("append_decode_with_lse");
  const Arguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  const Tensor out = make_out(arguments.decode);
  const Tensor lse = make_lse(arguments.decode);
  run(check, arguments, out, lse);
  return {out, lse};
}

void append_decode_out(LEANATTN_APPEND_DECODE_ARGUMENTS, Tensor out) {
  const Checker check("append_decode_out");
  const Arguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  check_out(check, arguments.decode, out, std::nullopt);
  run(check, arguments, out, std::nullopt);
}

}  // namespace leanattn
