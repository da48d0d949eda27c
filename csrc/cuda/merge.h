// The door to the merge kernel: no torch on this side of it.
#pragma once

#include <cuda_runtime.h>

#include "core/merge_params.h"

namespace leanattn {

// Launches on `stream` of the current device. Throws std::runtime_error.
void launch_merge(const MergeParams& params, cudaStream_t stream);

// Loads the kernels on the current device.
void warm_up_merge();

}  // namespace leanattn
