// The append ops: what is behind the schemas in ops.cpp.
#pragma once

#include "check.h"

namespace leanattn {

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
