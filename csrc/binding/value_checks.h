// LEANATTN_CHECK=1: lengths, offsets and page ids that the ops would clamp raise instead. For
// finding bugs in a caller; on CUDA it costs copies and syncs, so it is off by default and ignored
// during graph capture.
#pragma once

#include <cstdint>
#include <optional>

#include "check.h"
#include "core/params.h"
#ifdef LEANATTN_WITH_CUDA
#include <cuda_runtime.h>
#endif

namespace leanattn {

bool value_checks_wanted();

// With host pointers in the problem and to the block table; does nothing unless wanted.
void check_values(const Checker& check, const DecodeParams& params,
                  std::optional<int64_t> max_seqlen_q);

#ifdef LEANATTN_WITH_CUDA
// Copies lengths and page ids to the host first.
void check_values_on_device(const Checker& check, const DecodeParams& params,
                            std::optional<int64_t> max_seqlen_q, cudaStream_t stream);
#endif

}  // namespace leanattn
