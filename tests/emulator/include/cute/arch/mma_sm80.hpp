// mma.m16n8k16, emulated.
#pragma once

#include "emulator.h"
#include "widen.h"

namespace cute {

// What a lane holds of A and B.
struct Fragments {
  float a[8], b[4];
};

template <class Element>
void mma(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], const uint32_t (&b)[2],
         float c0, float c1, float c2, float c3) {
  const auto element = [](uint32_t pair, int half) {
    return emulator::widen<Element>(static_cast<uint16_t>(pair >> half * 16));
  };
  Fragments mine;
  for (int i = 0; i < 8; ++i) mine.a[i] = element(a[i / 2], i % 2);
  for (int i = 0; i < 4; ++i) mine.b[i] = element(b[i / 2], i % 2);
  const auto all = emulator::exchange("mma", mine);
  const int lane = emulator::fiber().thread % 32;
  const float c[4] = {c0, c1, c2, c3};
  float d[4];
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8;
    const int column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const Fragments& of_a = all[row % 8 * 4 + k % 8 / 2];
      const Fragments& of_b = all[column * 4 + k % 8 / 2];
      sum += double{of_a.a[(row / 8 + k / 8 * 2) * 2 + k % 2]} * of_b.b[k / 8 * 2 + k % 2];
    }
    d[i] = static_cast<float>(sum);
  }
  d0 = d[0];
  d1 = d[1];
  d2 = d[2];
  d3 = d[3];
}

template <class Element>
struct Mma {
  static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2,
                  uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
    mma<Element>(d0, d1, d2, d3, {a0, a1, a2, a3}, {b0, b1}, c0, c1, c2, c3);
  }
};

using SM80_16x8x16_F32F16F16F32_TN = Mma<__half>;
using SM80_16x8x16_F32BF16BF16F32_TN = Mma<__nv_bfloat16>;

}  // namespace cute
