// Makes a device current for a scope. Not torch's guard: the CUDA runtime is linked statically, and a
// runtime keeps a current device of its own. In a fresh thread torch's may already stand at cuda:1
// while ours is still at cuda:0, and a launch on the default stream would go there.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace leanattn {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) check_cuda(cudaSetDevice(device), "cudaSetDevice");
    current_ = device;
  }
  ~DeviceGuard() {
    if (previous_ != current_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
  int current_;
};

}  // namespace leanattn
