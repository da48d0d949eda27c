// torch's current CUDA stream, without linking against its CUDA library: the same wheel must import
// where torch has none. The symbol is looked up in the copy that torch itself has loaded.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include <cuda_runtime.h>

namespace leanattn {

inline cudaStream_t current_cuda_stream(int device) {
  using GetStream = int32_t (*)(int32_t device, void** stream);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    if (!symbol) throw std::runtime_error("leanattn: this torch has no CUDA");
    return reinterpret_cast<GetStream>(symbol);
  }();
  void* stream = nullptr;
  if (get_stream(device, &stream) != 0) {
    throw std::runtime_error("leanattn: torch has no current stream for cuda:" +
                             std::to_string(device));
  }
  return static_cast<cudaStream_t>(stream);
}

}  // namespace leanattn
