#include "check.h"

#include <torch/csrc/stable/device.h>

namespace leanattn {

using torch::headeronly::DeviceType;

std::ostream& operator<<(std::ostream& text, const ShapeOf& shape) {
  return text << list_of(shape.tensor.sizes());
}

std::ostream& operator<<(std::ostream& text, const StridesOf& strides) {
  return text << list_of(strides.tensor.strides());
}

std::ostream& operator<<(std::ostream& text, const DeviceOf& of) {
  const auto device = of.tensor.device();
  switch (device.type()) {
    case DeviceType::CPU:
      return text << "cpu";
    case DeviceType::CUDA:
      return text << "cuda:" << device.index();
    case DeviceType::Meta:
      return text << "meta";
    default:
      return text << "device type " << static_cast<int>(device.type());
  }
}

void Checker::dtype(const Tensor& t, const char* argument, ScalarType wanted) const {
  require(t.scalar_type() == wanted, argument, "must be ", name_of(wanted), ", got ",
          name_of(t.scalar_type()));
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::UInt32:
      return "uint32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    default:
      return toString(type);
  }
}

namespace {

// Whether torch's stable ABI can tell the dtype, which it cannot of the newest.
bool has_known_dtype(const Tensor& t) {
  try {
    static_cast<void>(t.scalar_type());
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace

void Checker::given(const Tensor& t, const char* argument) const {
  require(t.defined(), argument, "must be a tensor, got None");
  require(has_known_dtype(t), argument,
          "has a dtype that is not supported; allowed are float32, float16, "
          "bfloat16, float8_e4m3fn, float8_e5m2 and int32, whichever the argument takes");
}

void Checker::supported_device(const Tensor& t, const char* argument) const {
  given(t, argument);
#ifdef LEANATTN_WITH_CUDA
  require(t.is_cpu() || t.is_cuda(), argument, "must be on cpu or cuda, got ", device_of(t));
#else
  require(t.is_cpu(), argument, "is on ", device_of(t),
          ", but leanattn was built without CUDA; allowed is cpu");
#endif
}

void Checker::same_device(const Tensor& t, const char* argument, const Tensor& other,
                          const char* other_name) const {
  given(t, argument);
  require(t.device() == other.device(), argument, "must be on ", other_name, "'s device, ",
          device_of(other), ", got ", device_of(t));
}

void Checker::shape(const Tensor& t, const char* argument, const char* names,
                    std::initializer_list<int64_t> wanted) const {
  const auto sizes = t.sizes();
  bool equal = sizes.size() == wanted.size();
  for (size_t i = 0; equal && i < wanted.size(); ++i) equal = sizes[i] == wanted.begin()[i];
  if (equal) return;
  require(false, argument, "must have shape ", names, " = ", list_of(std::vector(wanted)), ", got ",
          shape_of(t));
}

void Checker::scale(const OptionalTensor& t, const char* argument, const Tensor& cache,
                    int64_t batch) const {
  if (!t) return;
  require(is_fp8(cache), argument, "goes with float8 caches only, got it with ",
          name_of(cache.scalar_type()));
  dtype(*t, argument, ScalarType::Float);
  if (t->numel() == 1) return;
  const int64_t heads = cache.size(2);
  constexpr const char* kNames = "one element, [num_heads_kv] or [batch, num_heads_kv]";
  if (t->dim() == 1) {
    shape(*t, argument, kNames, {heads});
  } else {
    shape(*t, argument, kNames, {batch, heads});
  }
}

void Checker::cuda_layout(const Tensor& t, const char* argument, int64_t grain) const {
  const int64_t element_size = static_cast<int64_t>(t.element_size());
  const int64_t dims = t.dim();
  require(t.stride(dims - 1) == 1 || t.size(dims - 1) == 1, argument,
          "must have a contiguous last dimension on CUDA, got strides ", strides_of(t));
  if (t.numel() == 0) return;
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  require(address % grain == 0, argument, "must begin on a ", grain,
          "-byte boundary on CUDA, got address ", address, ", which is ", address % grain,
          " bytes past one");
  for (int64_t i = 0; i < dims - 1; ++i) {
    // The stride of a single row means nothing.
    require(t.size(i) == 1 || t.stride(i) * element_size % grain == 0, argument,
            "must have strides that are multiples of ", grain, " bytes (", grain / element_size,
            " elements) on CUDA, got strides ", strides_of(t));
  }
}

}  // namespace leanattn
