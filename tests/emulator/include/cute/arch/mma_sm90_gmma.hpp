// wgmma, emulated. Nothing is computed before the wait, so that an operand that is overwritten too
// early shows; the warps of a warpgroup must all come to every fence and wait, with the same products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <tuple>
#include <utility>

#include "mma_sm90_desc.hpp"
#include "widen.h"

namespace cute {

namespace SM90::GMMA {

enum class Major { K = 0, MN = 1 };
enum class ScaleOut { Zero = 0, One = 1 };

// The address of element (i, k) of an operand whose k runs over the 16 that a product sums over, and
// i over its rows of A or columns of B: with the 128-byte swizzle, of the address itself.
template <Major major>
const void* element_address(uint64_t bits, int i, int k) {
  const GmmaDescriptor descriptor(bits);
  const auto& field = descriptor.bitfield;
  if (field.layout_type_ != static_cast<int>(LayoutType::B128) || field.base_offset_ != 0) {
    throw std::logic_error("not an operand with the 128-byte swizzle");
  }
  uint32_t address = field.start_address_ << 4;
  const uint32_t leading = field.leading_byte_offset_ << 4;
  const uint32_t stride = field.stride_byte_offset_ << 4;
  if (major == Major::K) {
    address += i / 8 * stride + i % 8 * 128 + k * 2;
  } else {
    address += i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2;
  }
  return emulator::cta().smem + (address ^ (address >> 7 & 7) << 4);
}

template <class Element>
double read(const void* address) {
  uint16_t bits;
  std::memcpy(&bits, address, 2);
  return emulator::widen<Element>(bits);
}

// The product of 64 x kColumns x 16, of which this lane holds kColumns / 2 elements. row_of(r) reads
// the 16 elements of row r of A.
template <class Element, int kColumns, Major kMajorB, class RowOfA>
void multiply(RowOfA row_of_a, uint64_t b, const std::array<float*, kColumns / 2>& d, bool add) {
  const int lane = emulator::fiber().thread % 32;
  const std::array<double, 16> rows[2] = {row_of_a(lane / 4), row_of_a(lane / 4 + 8)};
  for (int j = 0; j < kColumns / 8; ++j) {
    for (int c = 0; c < 2; ++c) {
      double column[16];
      for (int k = 0; k < 16; ++k) {
        column[k] = read<Element>(element_address<kMajorB>(b, j * 8 + lane % 4 * 2 + c, k));
      }
      for (int half = 0; half < 2; ++half) {
        float& result = *d[j * 4 + half * 2 + c];
        double sum = add ? result : 0.0;
        for (int k = 0; k < 16; ++k) sum += rows[half][k] * column[k];
        result = static_cast<float>(sum);
      }
    }
  }
}

// The addresses of d among the arguments of an fma, from number kFirst on.
template <int kColumns, size_t kFirst, class Arguments>
std::array<float*, kColumns / 2> results(const Arguments& arguments) {
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return std::array<float*, kColumns / 2>{
        const_cast<float*>(&std::get<kFirst + i>(arguments))...};
  }(std::make_index_sequence<kColumns / 2>());
}

// A and B in shared memory: fma(a, b, d..., scale).
template <class Element, int kColumns, Major kMajorA, Major kMajorB>
struct SharedShared {
  template <class... Arguments>
  static void fma(const Arguments&... all) {
    const std::tuple<const Arguments&...> arguments(all...);
    const uint64_t a = std::get<0>(arguments);
    const uint64_t b = std::get<1>(arguments);
    const auto d = results<kColumns, 2>(arguments);
    const bool add = std::get<2 + kColumns / 2>(arguments) == ScaleOut::One;
    emulator::fiber().products.push_back(
        {b, [=] {
           const int first_row = emulator::fiber().thread / 32 % 4 * 16;
           const auto row_of_a = [&](int row) {
             std::array<double, 16> values;
             for (int k = 0; k < 16; ++k) {
               values[k] = read<Element>(element_address<kMajorA>(a, first_row + row, k));
             }
             return values;
           };
           multiply<Element, kColumns, kMajorB>(row_of_a, b, d, add);
         }});
  }
};

// A in registers: fma(a0, a1, a2, a3, b, d..., scale).
template <class Element, int kColumns, Major kMajorA, Major kMajorB>
struct RegisterShared {
  static_assert(kMajorA == Major::K);

  template <class... Arguments>
  static void fma(const Arguments&... all) {
    const std::tuple<const Arguments&...> arguments(all...);
    const std::array<const uint32_t*, 4> a = {&std::get<0>(arguments), &std::get<1>(arguments),
                                              &std::get<2>(arguments), &std::get<3>(arguments)};
    const uint64_t b = std::get<4>(arguments);
    const auto d = results<kColumns, 5>(arguments);
    const bool add = std::get<5 + kColumns / 2>(arguments) == ScaleOut::One;
    emulator::fiber().products.push_back(
        {b, [=] {
           const std::array<uint32_t, 4> mine = {*a[0], *a[1], *a[2], *a[3]};
           const auto fragments = emulator::exchange("wgmma", mine);
           const auto row_of_a = [&](int row) {
             std::array<double, 16> values;
             for (int k = 0; k < 16; ++k) {
               const uint32_t pair = fragments[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
               values[k] = emulator::widen<Element>(static_cast<uint16_t>(pair >> k % 2 * 16));
             }
             return values;
           };
           multiply<Element, kColumns, kMajorB>(row_of_a, b, d, add);
         }});
  }
};

#define EMULATED_WGMMA(kColumns)                                                             \
  template <Major a, Major b>                                                                \
  using MMA_64x##kColumns##x16_F32F16F16_SS = SharedShared<__half, kColumns, a, b>;          \
  template <Major a, Major b>                                                                \
  using MMA_64x##kColumns##x16_F32F16F16_RS = RegisterShared<__half, kColumns, a, b>;        \
  template <Major a, Major b>                                                                \
  using MMA_64x##kColumns##x16_F32BF16BF16_SS = SharedShared<__nv_bfloat16, kColumns, a, b>; \
  template <Major a, Major b>                                                                \
  using MMA_64x##kColumns##x16_F32BF16BF16_RS = RegisterShared<__nv_bfloat16, kColumns, a, b>;
EMULATED_WGMMA(16)
EMULATED_WGMMA(32)
EMULATED_WGMMA(64)
EMULATED_WGMMA(128)
EMULATED_WGMMA(256)
#undef EMULATED_WGMMA

}  // namespace SM90::GMMA

inline void warpgroup_fence_operand(float&) {}
inline void warpgroup_fence_operand(uint32_t&) {}

inline void warpgroup_arrive() { emulator::meet_warpgroup("wgmma.fence", 0); }

inline void warpgroup_commit_batch() {}

template <int n>
void warpgroup_wait() {
  static_assert(n == 0);
  emulator::Fiber& self = emulator::fiber();
  uint64_t operands = self.products.size();
  for (const auto& [b, compute] : self.products) operands = operands * 31 + b;
  emulator::meet_warpgroup("wgmma.wait_group", operands);
  for (const auto& [b, compute] : self.products) compute();
  self.products.clear();
  // Done: whoever goes on may overwrite what the others have read.
  emulator::meet_warpgroup("wgmma.wait_group", operands);
}

}  // namespace cute
