// A GPU that is not there: the CUDA runtime's functions that csrc/ calls, and tensors on the CPU that
// are on CUDA to csrc/. What the real ones refuse throws here.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include "gpu.h"

#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/counters.h"

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
std::map<void*, size_t> memory;  // of cudaMalloc

// --- Streams and graphs --------------------------------------------------------------------------

struct Node {
  std::string name;
  std::function<void()> work;
};

struct UserObject {
  void* data;
  cudaHostFn_t destroy;
};

// With its executable, which goes when it goes.
struct Graph {
  std::vector<Node> nodes;
  std::vector<torch::stable::Tensor> memory;  // allocated while it was captured
  std::vector<UserObject> user_objects;
};

struct Capture {
  unsigned long long id;
  Graph* graph;
};

std::map<int64_t, Graph> graphs;
std::map<cudaStream_t, Capture> captures;  // of streams that are captured
// By handles, which are used again, unlike ids. The default stream's is 0.
std::map<cudaStream_t, unsigned long long> stream_ids{{nullptr, 0}};
thread_local cudaStream_t current_stream = nullptr;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

std::recursive_mutex mutex;  // one piece of work at a time, whichever threads and streams ask

// Streams have no work of their own: all is done when it is asked for.
void enqueue(cudaStream_t stream, const std::string& name, std::function<void()> work) {
  const std::lock_guard guard(mutex);
  require(stream_ids.contains(stream), "a stream that is gone");
  if (captures.contains(stream)) {
    captures[stream].graph->nodes.push_back({name, std::move(work)});
  } else {
    static const bool is_idle = number("EMULATED_GPU_IDLE", 0);
    if (is_idle) return;
    launches.push_back(name);
    work();
  }
}

void require_no_capture(const std::string& call) {
  const std::lock_guard guard(mutex);
  require(captures.empty(), call + " during a capture");
}

// For what CUDA calls potentially unsafe.
void require_no_capture_or_relaxed(const std::string& call) {
  if (capture_mode != cudaStreamCaptureModeRelaxed) require_no_capture(call);
}

cudaStream_t new_stream() {
  static unsigned long long last_id = 0;
  const std::lock_guard guard(mutex);
  uintptr_t handle = 1;
  while (stream_ids.contains(reinterpret_cast<cudaStream_t>(handle))) ++handle;
  const auto stream = reinterpret_cast<cudaStream_t>(handle);
  stream_ids[stream] = ++last_id;
  return stream;
}

void destroy_stream(cudaStream_t stream) {
  const std::lock_guard guard(mutex);
  require(stream && stream_ids.erase(stream), "a stream that is gone");
}

}  // namespace

extern "C" {
__attribute__((visibility("default"))) int64_t emulated_gpu_free_memory = 64 << 20;
}
EXPORTED int64_t emulated_gpu_tensor_copies() { return emulator::tensor_copies; }
EXPORTED int emulated_gpu_capability() { return gpu().capability; }
EXPORTED cudaStream_t emulated_gpu_new_stream() { return new_stream(); }
EXPORTED void emulated_gpu_destroy_stream(cudaStream_t stream) { destroy_stream(stream); }
EXPORTED cudaStream_t emulated_gpu_set_stream(cudaStream_t stream) {
  return std::exchange(current_stream, stream);
}
// A stream that waits for one that is captured is captured too.
EXPORTED void emulated_gpu_wait(cudaStream_t stream, cudaStream_t other) {
  const std::lock_guard guard(mutex);
  if (captures.contains(other)) captures[stream] = captures[other];
}
EXPORTED void emulated_gpu_begin_capture(int64_t graph) {
  static unsigned long long next_id = 0;
  const std::lock_guard guard(mutex);
  captures[current_stream] = {next_id++, &graphs[graph]};
}
EXPORTED void emulated_gpu_end_capture() {
  const std::lock_guard guard(mutex);
  const unsigned long long id = captures[current_stream].id;
  std::erase_if(captures, [&](const auto& entry) { return entry.second.id == id; });
}
EXPORTED void emulated_gpu_replay(int64_t graph) {
  const std::lock_guard guard(mutex);
  for (const Node& node : graphs.at(graph).nodes) {
    launches.push_back(node.name);
    node.work();
  }
}
EXPORTED void emulated_gpu_forget(int64_t graph) {
  const std::lock_guard guard(mutex);
  for (const UserObject& object : graphs[graph].user_objects) object.destroy(object.data);
  graphs.erase(graph);
}

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
    require(attribute.id == cudaLaunchAttributeClusterDimension, "an unknown launch attribute");
    const auto& dim = attribute.val.clusterDim;
    require(dim.y == 1 && dim.z == 1 && dim.x <= 8, "a cluster of more than 8 CTAs");
    cluster_size = static_cast<int>(dim.x);
  }
  require(grid % cluster_size == 0, "a grid that is no multiple of the cluster");
  require(cluster_size <= gpu().num_sms, "a cluster larger than the GPU");
  enqueue(config.stream, "kernel", [=, bytes = config.dynamicSmemBytes, body = std::move(body)] {
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
  require_no_capture("cudaFuncGetAttributes, which loads a kernel,");
  *attributes = {};
  attributes->ptxVersion = gpu().capability;
  // Where there is no wgmma, its kernels are empty; nobody asks about the others.
  attributes->numRegs = gpu().capability == 90 ? 168 : 32;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  require_no_capture("cudaFuncSetAttribute");
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

cudaError_t cudaMalloc(void** address, size_t bytes) {
  require_no_capture_or_relaxed("cudaMalloc");
  const std::lock_guard guard(mutex);
  if (static_cast<int64_t>(bytes) > emulated_gpu_free_memory) return cudaErrorMemoryAllocation;
  emulated_gpu_free_memory -= bytes;
  *address = std::malloc(bytes);
  std::memset(*address, 0x5a, bytes);  // it may hold anything
  memory[*address] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  require_no_capture_or_relaxed("cudaFree");
  const std::lock_guard guard(mutex);
  emulated_gpu_free_memory += memory.at(address);
  memory.erase(address);
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  enqueue(stream, "Memset", [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  require_no_capture("a copy to the host");
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  // Any other waits for the default stream, and that for it.
  require(flags == cudaStreamNonBlocking, "a blocking stream");
  require_no_capture_or_relaxed("cudaStreamCreateWithFlags");
  *stream = new_stream();
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  destroy_stream(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  const std::lock_guard guard(mutex);
  require(!captures.contains(stream), "cudaStreamGetId of a stream that is captured");
  *id = stream_ids.at(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  require_no_capture_or_relaxed("cudaStreamSynchronize");
  const std::lock_guard guard(mutex);
  require(!captures.contains(stream), "cudaStreamSynchronize of a stream that is captured");
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}

#if CUDART_VERSION < 13000
#define cudaStreamGetCaptureInfo cudaStreamGetCaptureInfo_v3
#endif
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  const std::lock_guard guard(mutex);
  const auto found = captures.find(stream);
  *status = cudaStreamCaptureStatusNone;
  if (found == captures.end()) return cudaSuccess;
  *status = cudaStreamCaptureStatusActive;
  if (id) *id = found->second.id;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(found->second.graph);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* data, cudaHostFn_t destroy,
                                 unsigned references, unsigned flags) {
  require(references == 1 && flags == cudaUserObjectNoDestructorSync, "another user object");
  *object = reinterpret_cast<cudaUserObject_t>(new UserObject{data, destroy});
  return cudaSuccess;
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object,
                                      unsigned references, unsigned flags) {
  require(references == 1 && flags == cudaGraphUserObjectMove, "a reference that is not moved");
  UserObject* const moved = reinterpret_cast<UserObject*>(object);
  const std::lock_guard guard(mutex);
  reinterpret_cast<Graph*>(graph)->user_objects.push_back(*moved);
  delete moved;
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
  *stream = current_stream;
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
  const std::lock_guard guard(mutex);
  if (error == 0 && captures.contains(current_stream)) {
    AtenTensorHandle kept;
    aoti_torch_new_tensor_handle(*result, &kept);
    captures[current_stream].graph->memory.emplace_back(kept);
  }
  return error;
}

// --- What tests ask of csrc/ itself --------------------------------------------------------------

EXPORTED void* emulated_gpu_own_counters(int n, int device) {
  return leanattn::own_counters(n, device, current_stream);
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
