// leanattn::schedule: the scheduler as an op on the CPU, for tests, tools and pictures.
#pragma once

#include "check.h"

namespace leanattn {

// One row a segment, in the order of the units; see schedule_op.cpp for the columns.
Tensor schedule(Tensor cache_seqlens, int64_t num_heads_kv, int64_t group_size, int64_t capacity,
                int64_t head_dim, int64_t num_units, int64_t rows_per_item, int64_t seqlen_q,
                OptionalTensor cu_seqlens_q, bool causal, int64_t window_left,
                int64_t window_right);

}  // namespace leanattn
