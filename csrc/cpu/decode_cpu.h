// Decode attention on the CPU: the kernel's schedule, softmax state and merge order, with a thread's
// turn for a CTA.
#pragma once

#include <functional>

#include "core/params.h"

namespace leanattn {

// Calls body(i) for every i in [0, n), in parallel.
using ParallelFor = std::function<void(int64_t n, const std::function<void(int64_t)>& body)>;

void decode_cpu(const DecodeParams& params, const ParallelFor& parallel_for);

}  // namespace leanattn
