// Everything about a launch that does not depend on the kernel's instantiation, and the one place
// where run-time values become template arguments.
#include "launch.h"

#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "host_util.h"
#include "kernel/traits.h"

namespace leanattn {

// Defined in launch_kernel.h, instantiated in instantiate/*.cu.
template <class Traits>
const KernelSetup& setup_kernel(int device);
template <class Traits>
void launch_kernel(const DecodeParams& params, int device, cudaStream_t stream);

void throw_error(const std::string& message) { throw std::runtime_error(message); }

void check_cuda(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a sticky error stays, any other must not surface in somebody else's check
  throw_error(std::string("leanattn: ") + call + " failed: " + cudaGetErrorString(status));
}

const DeviceLimits& device_limits(int device) {
  static std::array<DeviceLimits, kMaxDevices> limits;
  static std::array<std::once_flag, kMaxDevices> once;
  std::call_once(once.at(device), [&] {
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
      return value;
    };
    limits[device].num_sms = ask(cudaDevAttrMultiProcessorCount);
    limits[device].shared_memory_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    limits[device].capability =
        ask(cudaDevAttrComputeCapabilityMajor) * 10 + ask(cudaDevAttrComputeCapabilityMinor);
    // Two transfers a clock, which is in kHz; where it is not told, what an H100's SM has.
    const double by_clock =
        2.0 * ask(cudaDevAttrMemoryClockRate) * 1e-3 * ask(cudaDevAttrGlobalMemoryBusWidth) / 8;
    limits[device].bytes_per_us = by_clock > 0.0 ? by_clock : 25e3 * limits[device].num_sms;
  });
  return limits[device];
}

namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Through the runtime, so that libcuda is not needed at link time. Null on drivers without it.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                                12000, cudaEnableDefault, &result);
    const bool found = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
    if (!found) cudaGetLastError();
    return reinterpret_cast<EncodeTiled>(found ? entry : nullptr);
  }();
  return function;
}

bool loader_is_cp_async() {
  const char* loader = std::getenv("LEANATTN_LOADER");
  if (!loader || !*loader || std::strcmp(loader, "tma") == 0) return false;
  if (std::strcmp(loader, "cp_async") == 0) return true;
  throw_error(std::string("leanattn: LEANATTN_LOADER must be 'tma' or 'cp_async', got '") + loader +
              "'");
}

// The extents and strides of a cache, outermost dimension last, as a tensor map wants them.
struct MapShape {
  const void* data;
  cuuint64_t extent[4];        // elements: head dim, tokens, heads, batch or pages
  int64_t stride_elements[3];  // tokens, heads, batch or pages
};

bool encode(const MapShape& shape, ElementType type, int box_rows, CUtensorMap& map) {
  constexpr cuuint64_t kMaxStride = cuuint64_t{1} << 40;
  cuuint64_t stride_bytes[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t bytes = shape.stride_elements[i] * 2;
    // The stride of a single row means nothing and may be anything; a tensor map wants it legal.
    stride_bytes[i] = shape.extent[i + 1] == 1 ? 16 : static_cast<cuuint64_t>(bytes);
    if (stride_bytes[i] == 0 || stride_bytes[i] % 16 != 0 || stride_bytes[i] >= kMaxStride) {
      return false;
    }
  }
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUtensorMapDataType data_type = type == ElementType::kFloat16
                                            ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  // 256-byte L2 promotion would drag the neighbouring head in where rows are 128 bytes long.
  const CUresult result = encode_tiled()(
      &map, data_type, 4, const_cast<void*>(shape.data), shape.extent, stride_bytes, box,
      element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS;
}

}  // namespace

TensorMaps make_tensor_maps(const DecodeParams& params) {
  TensorMaps maps{};
  const Problem& problem = params.problem;
  if (loader_is_cp_async() || problem.capacity == 0 || !encode_tiled()) return maps;
  maps.tile_box_rows_log2 = problem.tile_tokens_log2;
  int rows = problem.capacity;
  int pages = problem.batch;
  const int heads = problem.num_heads_kv;
  if (params.block_table) {
    rows = params.page_size;
    pages = params.num_pages;
    // No box may go beyond its page, and all are equally large.
    maps.tile_box_rows_log2 = min_of(maps.tile_box_rows_log2, std::countr_zero<unsigned>(rows));
    if (maps.tile_box_rows_log2 < kMinBoxRowsLog2) return maps;
  }
  maps.rows_box_rows_log2 = min_of(maps.tile_box_rows_log2, kBoxRowsLog2);
  const auto extent = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const MapShape k{params.k,
                   {extent(params.head_dim), extent(rows), extent(heads), extent(pages)},
                   {params.k_seq_stride, params.k_head_stride, params.k_batch_stride}};
  const MapShape v{params.v,
                   {extent(params.head_dim_v), extent(rows), extent(heads), extent(pages)},
                   {params.v_seq_stride, params.v_head_stride, params.v_batch_stride}};
  const auto encode_both = [&](const MapShape& shape, CacheMaps& cache_maps) {
    return encode(shape, params.element_type, 1 << maps.tile_box_rows_log2, cache_maps.tile) &&
           encode(shape, params.element_type, 1 << maps.rows_box_rows_log2, cache_maps.rows);
  };
  maps.usable = encode_both(k, maps.k) && encode_both(v, maps.v);
  return maps;
}

namespace {

// Calls visit.operator()<Traits>() with the kernel for these values.
template <class Element, int kHeadDim, class Visit>
void dispatch_rows(int rows, Visit visit) {
  switch (rows) {
    case 8:
      return visit.template operator()<DecodeTraits<Element, kHeadDim, 8>>();
    case 16:
      return visit.template operator()<DecodeTraits<Element, kHeadDim, 16>>();
    case 32:
      return visit.template operator()<DecodeTraits<Element, kHeadDim, 32>>();
    default:
      return visit.template operator()<DecodeTraits<Element, kHeadDim, 64>>();
  }
}

template <class Element, class Visit>
void dispatch_head_dim(int head_dim, int rows, Visit visit) {
  if (head_dim <= 64) return dispatch_rows<Element, 64>(rows, visit);
  if (head_dim <= 128) return dispatch_rows<Element, 128>(rows, visit);
  return dispatch_rows<Element, 256>(rows, visit);
}

template <class Visit>
void dispatch(ElementType type, int head_dim, int rows, Visit visit) {
  if (type == ElementType::kFloat16) return dispatch_head_dim<__half>(head_dim, rows, visit);
  return dispatch_head_dim<__nv_bfloat16>(head_dim, rows, visit);
}

}  // namespace

void launch_decode(const DecodeParams& params, int num_counters, bool zero_counters, int device,
                   cudaStream_t stream) {
  if (zero_counters) {
    check_cuda(cudaMemsetAsync(params.counters, 0, num_counters * sizeof(int32_t), stream),
               "cudaMemsetAsync");
  }
  dispatch(params.element_type, max_of(params.head_dim, params.head_dim_v),
           params.problem.rows_per_item,
           [&]<class Traits>() { launch_kernel<Traits>(params, device, stream); });
}

int rows_per_item_for(const DecodeParams& params, int64_t rows, int device) {
  int fit = 0;
  for (const int candidate : {8, 16, 32, 64}) {
    bool fits = false;
    dispatch(params.element_type, max_of(params.head_dim, params.head_dim_v), candidate,
             [&]<class Traits>() { fits = setup_kernel<Traits>(device).num_stages > 0; });
    if (!fits) break;
    fit = candidate;
    if (rows <= candidate) break;
  }
  if (fit == 0) throw_error("leanattn: this device has too little shared memory for its head dim");
  return fit;
}

Machine machine_for(const DecodeParams& params, int device) {
  Machine machine{device_limits(device).num_sms, device_limits(device).bytes_per_us, {}};
  dispatch(
      params.element_type, max_of(params.head_dim, params.head_dim_v), params.problem.rows_per_item,
      [&]<class Traits>() { machine.max_clusters = setup_kernel<Traits>(device).max_clusters; });
  return machine;
}

void warm_up(int device) {
  for (const ElementType type : {ElementType::kFloat16, ElementType::kBFloat16}) {
    for (const int head_dim : {64, 128, 256}) {
      for (const int rows : {8, 16, 32, 64}) {
        dispatch(type, head_dim, rows, [&]<class Traits>() { setup_kernel<Traits>(device); });
      }
    }
  }
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

std::vector<int32_t> copy_to_host(const int32_t* values, int64_t stride, int n,
                                  cudaStream_t stream) {
  std::vector<int32_t> host(n);
  const int at_once = stride == 1 ? n : 1;
  for (int i = 0; i < n; i += at_once) {
    check_cuda(cudaMemcpyAsync(&host[i], values + i * stride, at_once * sizeof(int32_t),
                               cudaMemcpyDeviceToHost, stream),
               "cudaMemcpyAsync");
  }
  check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  return host;
}

}  // namespace leanattn
