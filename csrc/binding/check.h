// Argument checks: every message names the op, the argument, the value given and what is allowed.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace leanattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Sizes are counted in int behind the checks.
constexpr int64_t kMaxInt = std::numeric_limits<int>::max();

// What a message says of tensors, put into words only where there is a message: every call makes dozens
// of checks, and they rarely fail.
template <class Numbers>
struct ListOf {
  const Numbers& numbers;
};
struct ShapeOf {
  const Tensor& tensor;
};
struct StridesOf {
  const Tensor& tensor;
};
struct DeviceOf {
  const Tensor& tensor;
};

template <class Numbers>
ListOf<Numbers> list_of(const Numbers& numbers) {
  return {numbers};
}
inline ShapeOf shape_of(const Tensor& t) { return {t}; }
inline StridesOf strides_of(const Tensor& t) { return {t}; }
inline DeviceOf device_of(const Tensor& t) { return {t}; }

template <class Numbers>
std::ostream& operator<<(std::ostream& text, const ListOf<Numbers>& list) {
  const char* separator = "[";
  for (const int64_t number : list.numbers) {
    text << separator << number;
    separator = ", ";
  }
  return text << (list.numbers.size() == 0 ? "[]" : "]");
}
std::ostream& operator<<(std::ostream& text, const ShapeOf& shape);
std::ostream& operator<<(std::ostream& text, const StridesOf& strides);
std::ostream& operator<<(std::ostream& text, const DeviceOf& device);

// As Python calls it: "int32", where toString says "Int".
const char* name_of(ScalarType type);

inline bool is_fp8(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float8_e4m3fn || t.scalar_type() == ScalarType::Float8_e5m2;
}

// The op whose arguments are being checked.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  // "leanattn::decode: q must be ..., got ...": text goes after the argument's name.
  template <class... Text>
  void require(bool condition, const char* argument, const Text&... text) const {
    static_assert((!std::is_same_v<Text, std::string> && ...), "words made before they are needed");
    if (condition) return;
    std::ostringstream message;
    message << "leanattn::" << op_ << ": " << argument << ' ';
    (message << ... << text);
    throw std::runtime_error(message.str());
  }

  // A tensor, of a dtype that anything takes. Before anything else is asked of it.
  void given(const Tensor& t, const char* argument) const;
  void dtype(const Tensor& t, const char* argument, ScalarType wanted) const;
  // One that this build has code for.
  void supported_device(const Tensor& t, const char* argument) const;
  // `other` is the tensor that decides, under the name `other_name`.
  void same_device(const Tensor& t, const char* argument, const Tensor& other,
                   const char* other_name = "q") const;
  void shape(const Tensor& t, const char* argument, const char* names,
             std::initializer_list<int64_t> wanted) const;
  // Of a float8 cache, [.., .., num_heads_kv, ..]: fp32 of one element, a head, or a sequence and head.
  void scale(const OptionalTensor& t, const char* argument, const Tensor& cache,
             int64_t batch) const;
  // The last dimension contiguous and everything else on boundaries of `grain` bytes, which CUDA needs.
  void cuda_layout(const Tensor& t, const char* argument, int64_t grain) const;

 private:
  const char* op_;
};

}  // namespace leanattn
