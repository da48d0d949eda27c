// Host helpers of the launcher: error checks and tensor maps.
#pragma once

#include <array>
#include <mutex>
#include <string>

#include <cuda_runtime.h>

#include "core/params.h"
#include "driver_function.h"
#include "kernel/loaders.h"
#include "launch.h"
#include "plan/cost_model.h"

namespace leanattn {

// What the driver must be told, and says, of a kernel once a device.
struct KernelSetup {
  std::once_flag once;
  bool has_tma = false;  // false also where compute_80 PTX was compiled for a newer device
  int num_stages = 0;    // 0: the device has too little shared memory for the kernel
  int shared_memory_bytes = 0;
  std::array<int, kMaxClusterSize + 1> max_clusters{};  // that run at once, by CTAs a cluster
};

// A launch's configuration and what it points to.
struct LaunchConfig {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};

  LaunchConfig(const KernelSetup& setup, int grid, int cluster_size, int threads,
               cudaStream_t stream) {
    config.gridDim = dim3(grid);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = setup.shared_memory_bytes;
    config.stream = stream;
    if (cluster_size == 1) return;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = cluster_size;
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;  // it points into itself
};

[[noreturn]] void throw_error(const std::string& message);

// The tensor maps of K and V, or unusable ones where the bulk tensor copies cannot be used: strides
// that a tensor map cannot hold, an empty cache, an old driver, or LEANATTN_LOADER=cp_async. Throws
// where LEANATTN_LOADER=tma asks for them and the driver refuses what it should take.
TensorMaps make_tensor_maps(const DecodeParams& params);

}  // namespace leanattn
