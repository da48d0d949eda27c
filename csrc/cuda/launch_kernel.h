// Launches one instantiation of the kernel. Included by instantiate/*.cu alone; everything that does
// not depend on the instantiation is in launch.cu.
#pragma once

#include <array>
#include <mutex>

#include "host_util.h"
#include "kernel/decode_kernel.h"
#include "launch.h"

namespace leanattn {

template <class Traits>
void find_setup(int device, KernelSetup& setup) {
  const auto kernel = decode_kernel<Traits>;
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  const int available = device_limits(device).shared_memory_bytes - Traits::kRingOffset;
  const int num_stages = min_of(available / Traits::kStageBytes, Traits::kMaxStages);
  // Without wgmma, as in what the driver compiles from PTX, the kernel is empty: a handful of registers.
  const bool is_empty = Traits::kWgmma && attributes.numRegs < 64;
  if (num_stages < Traits::kFewestStages || is_empty) return;
  setup.has_tma = attributes.ptxVersion >= 90 && device_limits(device).capability >= 90;
  setup.num_stages = num_stages;
  setup.shared_memory_bytes = Traits::kRingOffset + num_stages * Traits::kStageBytes;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  setup.shared_memory_bytes),
             "cudaFuncSetAttribute");
  // A cluster's partials need room in the ring.
  if (setup.has_tma && num_stages >= Traits::kMinStages) {
    for (int size = 2; size <= kMaxClusterSize; ++size) {
      const LaunchConfig launch(setup, size, size, Traits::kThreads, nullptr);
      const cudaError_t status =
          cudaOccupancyMaxActiveClusters(&setup.max_clusters[size], kernel, &launch.config);
      if (status == cudaSuccess) continue;
      cudaGetLastError();  // part of a GPU may have none of this size: then none are used
      setup.max_clusters[size] = 0;
    }
  }
}

template <class Traits>
const KernelSetup& setup_kernel(int device) {
  static std::array<KernelSetup, kMaxDevices> setups;
  KernelSetup& setup = setups.at(device);
  std::call_once(setup.once, [&] { find_setup<Traits>(device, setup); });
  return setup;
}

// The tree's lowest levels, which come up all the time, stay in shared memory: six, or as many as
// leave the ring 64 KB, below which it no longer keeps the memory busy.
template <class Traits>
RoomPlan plan_fold(const KernelSetup& setup) {
  const int available = setup.shared_memory_bytes - Traits::kRingOffset;
  const int levels = clamp_to((available - 65536) / Traits::kFoldLevelBytes, 0, 6);
  return {(available - levels * Traits::kFoldLevelBytes) / Traits::kStageBytes, levels};
}

// One CTA a unit.
template <class Traits>
void launch_kernel(const typename Traits::Params& params, const TensorMaps& maps, int device,
                   cudaStream_t stream) {
  const KernelSetup& setup = setup_kernel<Traits>(device);
  const LaunchConfig launch(setup, params.layout.num_units, params.cluster_size, Traits::kThreads,
                            stream);
  const RoomPlan room = Traits::kTree ? plan_fold<Traits>(setup) : RoomPlan{setup.num_stages, 0};
  check_cuda(cudaLaunchKernelEx(&launch.config, decode_kernel<Traits>, params, maps, room),
             "cudaLaunchKernelEx");
}

// Of DecodeTraits' arguments.
#define LEANATTN_INSTANTIATE(...)                                                                  \
  template const KernelSetup& setup_kernel<DecodeTraits<__VA_ARGS__>>(int);                        \
  template void launch_kernel<DecodeTraits<__VA_ARGS__>>(const DecodeTraits<__VA_ARGS__>::Params&, \
                                                         const TensorMaps&, int, cudaStream_t);

}  // namespace leanattn
