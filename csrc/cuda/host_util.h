// Host helpers of the launcher: error checks and tensor maps.
#pragma once

#include <array>
#include <atomic>
#include <string>

#include <cuda_runtime.h>

#include "../cost_model.h"
#include "../params.h"
#include "kernel/loaders.h"
#include "launch.h"

namespace leanattn {

constexpr int kMaxDevices = 64;

// What the driver must be told, and says, of a kernel once a device.
struct KernelSetup {
  std::atomic<bool> done{false};
  bool has_tma = false;  // false also where compute_80 PTX was compiled for a newer device
  int num_stages = 0;    // 0: the device has too little shared memory for the kernel
  int shared_memory_bytes = 0;
  std::array<int, kMaxClusterSize + 1> max_clusters{};  // that run at once, by CTAs a cluster
};

// A launch's configuration and what it points to.
struct LaunchConfig {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  LaunchConfig(const KernelSetup& setup, int grid, int cluster_size, int threads,
               cudaStream_t stream) {
    config.gridDim = dim3(grid);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = setup.shared_memory_bytes;
    config.stream = stream;
    if (cluster_size == 1) return;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster_size;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;  // it points into itself
};

[[noreturn]] void throw_error(const std::string& message);

// The tensor maps of K and V, or unusable ones where the bulk tensor copies cannot be used: strides
// that a tensor map cannot hold, an empty cache, an old driver, or LEANATTN_LOADER=cp_async.
TensorMaps make_tensor_maps(const DecodeParams& params);

}  // namespace leanattn
