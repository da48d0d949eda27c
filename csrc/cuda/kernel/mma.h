// 16-bit matrix fragments: what of mma.m16n8k16 depends on the element type, and the few register
// tricks on packed pairs.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "core/mask.h"

namespace leanattn {

// Which elements of a fragment a lane holds (PTX ISA, mma.m16n8k16), with g = lane / 4 and
// t = lane % 4:
//   A [16, 16]  a[0] row g, cols 2t 2t+1   a[1] row g+8    a[2] row g, cols 2t+8 2t+9   a[3] row g+8
//   B [16, 8]   b[0] rows 2t 2t+1, col g   b[1] rows 2t+8 2t+9
//   C [16, 8]   c[0] c[1] row g, cols 2t 2t+1   c[2] c[3] row g+8

template <class Element>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Element, __half>) {
    cute::SM80_16x8x16_F32F16F16F32_TN::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0],
                                            b[1], c[0], c[1], c[2], c[3]);
  } else {
    cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0],
                                              b[1], c[0], c[1], c[2], c[3]);
  }
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const uint8_t* row_smem) {
  cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(row_smem), r[0], r[1],
                                r[2], r[3]);
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const uint8_t* row_smem) {
  cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(row_smem), r[0], r[1],
                                r[2], r[3]);
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const uint8_t* row_smem) {
  cute::SM75_U16x4_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(row_smem), r[0], r[1]);
}

// Transposes an 8x8 matrix of 16-bit elements held as one register a lane.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t x) {
  uint32_t y;
  cute::SM75_U32x1_MOVM_T::copy(x, y);
  return y;
}

template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  } else {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  }
}

// True if one of the pair is NaN or infinite: all exponent bits are set.
template <class Element>
__device__ __forceinline__ bool has_nonfinite(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<Element, __half> ? 0x7c00 : 0x7f80;
  return (pair & kExponent) == kExponent || ((pair >> 16) & kExponent) == kExponent;
}

// A mask for a pair of tokens, token and token + 1: all ones where `keep` contains it.
__device__ __forceinline__ uint32_t pair_mask(KeyRange keep, int token) {
  return (keep.contains(token) ? 0x0000ffffu : 0u) | (keep.contains(token + 1) ? 0xffff0000u : 0u);
}

}  // namespace leanattn
