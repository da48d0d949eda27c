// Appending to the caches on the CPU, with RoPE or without.
#pragma once

#include "core/append_params.h"
#include "decode_cpu.h"

namespace leanattn {

void append_cpu(const AppendParams& params, const ParallelFor& parallel_for);

}  // namespace leanattn
