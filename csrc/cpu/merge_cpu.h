// Merging partial results on the CPU.
#pragma once

#include "core/merge_params.h"
#include "decode_cpu.h"

namespace leanattn {

void merge_cpu(const MergeParams& params, const ParallelFor& parallel_for);

}  // namespace leanattn
