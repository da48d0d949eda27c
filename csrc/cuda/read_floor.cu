// The read floor: how fast this machine reads given memory at all. Every CTA streams its interleaved
// chunks of 16 KiB through a ring in shared memory by bulk copies; consumers touch each chunk once.
// Below sm_90, plain 16-byte loads, which come within 2% of it.
#include "host_util.h"
#include "kernel/ring.h"
#include "launch.h"

#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/barrier.h>

namespace leanattn {
namespace {

constexpr int kChunkBytes = 16384;
constexpr int kStages = 8;
constexpr int kConsumers = 128;
constexpr int kThreads = kConsumers + 32;

// Chunk `index` of a, then of b; the last chunk of each may be shorter.
struct Chunks {
  const uint8_t* a;
  const uint8_t* b;
  int64_t bytes_a, bytes_b;
  int count_a, count;

  __device__ const uint8_t* data(int index) const {
    return index < count_a ? a + int64_t{index} * kChunkBytes
                           : b + int64_t{index - count_a} * kChunkBytes;
  }
  __device__ int bytes(int index) const {
    const int64_t left = index < count_a ? bytes_a - int64_t{index} * kChunkBytes
                                         : bytes_b - int64_t{index - count_a} * kChunkBytes;
    return static_cast<int>(min_of<int64_t>(kChunkBytes, left));
  }
};

#if __CUDA_ARCH__ >= 900
__device__ uint32_t stream_chunks(const Chunks& chunks) {
  extern __shared__ __align__(128) uint8_t ring_smem[];  // [kStages][kChunkBytes]
  __shared__ uint64_t full[kStages], empty[kStages];
  if (threadIdx.x < kStages) {
    ptx::mbarrier_init(&full[threadIdx.x], 1);
    ptx::mbarrier_init(&empty[threadIdx.x], kConsumers / 32);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();  // the barriers are initialised
  uint32_t seen = 0;
  RingPosition position;
  if (threadIdx.x == kConsumers) {
    for (int index = blockIdx.x; index < chunks.count; index += gridDim.x) {
      const int bytes = chunks.bytes(index);
      uint64_t* full_barrier = &full[position.stage];
      ptx::mbarrier_wait_parity(&empty[position.stage], position.phase ^ 1);
      cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(full_barrier, bytes);
      cute::SM90_BULK_COPY_G2S::copy(chunks.data(index), full_barrier,
                                     ring_smem + position.stage * kChunkBytes, bytes);
      position.advance(kStages);
    }
  } else if (threadIdx.x < kConsumers) {
    for (int index = blockIdx.x; index < chunks.count; index += gridDim.x) {
      ptx::mbarrier_wait_parity(&full[position.stage], position.phase);
      seen ^= *reinterpret_cast<const uint32_t*>(ring_smem + position.stage * kChunkBytes +
                                                 threadIdx.x * 16);
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&empty[position.stage]);
      position.advance(kStages);
    }
  }
  return seen;
}
#else
__device__ uint32_t stream_chunks(const Chunks& chunks) {
  uint32_t seen = 0;
  for (int index = blockIdx.x; index < chunks.count; index += gridDim.x) {
    const int bytes = chunks.bytes(index);
#pragma unroll 8
    for (int byte = threadIdx.x * 16; byte < bytes; byte += kThreads * 16) {
      const uint4 x = __ldcs(reinterpret_cast<const uint4*>(chunks.data(index) + byte));
      seen ^= x.x ^ x.y ^ x.z ^ x.w;
    }
  }
  return seen;
}
#endif

__global__ void __launch_bounds__(kThreads) read_floor_kernel(Chunks chunks, int* sink) {
  // Never true in practice, but the compiler cannot know, so the loads stay.
  if (stream_chunks(chunks) == 0x9e3779b9u) *sink = 1;
}

}  // namespace

void launch_read_floor(const void* a, int64_t bytes_a, const void* b, int64_t bytes_b, int* sink,
                       int device, cudaStream_t stream) {
  constexpr int kSharedBytes = kStages * kChunkBytes;
  const DeviceLimits& limits = device_limits(device);
  const int shared_bytes = limits.capability >= 90 ? kSharedBytes : 0;
  const int grid = limits.capability >= 90 ? limits.num_sms : limits.num_sms * 8;
  check_cuda(cudaFuncSetAttribute(read_floor_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shared_bytes),
             "cudaFuncSetAttribute");
  const auto count = [](int64_t bytes) {
    return static_cast<int>(ceil_div<int64_t>(bytes, kChunkBytes));
  };
  const Chunks chunks{static_cast<const uint8_t*>(a), static_cast<const uint8_t*>(b), bytes_a,
                      bytes_b, count(bytes_a), count(bytes_a) + count(bytes_b)};
  read_floor_kernel<<<grid, kThreads, shared_bytes, stream>>>(chunks, sink);
  check_cuda(cudaGetLastError(), "read_floor_kernel");
}

}  // namespace leanattn
