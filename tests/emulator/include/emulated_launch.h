// What csrc/cuda/launch_grid.h does, emulated.
#pragma once

#include <cuda_runtime_api.h>

#include "emulator.h"

namespace leanattn {

template <class... Parameters, class... Arguments>
void launch_grid(const char*, void (*kernel)(Parameters...), int64_t grid, int threads,
                 cudaStream_t, const Arguments&... arguments) {
  emulator::run(static_cast<int>(grid), 1, threads, 0, 1, [&] { kernel(arguments...); });
}

template <class... Parameters>
void load_kernel(void (*)(Parameters...)) {}

}  // namespace leanattn
