// The arguments of a decode call, and what is checked of them before anything is allocated: all that
// the host can see. What lies in device memory is clamped where it is read (schedule.h), and checked
// on demand (value_checks.h).
#pragma once

#include <cstdint>
#include <optional>

#include "check.h"
#include "context_parallel.h"

namespace leanattn {

// In the order of the schema.
struct DecodeArguments {
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
  ContextParallel cp;
};

// Sequences. With cu_seqlens_q, q does not tell.
inline int64_t batch_of(const DecodeArguments& a) {
  return a.block_table ? a.block_table->size(0) : a.k_cache.size(0);
}

// Whether q's or out's rows are no whole 16 bytes, which the kernels write and read at a time: they get
// copies with columns of zeros behind D and Dv then. The caches stay as they are.
inline bool needs_padding(const DecodeArguments& a) {
  constexpr int64_t kColumns = 8;
  return a.q.is_cuda() && (a.k_cache.size(3) % kColumns != 0 || a.v_cache.size(3) % kColumns != 0);
}

void check_arguments(const Checker& check, const DecodeArguments& a);

// What the caller gives to write into, after check_arguments.
void check_out(const Checker& check, const DecodeArguments& a, const Tensor& out,
               const OptionalTensor& lse);

}  // namespace leanattn
