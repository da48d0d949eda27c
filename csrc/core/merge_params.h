// Everything one merge needs, as a POD: the contract between the binding, the CPU implementation
// and the kernel. No torch, no CUDA. Strides are in elements.
//
// The states to merge come normalised, as (out, lse). That is the softmax state (softmax_state.h)
// with sum 1 and maximum lse; and since all of a row's lses are there at once, the merged maximum
// is known before the first value is read. Merging is then a weighted sum:
//
//   base = max lse_i,   w_i = exp(lse_i - base),   out = sum w_i out_i / sum w_i,
//   lse = base + log(sum w_i)
//
// The difference is taken before the change to log2, so that large lses lose nothing.
#pragma once

#include <cstdint>

#include "params.h"

namespace leanattn {

constexpr int kMaxMergeDims = 4;

struct MergeParams {
  ElementType element_type;  // of outs
  ElementType out_type;      // the same, or narrower than float32 outs
  int num_states;            // n
  int num_rows;              // product of `sizes`
  int head_dim;              // D

  // The dimensions between the first and the last, neighbours joined where strides allow.
  int num_dims;
  FastDivisor sizes[kMaxMergeDims];
  const void* outs;  // [n, sizes..., D]
  int64_t outs_state_stride, outs_strides[kMaxMergeDims];
  const float* lses;  // [n, sizes...]
  int64_t lses_state_stride, lses_strides[kMaxMergeDims];

  void* out;   // [num_rows, D], contiguous
  float* lse;  // [num_rows], contiguous
};

// Where a row begins in outs and lses.
struct MergeRow {
  int64_t outs_offset;
  int64_t lses_offset;
};

LEANATTN_HD MergeRow find_merge_row(const MergeParams& p, int row) {
  MergeRow found{0, 0};
  for (int dim = p.num_dims - 1; dim >= 0; --dim) {
    const int rest = row / p.sizes[dim];
    const int index = row - rest * p.sizes[dim];
    found.outs_offset += index * p.outs_strides[dim];
    found.lses_offset += index * p.lses_strides[dim];
    row = rest;
  }
  return found;
}

// An lse of a state that saw no key: -inf here, +inf in FlashAttention. Its out is never read.
LEANATTN_HD bool saw_nothing(float lse) {
  return lse == -kNegativeInfinity || lse == kNegativeInfinity;
}

// The maximum over a row's lses; -inf where no state saw a key, NaN is passed over.
LEANATTN_HD float merge_base(const MergeParams& p, const MergeRow& row) {
  float base = kNegativeInfinity;
  for (int i = 0; i < p.num_states; ++i) {
    const float lse = p.lses[row.lses_offset + i * p.lses_state_stride];
    if (!saw_nothing(lse)) base = fmaxf(base, lse);
  }
  return base;
}

// Where all lses are NaN there is no base, and NaN comes out.
LEANATTN_HD float merge_weight(float lse, float base) {
  return fast_exp2((lse - exponent_base(base)) * kLog2E);
}

LEANATTN_HD float merged_lse(float base, float sum) {
  return sum == 0.0f ? kNegativeInfinity : exponent_base(base) + lse_of(0.0f, sum);
}

}  // namespace leanattn
