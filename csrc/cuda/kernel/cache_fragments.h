// K and V as mma fragments, from a stage of the ring: as they lie there, or widened from float8.
//
// ldmatrix moves 16-bit units, which are pairs of float8 numbers. What a lane then holds of a
// 16-byte chunk are other numbers than mma wants of 16 columns, but every number is there once, so it
// does for the products to count depth, and to number the dims of V, in that order.
//
//   keys     of a row's chunk: bytes 4t to 4t + 3. As depth 2t and 2t + 1 the first two, as depth
//            2t + 8 and 2t + 9 the others; q is loaded in the same order.
//   values   of a token's chunk: bytes 2g and 2g + 1. As dims g and g + 8; see WarpPlace::dim.
#pragma once

#include <cuda_fp8.h>

#include "mma.h"
#include "traits.h"

namespace leanattn {

// Four float8 numbers as two pairs of fp16, which has them all.
__device__ __forceinline__ void widen(uint32_t bytes, bool e5m2, uint32_t& low, uint32_t& high) {
  // The numbers of e5m2 are the upper bytes of those of fp16.
  const uint32_t upper[2] = {__byte_perm(bytes, 0, 0x1404), __byte_perm(bytes, 0, 0x3424)};
  uint32_t from_e4m3[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#if LEANATTN_ARCH >= 890
    const auto pair = static_cast<__nv_fp8x2_storage_t>(bytes >> i * 16);
    const __half2_raw half = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
    from_e4m3[i] = half.x | static_cast<uint32_t>(half.y) << 16;
#else
    // Exponent and mantissa of e4m3, moved to their places, stand for 2^-8 of the number.
    const uint32_t small = (upper[i] & 0x80008000) | (upper[i] & 0x7f007f00) >> 1;
    const __half2 half = __hmul2(reinterpret_cast<const __half2&>(small), __float2half2_rn(256.0f));
    // Its NaN has all bits set but the sign. There 0x8000 - 0x200 = 0x7e00 sets those of fp16's.
    const uint32_t nan = ((upper[i] & 0x7f007f00) + 0x01000100) & 0x80008000;
    from_e4m3[i] = reinterpret_cast<const uint32_t&>(half) | (nan - (nan >> 6));
#endif
  }
  low = e5m2 ? upper[0] : from_e4m3[0];
  high = e5m2 ? upper[1] : from_e4m3[1];
}

template <class Traits>
class CacheFragments {
 public:
  __device__ __forceinline__ explicit CacheFragments(const DecodeParams& params)
      : e5m2_(is_e5m2<Traits>(params)) {}

  // K [16 tokens from `row` of the stage on, 32 of D]: depth steps `depth` and the next.
  __device__ __forceinline__ void load_keys(const uint8_t* k_smem, int row, int depth,
                                            uint32_t (&a)[2][4]) const {
    const int lane = threadIdx.x % 32;
    row += lane % 16;
    if constexpr (Traits::kFloat8) {
      uint32_t r[4];
      ldmatrix_x4(r, k_smem + swizzled_offset<Traits::kTile>(row, depth + lane / 16));
      for (int d = 0; d < 2; ++d) {
        for (int half = 0; half < 2; ++half) {
          widen(r[d * 2 + half], e5m2_, a[d][half], a[d][half + 2]);
        }
      }
    } else {
      for (int d = 0; d < 2; ++d) {
        const int chunk = (depth + d) * 2 + lane / 16;
        ldmatrix_x4(a[d], k_smem + swizzled_offset<Traits::kTile>(row, chunk));
      }
    }
  }

  // V^T [16 of Dv, 16 tokens from `row` of the stage on]: step `step` of all of Dv.
  __device__ __forceinline__ void load_values(const uint8_t* v_smem, int row, int step,
                                              uint32_t (&a)[4]) const {
    const int lane = threadIdx.x % 32;
    if constexpr (Traits::kFloat8) {
      uint32_t r[2];
      ldmatrix_x2_trans(r, v_smem + swizzled_offset<Traits::kTile>(row + lane % 16, step));
      for (int half = 0; half < 2; ++half) {
        // Two dims of two tokens each, to two tokens of a dim.
        widen(__byte_perm(r[half], 0, 0x3120), e5m2_, a[half * 2], a[half * 2 + 1]);
      }
    } else {
      row += lane % 8 + lane / 16 * 8;
      const int chunk = step * 2 + lane / 8 % 2;
      ldmatrix_x4_trans(a, v_smem + swizzled_offset<Traits::kTile>(row, chunk));
    }
  }

 private:
  bool e5m2_;
};

}  // namespace leanattn
