// A GPU that is not there: the CUDA runtime's functions that csrc/ calls, and tensors on the CPU that
// are on CUDA to csrc/. What the real ones refuse throws here.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include "gpu.h"

#include <cute/arch/copy_sm90_tma.hpp>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

void require(bool condition, const std::string& rule) {
  if (!condition) throw std::logic_error("the emulated GPU: " + rule);
}

int number(const char* variable, int otherwise) {
  const char* text = std::getenv(variable);
  return text ? std::atoi(text) : otherwise;
}

// An H200 by default, but for its 132 SMs.
struct Gpu {
  int capability = number("EMULATED_GPU_CAPABILITY", 90);
  int num_sms = number("EMULATED_GPU_SMS", 16);
  int shared_memory_bytes = capability == 80 ? 166912 : capability < 90 ? 101376 : 232448;
};

const Gpu& gpu() {
  static const Gpu gpu;
  return gpu;
}

std::map<const void*, int> shared_memory_of;  // kernels, that cudaFuncSetAttribute was told
std::vector<std::string> launches;

// --- Graphs --------------------------------------------------------------------------------------

struct Graph {
  std::vector<std::function<void()>> nodes;
  std::vector<torch::stable::Tensor> memory;  // allocated while it was captured
};

std::map<int64_t, Graph> graphs;
int64_t capturing = -1;  // the graph

std::mutex mutex;  // one piece of work at a time, whichever threads and streams ask

void enqueue(const std::string& name, std::function<void()> work) {
  const std::lock_guard guard(mutex);
  if (capturing >= 0) {
    graphs[capturing].nodes.push_back(std::move(work));
  } else {
    static const bool is_idle = number("EMULATED_GPU_IDLE", 0);
    if (is_idle) return;
    launches.push_back(name);
    work();
  }
}

}  // namespace

EXPORTED int64_t emulated_gpu_tensor_copies() { return emulator::tensor_copies; }
EXPORTED int emulated_gpu_capability() { return gpu().capability; }
EXPORTED void emulated_gpu_begin_capture(int64_t graph) { capturing = graph; }
EXPORTED void emulated_gpu_end_capture() { capturing = -1; }
EXPORTED void emulated_gpu_replay(int64_t graph) {
  const std::lock_guard guard(mutex);
  for (const auto& node : graphs.at(graph).nodes) node();
}
EXPORTED void emulated_gpu_forget(int64_t graph) { graphs.erase(graph); }

// "kernel" and "Memset", as often as launched, since the last time.
EXPORTED const char* emulated_gpu_launches() {
  static std::string names;
  names.clear();
  for (const std::string& name : launches) names += name + "\n";
  launches.clear();
  return names.c_str();
}

// --- Launches ------------------------------------------------------------------------------------

namespace emulator {

void launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body) {
  const auto one = [](const dim3& dim) { return dim.y == 1 && dim.z == 1; };
  require(one(config.gridDim) && one(config.blockDim), "grids and CTAs have one dimension here");
  const int grid = static_cast<int>(config.gridDim.x);
  const int threads = static_cast<int>(config.blockDim.x);
  require(grid > 0, "a grid of " + std::to_string(grid) + " CTAs");
  require(threads > 0 && threads <= 1024, "CTAs of " + std::to_string(threads) + " threads");
  const int allowed = shared_memory_of.contains(kernel) ? shared_memory_of[kernel] : 49152;
  require(static_cast<int>(config.dynamicSmemBytes) <= allowed,
          std::to_string(config.dynamicSmemBytes) + " bytes of shared memory where " +
              std::to_string(allowed) + " are allowed");
  int cluster_size = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    require(gpu().capability >= 90, "launch attributes that older GPUs don't have");
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& dim = attribute.val.clusterDim;
      require(dim.y == 1 && dim.z == 1 && dim.x <= 8, "a cluster of more than 8 CTAs");
      cluster_size = static_cast<int>(dim.x);
    } else {
      require(attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization,
              "an unknown launch attribute");
    }
  }
  require(grid % cluster_size == 0, "a grid that is no multiple of the cluster");
  require(cluster_size <= gpu().num_sms, "a cluster larger than the GPU");
  enqueue("kernel", [=, bytes = config.dynamicSmemBytes, body = std::move(body)] {
    static int seed = 0;  // events happen in another order in every launch
    emulator::run(grid, cluster_size, threads, bytes, ++seed, body);
  });
}

}  // namespace emulator

// --- The CUDA runtime ----------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated GPU"; }

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = gpu().num_sms;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = gpu().shared_memory_bytes;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = gpu().capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = gpu().capability % 10;
      return cudaSuccess;
    case cudaDevAttrMemoryClockRate:
      *value = 3201000;  // kHz
      return cudaSuccess;
    case cudaDevAttrGlobalMemoryBusWidth:
      *value = 6016 * gpu().num_sms / 132;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  require(capturing < 0, "cudaFuncGetAttributes loads a kernel during a capture");
  *attributes = {};
  attributes->ptxVersion = gpu().capability;
  // Where there is no wgmma, its kernels are empty; nobody asks about the others.
  attributes->numRegs = gpu().capability == 90 ? 168 : 32;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  require(capturing < 0, "cudaFuncSetAttribute during a capture");
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      value > gpu().shared_memory_bytes) {
    return cudaErrorInvalidValue;
  }
  shared_memory_of[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  require(config->numAttrs == 1 && config->attrs[0].id == cudaLaunchAttributeClusterDimension,
          "cudaOccupancyMaxActiveClusters without a cluster");
  require(static_cast<int>(config->dynamicSmemBytes) <= shared_memory_of[kernel],
          "cudaOccupancyMaxActiveClusters with too much shared memory");
  *count = gpu().num_sms / static_cast<int>(config->attrs[0].val.clusterDim.x);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  enqueue("Memset", [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  require(capturing < 0, "a copy to the host during a capture");
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  require(capturing < 0, "cudaStreamSynchronize during a capture");
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing < 0 ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

// --- The driver ----------------------------------------------------------------------------------

namespace {

// What the driver's documentation asks for, and what the emulator can copy: boxes of 128 bytes a row.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* extent, const cuuint64_t* stride_bytes,
                      const cuuint32_t* box, const cuuint32_t* element_strides,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const int element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  bool legal = reinterpret_cast<uintptr_t>(map) % 64 == 0 && rank == 4 &&
               reinterpret_cast<uintptr_t>(address) % 16 == 0 &&
               interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
               swizzle == CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
               box[0] * element_bytes == 128 && box[2] == 1 && box[3] == 1;
  for (int i = 0; i < 4; ++i) {
    legal = legal && extent[i] >= 1 && extent[i] <= cuuint64_t{1} << 32 && box[i] >= 1 &&
            box[i] <= 256 && element_strides[i] == 1;
  }
  for (int i = 0; i < 3; ++i) {
    legal = legal && stride_bytes[i] % 16 == 0 && stride_bytes[i] < cuuint64_t{1} << 40;
  }
  require(legal, "a tensor map that the driver would refuse");
  emulator::TensorMap emulated{
      static_cast<const uint8_t*>(address), element_bytes, {}, {1}, static_cast<int>(box[1])};
  for (int i = 0; i < 4; ++i) emulated.extent[i] = static_cast<int64_t>(extent[i]);
  for (int i = 0; i < 3; ++i) {
    emulated.stride[i + 1] = static_cast<int64_t>(stride_bytes[i]) / element_bytes;
  }
  std::memcpy(static_cast<void*>(map), &emulated, sizeof(emulated));
  return CUDA_SUCCESS;
}

CUresult get_context(CUcontext* context) {
  *context = nullptr;
  return CUDA_SUCCESS;
}

CUresult set_context(CUcontext) { return CUDA_SUCCESS; }

}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned int,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  static const std::map<std::string, void*> functions{
      {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(&encode_tiled)},
      {"cuCtxGetCurrent", reinterpret_cast<void*>(&get_context)},
      {"cuCtxSetCurrent", reinterpret_cast<void*>(&set_context)},
  };
  *function = functions.at(name);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// --- torch ---------------------------------------------------------------------------------------

// csrc/ is compiled to call these in the place of the functions of the names behind emulated_.

namespace {

int32_t get_current_stream(int32_t device, void** stream) {
  *stream = nullptr;
  return device == 0 ? 0 : 1;
}

}  // namespace

extern "C" void* emulated_dlopen(const char* library, int) {
  require(std::string(library) == "libtorch_cuda.so", "an unknown library");
  return &graphs;  // anything
}

extern "C" void* emulated_dlsym(void*, const char* name) {
  require(std::string(name) == "aoti_torch_get_current_cuda_stream", "an unknown function");
  return reinterpret_cast<void*>(&get_current_stream);
}

extern "C" AOTITorchError emulated_aoti_torch_get_device_type(AtenTensorHandle tensor,
                                                              int32_t* type) {
  const AOTITorchError error = aoti_torch_get_device_type(tensor, type);
  if (*type == aoti_torch_device_type_cpu()) *type = aoti_torch_device_type_cuda();
  return error;
}

extern "C" AOTITorchError emulated_aoti_torch_get_device_index(AtenTensorHandle tensor,
                                                               int32_t* index) {
  const AOTITorchError error = aoti_torch_get_device_index(tensor, index);
  if (*index < 0) *index = 0;
  return error;
}

extern "C" AOTITorchError emulated_aoti_torch_empty_strided(int64_t dims, const int64_t* sizes,
                                                            const int64_t* strides, int32_t dtype,
                                                            int32_t type, int32_t index,
                                                            AtenTensorHandle* result) {
  require(type == aoti_torch_device_type_cuda() && index == 0, "a new tensor that is not on it");
  const AOTITorchError error = aoti_torch_empty_strided(
      dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), index, result);
  if (error == 0 && capturing >= 0) {
    AtenTensorHandle kept;
    aoti_torch_new_tensor_handle(*result, &kept);
    graphs[capturing].memory.emplace_back(kept);
  }
  return error;
}

// --- What is not emulated ------------------------------------------------------------------------

namespace leanattn {

struct DecodeParams;

void launch_read_floor(const void*, int64_t, const void*, int64_t, int*, int, cudaStream_t) {
  throw std::logic_error("the emulated GPU has no read floor");
}
void launch_read_rows_floor(const DecodeParams&, int*, int, cudaStream_t) {
  throw std::logic_error("the emulated GPU has no read floor");
}

}  // namespace leanattn
