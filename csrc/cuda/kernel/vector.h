// A few neighbouring elements, moved in one access, and their conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace leanattn {

template <class T, int kWidth>
constexpr int kVectorAlignment = sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16;

template <class T, int kWidth>
struct alignas(kVectorAlignment<T, kWidth>) Vector {
  T element[kWidth];
};

// The pointer must be aligned to the vector, or to 16 bytes where it is longer.
template <int kWidth, class T>
__device__ __forceinline__ Vector<T, kWidth> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(from);
}

template <int kWidth, class T>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, kWidth>& vector) {
  *reinterpret_cast<Vector<T, kWidth>*>(to) = vector;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
// To fp8 saturated to the finite range; NaN stays NaN.
template <>
__device__ __forceinline__ __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float x) {
  __nv_fp8_e4m3 result;
  result.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  return result;
}
template <>
__device__ __forceinline__ __nv_fp8_e5m2 from_float<__nv_fp8_e5m2>(float x) {
  __nv_fp8_e5m2 result;
  result.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2);
  return result;
}

inline bool is_aligned(const void* pointer, int64_t alignment) {
  return reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
}

}  // namespace leanattn
