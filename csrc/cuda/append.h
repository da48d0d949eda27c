// The door to the append kernel: no torch on this side of it.
#pragma once

#include <cuda_runtime.h>

#include "core/append_params.h"

namespace leanattn {

// One launch on `stream` of the current device, num_tokens > 0. Throws std::runtime_error.
void launch_append(const AppendParams& params, cudaStream_t stream);

// Loads the kernels on the current device.
void warm_up_append();

}  // namespace leanattn
