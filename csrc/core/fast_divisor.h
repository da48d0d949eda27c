// Division by a number known before the kernel starts: one multiplication instead of the twenty
// instructions of an integer division, which the first copy of a launch would wait for.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace leanattn {

// n / d and n % d for 0 <= n < 2^31. multiplier = ceil(2^(31 + shift) / d) with 2^shift >= d, so the
// quotient's error is below n / 2^(31 + shift) * d / d < 1 / d (Granlund and Montgomery, 1994).
class FastDivisor {
 public:
  FastDivisor() = default;
  LEANATTN_HD FastDivisor(int divisor) : divisor_(divisor), shift_(31) {
    while ((int64_t{1} << (shift_ - 31)) < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + divisor - 1) /
                                        static_cast<uint64_t>(divisor));
  }

  LEANATTN_HD operator int() const { return divisor_; }

  LEANATTN_HD friend int operator/(int n, const FastDivisor& d) {
    return static_cast<int>((static_cast<uint64_t>(n) * d.multiplier_) >> d.shift_);
  }
  LEANATTN_HD friend int operator%(int n, const FastDivisor& d) { return n - n / d * d.divisor_; }

 private:
  int divisor_;
  int shift_;
  uint32_t multiplier_;
};

}  // namespace leanattn
