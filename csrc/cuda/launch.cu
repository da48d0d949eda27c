// Everything about a launch that does not depend on the kernel's instantiation, and the one place
// where run-time values become template arguments.
#include "launch.h"

#include <array>
#include <bit>
#include <mutex>
#include <stdexcept>

#include "host_util.h"
#include "kernel/traits.h"
#include "kernel/vector.h"
#include "plan/knobs.h"
#include "plan/plan_error.h"

namespace leanattn {

// Defined in launch_kernel.h, instantiated in instantiate/*.cu.
template <class Traits>
const KernelSetup& setup_kernel(int device);
template <class Traits>
void launch_kernel(const typename Traits::Params& params, const TensorMaps& maps, int device,
                   cudaStream_t stream);

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

auto encode_tiled() {
  static const auto function =
      driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  return function;
}

// The extents and strides of a cache, outermost dimension last, as a tensor map wants them.
struct MapShape {
  const void* data;
  cuuint64_t extent[4];        // elements: head dim, tokens, heads, batch or pages
  int64_t stride_elements[3];  // tokens, heads, batch or pages
};

bool encode(const MapShape& shape, CacheType type, int box_rows, CUtensorMap& map) {
  const bool float8 = is_float8(type);
  constexpr cuuint64_t kMaxStride = cuuint64_t{1} << 40;
  cuuint64_t stride_bytes[3];
  // The copy engine wants 16-byte boundaries, which caches need not have.
  if (reinterpret_cast<uintptr_t>(shape.data) % 16 != 0) return false;
  for (int i = 0; i < 3; ++i) {
    const int64_t bytes = shape.stride_elements[i] * (float8 ? 1 : 2);
    // The stride of a single row means nothing and may be anything; a tensor map wants it legal.
    stride_bytes[i] = shape.extent[i + 1] == 1 ? 16 : static_cast<cuuint64_t>(bytes);
    if (stride_bytes[i] == 0 || stride_bytes[i] % 16 != 0 || stride_bytes[i] >= kMaxStride) {
      return false;
    }
  }
  const cuuint32_t box[4] = {float8 ? 128u : 64u, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUtensorMapDataType data_type = float8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                        : type == CacheType::kFloat16
                                            ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  // 256-byte L2 promotion would drag the neighbouring head in where rows are 128 bytes long.
  const CUresult result = encode_tiled()(
      &map, data_type, 4, const_cast<void*>(shape.data), shape.extent, stride_bytes, box,
      element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  // Asked for by name, it must not be something else that works instead.
  if (result != CUDA_SUCCESS && knob("LEANATTN_LOADER") == "tma") {
    throw_error("leanattn: cuTensorMapEncodeTiled failed with " + std::to_string(result));
  }
  return result == CUDA_SUCCESS;
}

}  // namespace

TensorMaps make_tensor_maps(const DecodeParams& params) {
  TensorMaps maps{};
  const Problem& problem = params.problem;
  const bool is_empty = problem.capacity == 0 || problem.batch == 0;
  if (knob_is_second("LEANATTN_LOADER", "tma", "cp_async") || is_empty || !encode_tiled())
    return maps;
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
                   {extent(params.k_columns), extent(rows), extent(heads), extent(pages)},
                   {params.k_seq_stride, params.k_head_stride, params.k_batch_stride}};
  const MapShape v{params.v,
                   {extent(params.v_columns), extent(rows), extent(heads), extent(pages)},
                   {params.v_seq_stride, params.v_head_stride, params.v_batch_stride}};
  const auto encode_both = [&](const MapShape& shape, CacheMaps& cache_maps) {
    return encode(shape, params.cache_type, 1 << maps.tile_box_rows_log2, cache_maps.tile) &&
           encode(shape, params.cache_type, 1 << maps.rows_box_rows_log2, cache_maps.rows);
  };
  maps.usable = encode_both(k, maps.cache[0]) && encode_both(v, maps.cache[1]);
  return maps;
}

namespace {

enum class FeatureSet { kLean, kMasked, kAll };

// A compile-time set of values for a kernel, and the run-time ones that choose it.
struct KernelKey {
  bool float8;
  int head_dim;
  int rows;
  Kind kind;
  FeatureSet features = FeatureSet::kAll;
  bool bfloat16 = false;  // of the other two:
  bool paged = false;
};

// Calls visit.operator()<Traits>() with the kernel for `key`, or not at all if there is none.
template <int kHeadDim, class CacheElement, class Visit>
void dispatch_rows(const KernelKey& key, Visit visit) {
  constexpr bool kFloat8 = std::is_same_v<CacheElement, Float8>;
  constexpr bool kHasWgmma = !kFloat8;
  const auto with = [&]<int kRows, Kind kKind, class Features = AllFeatures>() {
    if (key.rows != kRows || key.kind != kKind) return;
    visit.template operator()<DecodeTraits<kHeadDim, kRows, kKind, CacheElement, Features>>();
  };
  // Of few features, for one dtype and one kind of cache each.
  const auto with_few = [&]<class Features>(FeatureSet features) {
    if (key.features != features || key.bfloat16 != Features::kBFloat16) return;
    if (key.paged != Features::kPaged) return;
    if constexpr (kHeadDim == kMaxHeadDim) {
      with.template operator()<16, Kind::kWgmmaKeys, Features>();
      with.template operator()<64, Kind::kWgmma, Features>();
    } else {
      with.template operator()<8, Kind::kMma, Features>();
      with.template operator()<16, Kind::kMma, Features>();
    }
  };
  if constexpr (kHeadDim != kMaxHeadDim) {
    with_few.template operator()<LeanFeatures<true, false>>(FeatureSet::kLean);
    with_few.template operator()<LeanFeatures<true, true>>(FeatureSet::kLean);
    if constexpr (!kFloat8) {
      with_few.template operator()<LeanFeatures<false, false>>(FeatureSet::kLean);
      with_few.template operator()<LeanFeatures<false, true>>(FeatureSet::kLean);
      with_few.template operator()<MaskedFeatures<false>>(FeatureSet::kMasked);
      with_few.template operator()<MaskedFeatures<true>>(FeatureSet::kMasked);
    }
  }
  if constexpr (kHeadDim == kMaxHeadDim && kHasWgmma) {
    with_few.template operator()<LeanFeatures<true, false>>(FeatureSet::kLean);
    with_few.template operator()<LeanFeatures<true, true>>(FeatureSet::kLean);
  }
  if (key.features != FeatureSet::kAll) return;
  if constexpr (kHeadDim == kMaxHeadDim) {
    // Fewer rows, and by mma more than 16 at a time, have no kernel of their own.
    with.template operator()<16, Kind::kMma>();
    with.template operator()<16, Kind::kTree>();
    if constexpr (kHasWgmma) {
      with.template operator()<16, Kind::kWgmmaKeys>();
      with.template operator()<32, Kind::kWgmmaKeys>();
      with.template operator()<64, Kind::kWgmma>();
    }
  } else {
    with.template operator()<8, Kind::kMma>();
    with.template operator()<16, Kind::kMma>();
    with.template operator()<32, Kind::kMma>();
    with.template operator()<64, Kind::kMma>();
    with.template operator()<8, Kind::kTree>();
    with.template operator()<16, Kind::kTree>();
    if constexpr (kHasWgmma) {
      with.template operator()<32, Kind::kWgmma>();
      with.template operator()<64, Kind::kWgmma>();
      // For more of D, q alone would fill the shared memory.
      if constexpr (kHeadDim <= 128) with.template operator()<128, Kind::kWgmma>();
    }
  }
}

template <class CacheElement, class Visit>
void dispatch_head_dim(const KernelKey& key, Visit visit) {
  // Rows of float8 have at least 128 numbers there.
  if constexpr (!std::is_same_v<CacheElement, Float8>) {
    if (key.head_dim <= 64) return dispatch_rows<64, CacheElement>(key, visit);
  }
  if (key.head_dim <= 128) return dispatch_rows<128, CacheElement>(key, visit);
  if (key.head_dim <= 256) return dispatch_rows<256, CacheElement>(key, visit);
  return dispatch_rows<kMaxHeadDim, CacheElement>(key, visit);
}

template <class Visit>
void dispatch(const KernelKey& key, Visit visit) {
  if (key.float8) return dispatch_head_dim<Float8>(key, visit);
  return dispatch_head_dim<Float16>(key, visit);
}

// The same for a kernel that appends on the way; of a key, head_dim, rows, bfloat16 and paged count.
template <class Visit>
void dispatch_append(const KernelKey& key, Visit visit) {
  const auto with = [&]<int kHeadDim, int kRows, bool kBFloat16, bool kPaged>() {
    if (padded_head_dim(key.head_dim) != kHeadDim || key.rows != kRows) return;
    if (key.bfloat16 != kBFloat16 || key.paged != kPaged) return;
    visit.template operator()<
        DecodeTraits<kHeadDim, kRows, Kind::kMma, Float16, AppendFeatures<kBFloat16, kPaged>>>();
  };
  const auto with_rows = [&]<int kHeadDim, bool kBFloat16, bool kPaged>() {
    with.template operator()<kHeadDim, 8, kBFloat16, kPaged>();
    with.template operator()<kHeadDim, 16, kBFloat16, kPaged>();
  };
  const auto with_head_dims = [&]<bool kBFloat16, bool kPaged>() {
    with_rows.template operator()<64, kBFloat16, kPaged>();
    with_rows.template operator()<128, kBFloat16, kPaged>();
  };
  with_head_dims.template operator()<true, false>();
  with_head_dims.template operator()<true, true>();
  with_head_dims.template operator()<false, false>();
  with_head_dims.template operator()<false, true>();
}

// Where the driver took code of sm_90a, which runs on 9.0 alone.
bool can_use_wgmma(int device) {
  return setup_kernel<DecodeTraits<64, 32, Kind::kWgmma>>(device).num_stages > 0;
}

constexpr int kRowCounts[] = {8, 16, 32, 64, 128};

KernelKey make_key(const DecodeParams& params, int rows, int device) {
  const int head_dim = max_of(params.head_dim, params.head_dim_v);
  const auto kind = [&] {
    if (params.batch_invariant) return Kind::kTree;
    // wgmma reads keys and values as they lie in the ring.
    if (is_float8(params.cache_type) || !can_use_wgmma(device)) return Kind::kMma;
    if (padded_head_dim(head_dim) == kMaxHeadDim && rows < 64) return Kind::kWgmmaKeys;
    return rows < kFewestWgmmaRows ? Kind::kMma : Kind::kWgmma;
  };
  return {is_float8(params.cache_type), head_dim, rows, kind()};
}

// Whether rows of the caches begin on 16-byte boundaries and are whole 16 bytes.
bool has_whole_rows(const DecodeParams& params) {
  const int64_t elements = params.k_batch_stride | params.k_seq_stride | params.k_head_stride |
                           params.v_batch_stride | params.v_seq_stride | params.v_head_stride |
                           params.k_columns | params.v_columns;
  const auto addresses =
      reinterpret_cast<uintptr_t>(params.k) | reinterpret_cast<uintptr_t>(params.v);
  const int64_t bytes = elements * (is_float8(params.cache_type) ? 1 : 2);
  return (static_cast<int64_t>(addresses) | bytes) % 16 == 0;
}

// The fewest features that do for a call, and no fewer than LEANATTN_FEATURES says.
FeatureSet features_of(const DecodeParams& params) {
  const std::string_view fewest = knob("LEANATTN_FEATURES");
  const bool is_lean = fewest.empty() || fewest == "lean";
  if (!is_lean && fewest != "masked" && fewest != "all") {
    throw PlanError("LEANATTN_FEATURES", "must be 'lean', 'masked' or 'all', got '", fewest, "'");
  }
  if (fewest == "all" || params.batch_invariant || params.head_pairs || params.float32_out ||
      !params.problem.shard.is_whole() || !has_whole_rows(params)) {
    return FeatureSet::kAll;
  }
  const bool has_plain_scores = params.softcap == 0.0f && !params.alibi_slopes;
  const bool is_plain = is_lean && has_plain_scores && has_plain_items(params.problem);
  if (!is_float8(params.cache_type)) return is_plain ? FeatureSet::kLean : FeatureSet::kMasked;
  const bool is_usual =
      params.cache_type == CacheType::kFloat8E4M3 && params.element_type == ElementType::kBFloat16;
  return is_plain && is_usual ? FeatureSet::kLean : FeatureSet::kAll;
}

// In a build for measuring: LEANATTN_TIMELINE_MEMORY is the address of uint64 [calls, max_units, kNumMarks],
// of which each launch takes the next [max_units, kNumMarks].
void set_timeline([[maybe_unused]] DecodeParams& params) {
#ifdef LEANATTN_TIMELINE
  static uint64_t* next = nullptr;
  static std::string text;
  const std::string_view memory = knob("LEANATTN_TIMELINE_MEMORY");
  if (memory != text) {
    text = memory;
    next = reinterpret_cast<uint64_t*>(std::strtoull(text.c_str(), nullptr, 0));
  }
  params.timeline = next;
  if (next) next += kMaxTimelineUnits * kNumMarks;
#endif
}

// What comes before the kernel.
void prepare_launch(DecodeParams& params, int num_counters, bool zero_counters,
                    cudaStream_t stream) {
  set_timeline(params);
  if (!zero_counters) return;
  check_cuda(cudaMemsetAsync(params.counters, 0, num_counters * sizeof(int32_t), stream),
             "cudaMemsetAsync");
}

}  // namespace

void launch_decode(DecodeParams params, int num_counters, bool zero_counters, int device,
                   cudaStream_t stream) {
  prepare_launch(params, num_counters, zero_counters, stream);
  KernelKey key = make_key(params, params.problem.rows_per_item, device);
  const TensorMaps maps =
      device_limits(device).capability >= 90 ? make_tensor_maps(params) : TensorMaps{};
  bool is_launched = false;
  const auto launch = [&]<class Traits>() {
    const KernelSetup& setup = setup_kernel<Traits>(device);
    const bool has_loader = !Traits::Features::kFixedLoader || !setup.has_tma || maps.usable;
    if (setup.num_stages == 0 || !has_loader) return;
    launch_kernel<Traits>(params, setup.has_tma ? maps : TensorMaps{}, device, stream);
    is_launched = true;
  };
  key.features = features_of(params);
  key.bfloat16 = params.element_type == ElementType::kBFloat16;
  key.paged = params.block_table != nullptr;
  dispatch(key, launch);
  if (is_launched) return;
  key.features = FeatureSet::kAll;
  dispatch(key, launch);
}

namespace {

// Whether bulk copies and vectors of 8 numbers can move rows.
bool moves_in_bulk(const Rows& rows, int head_dim) {
  return is_aligned(rows.data, 16) && (head_dim == 1 || rows.dim_stride == 1) &&
         rows.batch_stride % 8 == 0 && rows.seq_stride % 8 == 0 && rows.head_stride % 8 == 0;
}

bool moves_in_bulk(const RopeTable& table, int bytes_of_number) {
  return is_aligned(table.data, 16) && table.dim_stride == 1 &&
         table.position_stride * bytes_of_number % 16 == 0;
}

bool allows_append(const DecodeParams& params, const AppendParams& append) {
  if (knob_is_second("LEANATTN_LAUNCHES", "1", "2")) return false;
  if (features_of(params) != FeatureSet::kLean || is_float8(params.cache_type) ||
      params.problem.capacity == 0) {
    return false;
  }
  const Rope& rope = append.rope;
  const int number = rope.tables_are_float32 ? 4 : 2;
  const bool rotates =
      rope.num_pairs == 0 || (rope.num_pairs % 8 == 0 && moves_in_bulk(rope.cos, number) &&
                              moves_in_bulk(rope.sin, number));
  return rotates && moves_in_bulk(append.k, params.head_dim) &&
         moves_in_bulk(append.v, params.head_dim_v);
}

}  // namespace

bool launch_append_decode(const DecodeParams& params, const AppendParams& append, int num_counters,
                          bool zero_counters, int device, cudaStream_t stream) {
  if (device_limits(device).capability < 90 || !allows_append(params, append)) return false;
  KernelKey key = make_key(params, params.problem.rows_per_item, device);
  key.bfloat16 = params.element_type == ElementType::kBFloat16;
  key.paged = params.block_table != nullptr;
  bool is_launched = false;
  dispatch_append(key, [&]<class Traits>() {
    const KernelSetup& setup = setup_kernel<Traits>(device);
    if (setup.num_stages == 0 || !setup.has_tma) return;
    const TensorMaps maps = make_tensor_maps(params);
    if (!maps.usable) return;
    AppendDecodeParams both{params, append};
    prepare_launch(both, num_counters, zero_counters, stream);
    launch_kernel<Traits>(both, maps, device, stream);
    is_launched = true;
  });
  return is_launched;
}

int CudaDevice::capability() const { return device_limits(device_).capability; }

ItemShape CudaDevice::item_shape(const DecodeParams& params, int64_t rows) const {
  ItemShape fit{};
  for (const int candidate : kRowCounts) {
    bool fits = false;
    dispatch(make_key(params, candidate, device_), [&]<class Traits>() {
      fits = setup_kernel<Traits>(device_).num_stages >= Traits::kFewestStages;
      if (fits) fit = {candidate, Traits::kTileLog2};
    });
    if (fits && rows <= candidate) break;
  }
  if (fit.rows == 0) {
    throw_error("leanattn: head dims " + std::to_string(params.head_dim) + " and " +
                std::to_string(params.head_dim_v) +
                " need more shared memory than this device has for a CTA, " +
                std::to_string(device_limits(device_).shared_memory_bytes) + " bytes");
  }
  return fit;
}

Machine CudaDevice::machine(const DecodeParams& params) const {
  Machine machine{device_limits(device_).num_sms, device_limits(device_).bytes_per_us, {}};
  dispatch(make_key(params, params.problem.rows_per_item, device_), [&]<class Traits>() {
    machine.max_clusters = setup_kernel<Traits>(device_).max_clusters;
  });
  return machine;
}

void warm_up(int device) {
  for (const int head_dim : {64, 128, 256, kMaxHeadDim}) {
    for (const int rows : kRowCounts) {
      for (const Kind kind : {Kind::kMma, Kind::kTree, Kind::kWgmma, Kind::kWgmmaKeys}) {
        const bool by_wgmma = kind == Kind::kWgmma || kind == Kind::kWgmmaKeys;
        if (by_wgmma && !can_use_wgmma(device)) continue;
        for (const bool float8 : {false, true}) {
          const auto set_up = [&]<class Traits>() { setup_kernel<Traits>(device); };
          dispatch({float8, head_dim, rows, kind}, set_up);
          for (const bool bfloat16 : {false, true}) {
            for (const bool paged : {false, true}) {
              for (const FeatureSet features : {FeatureSet::kLean, FeatureSet::kMasked}) {
                const KernelKey key{float8, head_dim, rows, kind, features, bfloat16, paged};
                dispatch(key, set_up);
                if (features == FeatureSet::kLean) dispatch_append(key, set_up);
              }
            }
          }
        }
      }
    }
  }
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  const cudaError_t error = cudaStreamIsCapturing(stream, &status);
  if (error == cudaErrorStreamCaptureImplicit) {
    cudaGetLastError();  // the default stream, while another thread captures one that waits for it
    return true;
  }
  check_cuda(error, "cudaStreamIsCapturing");
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
