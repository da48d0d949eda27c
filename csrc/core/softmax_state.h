// The softmax state: an unnormalised attention output together with what is needed to merge it
// with another one. States form a commutative monoid under merge (LeanAttention, arXiv 2405.10480,
// section IV-A: "softmax re-scaling" as a reduction operator), which is what lets any stretch of
// keys be computed by anyone. Warps, fixup and fixed tree merge states by SoftmaxState. What holds its
// states otherwise spells the same algebra out with the functions here: the main loops, which take a
// tile's scores into fragments, the CPU's RowStates, in double, and merge_params.h.
//
//   max   running maximum of the scores, in units of log2 (scores are multiplied by log2(e))
//   sum   sum of exp2(score - max)
//   o     sum of exp2(score - max) * value
//
// Identity: max = -inf, sum = 0, o = 0. A NaN score leaves max alone and turns sum and o into NaN.
#pragma once

#include <cmath>
#include <limits>

#include "host_device.h"

namespace leanattn {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kMaxFloat = std::numeric_limits<float>::max();
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

LEANATTN_HD float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

inline double fast_exp2(double x) { return std::exp2(x); }
LEANATTN_HD float log2_of(float x) { return log2f(x); }
inline double log2_of(double x) { return std::log2(x); }

// Real is float on the GPU; the CPU can afford double.

// What scores are measured against. Where nothing was seen the maximum is -inf and cannot be
// subtracted from itself, so 0 stands in: exp2(-inf - 0) is the 0 that is wanted.
template <class Real>
LEANATTN_HD Real exponent_base(Real max) {
  return max == kNegativeInfinity ? Real{0} : max;
}

// The factor that carries sum and o from `max` to `new_max` >= max.
template <class Real>
LEANATTN_HD Real rescale_factor(Real max, Real new_max) {
  return fast_exp2(max - exponent_base(new_max));
}

// Natural log of the sum of exponentials; -inf where nothing was seen.
template <class Real>
LEANATTN_HD float lse_of(Real max, Real sum) {
  constexpr Real ln2 = static_cast<Real>(0.6931471805599453);
  return sum == Real{0} ? kNegativeInfinity : static_cast<float>(ln2 * (max + log2_of(sum)));
}

// The same where a sink was merged: no less than the sink, which in units of log2 may be beyond fp32.
template <class Real>
LEANATTN_HD float lse_of(Real max, Real sum, float sink) {
  const float lse = lse_of(max, sum);
  return sink > lse ? sink : lse;
}

// A sink in units of log2, not beyond fp32; NaN stays NaN.
LEANATTN_HD float sink_log2(float sink) {
  const float scaled = sink * kLog2E;
  return scaled > kMaxFloat ? kMaxFloat : scaled;
}

// What turns o into the output; 0 where nothing was seen.
template <class Real>
LEANATTN_HD Real inverse_of(Real sum) {
  return sum == Real{0} ? Real{0} : Real{1} / sum;
}

// Aligned so that two numbers move at a time.
template <int kWidth>
struct alignas(kWidth % 2 == 0 ? 8 : 4) SoftmaxState {
  float max = kNegativeInfinity;
  float sum = 0.0f;
  float o[kWidth] = {};  // some of a row's elements

  // Merges n states into this one, in the order given. One maximum over all of them first, then
  // one multiply-add each: the same result as merging pairwise, in fewer dependent steps.
  template <int n>
  LEANATTN_HD void merge(const SoftmaxState (&others)[n]) {
    float new_max = max;
    for (int i = 0; i < n; ++i) new_max = fmaxf(new_max, others[i].max);
    const float own = rescale_factor(max, new_max);
    sum *= own;
    for (int d = 0; d < kWidth; ++d) o[d] *= own;
    for (int i = 0; i < n; ++i) {
      const float factor = rescale_factor(others[i].max, new_max);
      // Spelled out: with two products to choose from, the compiler might fuse another one elsewhere,
      // and the bits of a merge must not depend on where it is inlined.
      sum = fmaf(factor, others[i].sum, sum);
      for (int d = 0; d < kWidth; ++d) o[d] = fmaf(factor, others[i].o[d], o[d]);
    }
    max = new_max;
  }

  // A sink is one more logit in the denominator. It has no value, so o takes nothing from it, NaN
  // neither.
  LEANATTN_HD void merge_sink(float sink) {
    const float logit = sink_log2(sink);
    const float new_max = fmaxf(max, logit);
    const float own = rescale_factor(max, new_max);
    sum = fmaf(own, sum, rescale_factor(logit, new_max));
    for (int d = 0; d < kWidth; ++d) o[d] *= own;
    max = new_max;
  }
};

}  // namespace leanattn
