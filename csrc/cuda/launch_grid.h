// Launches of kernels without shared memory or attributes of their own.
#pragma once

#include "launch.h"

namespace leanattn {

template <class... Parameters, class... Arguments>
void launch_grid(const char* name, void (*kernel)(Parameters...), int64_t grid, int threads,
                 cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(threads);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

// A capture must not do this, and the first launch does it where nobody else has.
template <class... Parameters>
void load_kernel(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
}

}  // namespace leanattn
