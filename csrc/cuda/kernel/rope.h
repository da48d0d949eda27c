// RoPE of the kernels: of pairs of numbers that are there already.
#pragma once

#include "vector.h"

namespace leanattn {

// Two vectors that hold kWidth pairs: with NeoX's pairs the first members and the second members, with
// GPT-J's, interleaved, 2 * kWidth neighbours. RoFormer, arXiv 2104.09864, eq. 34. Products and sums are
// fused in one way, whatever kernel this is compiled into, for all must give the same bits.
template <class Element, int kWidth>
__device__ __forceinline__ void rotate_pairs(const Vector<Element, kWidth> (&loaded)[2],
                                             bool interleaved, const float (&cos)[kWidth],
                                             const float (&sin)[kWidth],
                                             float (&rotated)[2][kWidth]) {
  const auto rotate = [&](int i, int first, int second) {
    const float x = to_float(loaded[first / kWidth].element[first % kWidth]);
    const float y = to_float(loaded[second / kWidth].element[second % kWidth]);
    rotated[first / kWidth][first % kWidth] = fmaf(x, cos[i], -__fmul_rn(y, sin[i]));
    rotated[second / kWidth][second % kWidth] = fmaf(x, sin[i], __fmul_rn(y, cos[i]));
  };
  if (interleaved) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) rotate(i, 2 * i, 2 * i + 1);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) rotate(i, i, kWidth + i);
  }
}

}  // namespace leanattn
