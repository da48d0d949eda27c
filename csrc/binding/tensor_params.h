// What the PODs hold of a tensor that has been checked.
#pragma once

#include "check.h"
#include "core/params.h"

namespace leanattn {

inline ElementType element_type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::Half:
      return ElementType::kFloat16;
    default:
      return ElementType::kBFloat16;
  }
}

inline CacheType cache_type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return CacheType::kFloat32;
    case ScalarType::Half:
      return CacheType::kFloat16;
    case ScalarType::BFloat16:
      return CacheType::kBFloat16;
    case ScalarType::Float8_e4m3fn:
      return CacheType::kFloat8E4M3;
    default:
      return CacheType::kFloat8E5M2;
  }
}

inline const int32_t* int_data(const OptionalTensor& t) {
  return t ? static_cast<const int32_t*>(t->const_data_ptr()) : nullptr;
}

inline const float* float_data(const OptionalTensor& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

inline Scales make_scales(const OptionalTensor& t) {
  if (!t || t->numel() == 1) return {float_data(t), 0, 0};
  return {float_data(t), t->dim() == 2 ? t->stride(0) : 0, t->stride(t->dim() - 1)};
}

}  // namespace leanattn
