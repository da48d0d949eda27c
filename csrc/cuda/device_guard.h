// Makes a device current for a scope. Not torch's guard: the CUDA runtime is linked statically, and a
// runtime keeps a current device of its own. In a fresh thread torch's may already stand at cuda:1
// while ours is still at cuda:0, and a launch on the default stream would go there.
//
// Afterwards the thread's context is again what it was, and not the one of our runtime's last device:
// to go back to that would make a context on cuda:0 in every process that only uses another GPU.
#pragma once

#include "driver_function.h"
#include "launch.h"

namespace leanattn {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    static const auto get_context = driver_function<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent");
    is_known_ = get_context && get_context(&previous_) == CUDA_SUCCESS;
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    static const auto set_context = driver_function<decltype(&cuCtxSetCurrent)>("cuCtxSetCurrent");
    if (is_known_ && set_context) set_context(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  bool is_known_;
  CUcontext previous_ = nullptr;  // null: none yet
};

}  // namespace leanattn
