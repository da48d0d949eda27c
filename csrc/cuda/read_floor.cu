// The read floor: how fast this machine reads given memory at all. Every CTA streams its interleaved
// chunks of 16 KiB through a ring in shared memory by bulk copies; consumers touch each chunk once.
// Below sm_90, plain 16-byte loads, which come within 2% of it.
//
// And the floor of a layout: the rows of a cache by bulk tensor copies, head after head, as a
// decode reads them. Rows of 128 bytes with other heads' rows between them cost more than the same
// bytes in the order of memory.
#include "host_util.h"
#include "kernel/ring.h"
#include "launch.h"

#include <cutlass/arch/barrier.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

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

// Boxes of kBoxTokens x 64 elements, K's and V's in turn: column block after column block, tile
// after tile, head after head. A box that reaches over the last token counts as whole.
struct Boxes {
  static constexpr int kBoxTokens = 128;
  static_assert(kBoxTokens * 64 * 2 == kChunkBytes);

  int column_blocks, tiles, heads;
  int count;  // of K and V together
};

#if __CUDA_ARCH__ >= 900
// The indices begin, begin + step, ... before end: copy(index, full_barrier, stage_smem) puts a
// chunk into a stage of the ring and names its bytes to the barrier.
template <class Copy>
__device__ uint32_t stream(int begin, int end, int step, Copy copy) {
  // Swizzled boxes repeat every 1024 bytes.
  extern __shared__ __align__(1024) uint8_t ring_smem[];  // [kStages][kChunkBytes]
  __shared__ uint64_t full[kStages], empty[kStages];
  const bool is_producer_warp = threadIdx.x >= kConsumers;
  if (is_producer_warp && cute::elect_one_sync()) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&full[stage], 1);
      ptx::mbarrier_init(&empty[stage], kConsumers / 32);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();  // the barriers are initialised
  uint32_t seen = 0;
  RingPosition position;
  if (is_producer_warp) {
    for (int index = begin; index < end; index += step) {
      ptx::mbarrier_wait_parity(&empty[position.stage], position.phase ^ 1);
      if (cute::elect_one_sync()) {
        copy(index, &full[position.stage], ring_smem + position.stage * kChunkBytes);
      }
      position.advance(kStages);
    }
  } else {
    for (int index = begin; index < end; index += step) {
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

__device__ uint32_t stream_chunks(const Chunks& chunks) {
  return stream(
      blockIdx.x, chunks.count, gridDim.x,
      [&](int index, uint64_t* full_barrier, uint8_t* stage_smem) {
        const int bytes = chunks.bytes(index);
        cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(full_barrier, bytes);
        cute::SM90_BULK_COPY_G2S::copy(chunks.data(index), full_barrier, stage_smem, bytes);
      });
}

// Every CTA an equal stretch, like the shares of a decode.
__device__ uint32_t stream_boxes(const CUtensorMap& k, const CUtensorMap& v, const Boxes& boxes) {
  const int begin = static_cast<int>(int64_t{boxes.count} * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(int64_t{boxes.count} * (blockIdx.x + 1) / gridDim.x);
  return stream(begin, end, 1, [&](int index, uint64_t* full_barrier, uint8_t* stage_smem) {
    int left = index / 2;
    const auto next = [&](int extent) {
      const int coordinate = left % extent;
      left /= extent;
      return coordinate;
    };
    const int block = next(boxes.column_blocks), tile = next(boxes.tiles), head = next(boxes.heads);
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(full_barrier, kChunkBytes);
    cute::SM90_TMA_LOAD_4D::copy(index % 2 ? &v : &k, full_barrier,
                                 static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                 stage_smem, block * 64, tile * Boxes::kBoxTokens, head, left);
  });
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

// Never called: the launcher asks for sm_90 code.
__device__ uint32_t stream_boxes(const CUtensorMap&, const CUtensorMap&, const Boxes&) { return 0; }
#endif

__global__ void __launch_bounds__(kThreads) read_floor_kernel(Chunks chunks, int* sink) {
  // Never true in practice, but the compiler cannot know, so the loads stay.
  if (stream_chunks(chunks) == 0x9e3779b9u) *sink = 1;
}

__global__ void __launch_bounds__(kThreads)
    read_rows_floor_kernel(const __grid_constant__ CUtensorMap k,
                           const __grid_constant__ CUtensorMap v, Boxes boxes, int* sink) {
  if (stream_boxes(k, v, boxes) == 0x9e3779b9u) *sink = 1;
}

constexpr int kSharedBytes = kStages * kChunkBytes;

}  // namespace

void launch_read_floor(const void* a, int64_t bytes_a, const void* b, int64_t bytes_b, int* sink,
                       int device, cudaStream_t stream) {
  const DeviceLimits& limits = device_limits(device);
  const int shared_bytes = limits.capability >= 90 ? kSharedBytes : 0;
  const int grid = limits.capability >= 90 ? limits.num_sms : limits.num_sms * 8;
  check_cuda(cudaFuncSetAttribute(read_floor_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shared_bytes),
             "cudaFuncSetAttribute");
  const auto count = [](int64_t bytes) {
    return static_cast<int>(ceil_div<int64_t>(bytes, kChunkBytes));
  };
  const Chunks chunks{static_cast<const uint8_t*>(a),
                      static_cast<const uint8_t*>(b),
                      bytes_a,
                      bytes_b,
                      count(bytes_a),
                      count(bytes_a) + count(bytes_b)};
  read_floor_kernel<<<grid, kThreads, shared_bytes, stream>>>(chunks, sink);
  check_cuda(cudaGetLastError(), "read_floor_kernel");
}

void launch_read_rows_floor(const DecodeParams& params, int* sink, int device,
                            cudaStream_t stream) {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, read_rows_floor_kernel), "cudaFuncGetAttributes");
  const DeviceLimits& limits = device_limits(device);
  const bool has_tma = attributes.ptxVersion >= 90 && limits.capability >= 90;
  const TensorMaps maps = has_tma ? make_tensor_maps(params) : TensorMaps{};
  if (!maps.usable) {
    throw_error("leanattn::read_rows_floor: not supported where bulk tensor copies cannot be used");
  }
  Boxes boxes;
  boxes.column_blocks = static_cast<int>(ceil_div<int64_t>(params.head_dim, 64));
  boxes.tiles = static_cast<int>(ceil_div<int64_t>(params.problem.capacity, Boxes::kBoxTokens));
  boxes.heads = params.problem.num_heads_kv;
  // A count of 2^31 would be 32 TiB.
  boxes.count = 2 * boxes.column_blocks * boxes.tiles * boxes.heads * params.problem.batch;
  check_cuda(cudaFuncSetAttribute(read_rows_floor_kernel,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
             "cudaFuncSetAttribute");
  read_rows_floor_kernel<<<limits.num_sms, kThreads, kSharedBytes, stream>>>(
      maps.cache[0].tile, maps.cache[1].tile, boxes, sink);
  check_cuda(cudaGetLastError(), "read_rows_floor_kernel");
}

}  // namespace leanattn
