// Functions of the CUDA driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

namespace leanattn {

// A function of the driver, through the runtime, so that libcuda is not needed at link time. Null on
// drivers without it.
template <class Function>
Function driver_function(const char* name) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &result);
  const bool found = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
  if (!found) cudaGetLastError();
  return reinterpret_cast<Function>(found ? entry : nullptr);
}

}  // namespace leanattn
