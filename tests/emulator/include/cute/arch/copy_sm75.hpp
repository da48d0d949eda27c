// ldmatrix and movmatrix, emulated.
#pragma once

#include "emulator.h"

namespace cute {

struct alignas(16) uint128_t {
  uint64_t low, high;
};

inline uint32_t pair(const void* row, int column) {
  uint32_t value;
  std::memcpy(&value, static_cast<const uint16_t*>(row) + column, 4);
  return value;
}

struct SM75_U32x4_LDSM_N {
  static void copy(const uint128_t& row, uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3) {
    const auto rows = emulator::exchange<const void*>("ldmatrix", &row);
    const int lane = emulator::fiber().thread % 32;
    uint32_t* results[4] = {&r0, &r1, &r2, &r3};
    for (int i = 0; i < 4; ++i) *results[i] = pair(rows[i * 8 + lane / 4], lane % 4 * 2);
  }
};

struct SM75_U16x8_LDSM_T {
  static void copy(const uint128_t& row, uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3) {
    const auto rows = emulator::exchange<const void*>("ldmatrix.trans", &row);
    const int lane = emulator::fiber().thread % 32;
    uint32_t* results[4] = {&r0, &r1, &r2, &r3};
    for (int i = 0; i < 4; ++i) {
      uint16_t values[2];
      for (int half = 0; half < 2; ++half) {
        values[half] = static_cast<const uint16_t*>(rows[i * 8 + lane % 4 * 2 + half])[lane / 4];
      }
      std::memcpy(results[i], values, 4);
    }
  }
};

// The rows are those of lanes 0 to 15.
struct SM75_U16x4_LDSM_T {
  static void copy(const uint128_t& row, uint32_t& r0, uint32_t& r1) {
    uint32_t unused[2];
    SM75_U16x8_LDSM_T::copy(row, r0, r1, unused[0], unused[1]);
  }
};

struct SM75_U32x1_MOVM_T {
  static void copy(const uint32_t& from, uint32_t& to) {
    const auto all = emulator::exchange("movmatrix", from);
    const int lane = emulator::fiber().thread % 32;
    uint16_t values[2];
    for (int half = 0; half < 2; ++half) {
      const int row = lane % 4 * 2 + half;  // of the source, whose column is lane / 4
      uint16_t source[2];
      std::memcpy(source, &all[row * 4 + lane / 8], 4);
      values[half] = source[lane / 4 % 2];
    }
    std::memcpy(&to, values, 4);
  }
};

}  // namespace cute
