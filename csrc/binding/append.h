// The append ops: what is behind the schemas in ops.cpp.
#pragma once

#include "check.h"
#include "context_parallel.h"
#include "core/append_params.h"

namespace leanattn {

// The arguments of an append, with RoPE or without.
struct AppendArguments {
  OptionalTensor q;
  Tensor k, v, k_cache, v_cache, cache_seqlens;
  OptionalTensor block_table, cos, sin;
  bool interleaved;
  OptionalTensor cu_seqlens, k_scale, v_scale;
  ContextParallel cp;
  // q's rotated rows go elsewhere: to AppendParams::q_out, for the caller to set.
  bool keeps_q = false;
};

// All that the host can see, before anything is written.
void check_append_arguments(const Checker& check, const AppendArguments& a);

AppendParams make_append_params(const AppendArguments& a);

// On the CPU.
void run_append_cpu(const AppendParams& p);

void append_kv(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
               OptionalTensor block_table, OptionalTensor cu_seqlens, OptionalTensor k_scale,
               OptionalTensor v_scale, int64_t cp_world_size, int64_t cp_rank,
               int64_t cp_interleave);

void rope_append_kv(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache,
                    Tensor cache_seqlens, OptionalTensor block_table, Tensor cos, Tensor sin,
                    bool interleaved, OptionalTensor cu_seqlens, OptionalTensor k_scale,
                    OptionalTensor v_scale, int64_t cp_world_size, int64_t cp_rank,
                    int64_t cp_interleave);

}  // namespace leanattn
