// A GPU that is emulated on the CPU: the CUDA runtime as csrc/ uses it. Included before everything of
// csrc/, which is compiled as it stands, so that whole ops run: the checks, the plan, the workspace, the
// tensor maps, the launch, the kernel.
//
//     pytest --emulated-gpu tests/test_append.py        the tests marked gpu, on it
//     python tests/emulator/fuzz_gpu.py --cases 1000    the fuzzer
//
// EMULATED_GPU_SMS and EMULATED_GPU_CAPABILITY (90, 86 or 80) make it another one; with
// EMULATED_GPU_IDLE=1 launches do nothing, which host_time.py uses. What reads or writes
// beside the tensors, AddressSanitizer finds, as compute-sanitizer would, with the environment
//
//     EMULATED_GPU_CXXFLAGS=-fsanitize=address
//     ASAN_OPTIONS=detect_leaks=0
//     LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
//
// gpu.cpp has the runtime's functions, gpu.py torch.cuda's, emulator.h what a kernel runs on.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda_functions.h"

namespace emulator {

// Runs `body` on each thread of what `config` describes; throws where a GPU would refuse it.
void launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body);

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                          const Arguments&... arguments) {
  // By value, for a graph may run it again.
  launch(*config, reinterpret_cast<const void*>(kernel), [=] { kernel(arguments...); });
  return cudaSuccess;
}

}  // namespace emulator

#define cudaLaunchKernelEx emulator::launch_kernel

// As nvcc has them.
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
