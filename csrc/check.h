// Argument checks: every message names the op, the argument, the value given and what is allowed.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace leanattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Sizes are counted in int behind the checks.
constexpr int64_t kMaxInt = std::numeric_limits<int>::max();

template <class Sizes>
std::string list_string(const Sizes& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

inline std::string shape_string(const Tensor& t) { return list_string(t.sizes()); }

std::string device_string(const Tensor& t);

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
  // The last dimension contiguous and everything else on 16-byte boundaries, of a float8 cache on
  // 8-byte ones, which CUDA needs.
  void cuda_layout(const Tensor& t, const char* argument) const;

 private:
  const char* op_;
};

}  // namespace leanattn
