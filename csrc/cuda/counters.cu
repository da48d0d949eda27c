#include "counters.h"

#include <array>
#include <atomic>
#include <cstddef>
#include <mutex>
#include <unordered_map>

#include "launch.h"

namespace leanattn {
namespace {

constexpr int kCountersPerSet = 1024;  // a launch has a unit a SM, and no more counters than units
constexpr int kSetsPerSlab = 256;      // 1 MiB
// Nobody says when a stream is gone, so that its set is kept: a bound for those who make ever new ones.
constexpr int kMaxStreams = 4096;

// Whose launches follow each other. By ids, for the handles of what is gone are used again. But a stream
// that captures cannot be asked for its id, which would break the capture off: there it is the handle. A
// stream that has ended within a capture was joined with another, and what follows on its handle waits.
struct Owner {
  unsigned long long capture;  // or kNoCapture
  unsigned long long stream;
  bool operator==(const Owner&) const = default;
};
constexpr unsigned long long kNoCapture = ~0ull;

struct OwnerHash {
  size_t operator()(const Owner& owner) const { return owner.capture * 0x9e3779b1 + owner.stream; }
};

struct Pool;

struct Set {
  int32_t* counters;
  Pool* pool;
  Owner owner;
  Set* next;  // of those that are free, or given back
};

// Of one device.
struct Pool {
  std::mutex mutex;  // of all but given_back
  std::unordered_map<Owner, Set*, OwnerHash> sets;
  int num_streams = 0;  // outside captures, that have a set
  int num_slabs = 0;
  Set* free = nullptr;
  std::atomic<Set*> given_back = nullptr;
};

Pool& pool_of(int device) {
  // Never destroyed: as a process ends, graphs may go after everything of ours.
  static auto& pools = *new std::array<Pool, kMaxDevices>;
  return pools.at(device);
}

// Called by CUDA when a graph, all its executables and their launches are gone. It may hold locks then,
// and somebody who holds the pool's mutex may wait for them: so without that, nor any call of CUDA.
void CUDART_CB give_back(void* data) {
  Set* set = static_cast<Set*>(data);
  std::atomic<Set*>& first = set->pool->given_back;
  set->next = first.load(std::memory_order_relaxed);
  while (!first.compare_exchange_weak(set->next, set, std::memory_order_release,
                                      std::memory_order_relaxed)) {
  }
}

// Leaves no error behind for others to find.
bool succeeded(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status == cudaSuccess;
}

constexpr size_t kSlabBytes = sizeof(int32_t) * kCountersPerSet * kSetsPerSlab;

// Zeroed on a stream of its own, which no capture sees. Null where there is no memory.
int32_t* new_slab() {
  // While any thread captures, others too must not allocate unless they say that they know.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  if (!succeeded(cudaThreadExchangeStreamCaptureMode(&mode))) return nullptr;
  void* slab = nullptr;
  cudaStream_t stream = nullptr;
  const bool is_zero = succeeded(cudaMalloc(&slab, kSlabBytes)) &&
                       succeeded(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)) &&
                       succeeded(cudaMemsetAsync(slab, 0, kSlabBytes, stream)) &&
                       succeeded(cudaStreamSynchronize(stream));
  if (stream) succeeded(cudaStreamDestroy(stream));
  if (slab && !is_zero) succeeded(cudaFree(slab));
  succeeded(cudaThreadExchangeStreamCaptureMode(&mode));
  return is_zero ? static_cast<int32_t*>(slab) : nullptr;
}

// Whether there is a free set, if need be from a new slab. Under the mutex, as what follows.
bool has_free_set(Pool& pool) {
  for (Set* set = pool.given_back.exchange(nullptr, std::memory_order_acquire); set;) {
    Set* const next = set->next;
    pool.sets.erase(set->owner);
    set->next = pool.free;
    pool.free = set;
    set = next;
  }
  if (pool.free) return true;
  int32_t* const slab = new_slab();
  if (!slab) return false;
  ++pool.num_slabs;
  Set* const sets = new Set[kSetsPerSlab];
  for (int i = kSetsPerSlab - 1; i >= 0; --i) {
    sets[i] = {slab + i * kCountersPerSet, &pool, {}, pool.free};
    pool.free = &sets[i];
  }
  return true;
}

// A set for an owner that has none. `graph`: what is captured, if anything.
Set* take_set(Pool& pool, const Owner& owner, cudaGraph_t graph) {
  if (!graph && pool.num_streams == kMaxStreams) return nullptr;
  if (!has_free_set(pool)) return nullptr;
  Set* const set = pool.free;
  pool.sets.emplace(owner, set);
  pool.free = set->next;
  set->owner = owner;
  if (!graph) {
    ++pool.num_streams;
    return set;
  }
  // The executables of the graph will have references too. Without one the set is kept for ever.
  cudaUserObject_t object;
  if (succeeded(cudaUserObjectCreate(&object, set, give_back, 1, cudaUserObjectNoDestructorSync))) {
    succeeded(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove));
  }
  return set;
}

#if CUDART_VERSION < 13000
constexpr auto get_capture_info = cudaStreamGetCaptureInfo_v3;
#else
constexpr auto get_capture_info = cudaStreamGetCaptureInfo;
#endif

}  // namespace

int32_t* own_counters(int n, int device, cudaStream_t stream) {
  if (n > kCountersPerSet) return nullptr;
  cudaStreamCaptureStatus status;
  cudaGraph_t graph = nullptr;
  Owner owner{kNoCapture, 0};
  const cudaError_t error =
      get_capture_info(stream, &status, &owner.capture, &graph, nullptr, nullptr, nullptr);
  // What is wrong with a capture or a stream, the launch will say.
  if (!succeeded(error) || status == cudaStreamCaptureStatusInvalidated) return nullptr;
  if (status == cudaStreamCaptureStatusActive) {
    owner.stream = reinterpret_cast<uintptr_t>(stream);
  } else {
    owner.capture = kNoCapture;
    graph = nullptr;
    if (!succeeded(cudaStreamGetId(stream, &owner.stream))) return nullptr;
  }
  Pool& pool = pool_of(device);
  const std::lock_guard lock(pool.mutex);
  const auto found = pool.sets.find(owner);
  const Set* const set = found != pool.sets.end() ? found->second : take_set(pool, owner, graph);
  return set ? set->counters : nullptr;
}

void reserve_counters(int device) {
  Pool& pool = pool_of(device);
  const std::lock_guard lock(pool.mutex);
  has_free_set(pool);
}

int64_t counter_bytes(int device) {
  Pool& pool = pool_of(device);
  const std::lock_guard lock(pool.mutex);
  return static_cast<int64_t>(pool.num_slabs * kSlabBytes);
}

}  // namespace leanattn
