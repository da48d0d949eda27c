// Host helpers of the launcher: error checks and tensor maps.
#pragma once

#include <atomic>
#include <string>

#include <cuda_runtime.h>

#include "../params.h"
#include "kernel/loaders.h"
#include "launch.h"

namespace leanattn {

constexpr int kMaxDevices = 64;

// What the driver must be told, and says, of a kernel once a device.
struct KernelSetup {
  std::atomic<bool> done{false};
  bool has_tma = false;  // false also where compute_80 PTX was compiled for a newer device
  int num_stages = 0;
  int shared_memory_bytes = 0;
};

[[noreturn]] void throw_error(const std::string& message);

// The tensor maps of K and V, or unusable ones where the bulk tensor copies cannot be used: strides
// that a tensor map cannot hold, an empty cache, an old driver, or LEANATTN_LOADER=cp_async.
TensorMaps make_tensor_maps(const DecodeParams& params);

}  // namespace leanattn
