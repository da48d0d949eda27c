// What CUDA's own headers say, and functions that g++ does not know. After those headers, before a
// kernel's.
#pragma once

#include "emulator.h"

// CTAs of grids without clusters run one after the other.
#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

// The CUDA functions that the kernel uses and g++ does not know.
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return emulator::exchange("shfl.xor", value)[(threadIdx.x % 32) ^ lanes];
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % 32;
  return emulator::exchange("shfl.up", value)[lane >= distance ? lane - distance : lane];
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::exchange("shfl", value)[lane];
}
inline bool __any_sync(unsigned, bool value) {
  const auto all = emulator::exchange("vote.any", value);
  return std::any_of(all.begin(), all.end(), [](bool x) { return x; });
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const auto all = emulator::exchange("vote.ballot", value);
  unsigned lanes = 0;
  for (int lane = 0; lane < 32; ++lane) lanes |= unsigned{all[lane]} << lane;
  return lanes;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline void __syncwarp() {
  const void* warp = &emulator::cta().warps[threadIdx.x / 32];
  emulator::release(warp);
  emulator::exchange("syncwarp", 0);
  emulator::acquire(warp);
}
inline void __syncthreads() { emulator::sync(0, emulator::machine()->threads); }
inline int __syncthreads_or(int value) {
  const emulator::Quiet quiet;
  emulator::Barrier& barrier = emulator::cta().barriers[0];
  barrier.any |= value != 0;
  __syncthreads();
  return barrier.last_any;
}
inline int __reduce_add_sync(unsigned, int value) {
  const auto all = emulator::exchange("redux.add", value);
  int sum = 0;
  for (const int x : all) sum += x;
  return sum;
}
inline int __reduce_min_sync(unsigned, int value) {
  const auto all = emulator::exchange("redux.min", value);
  return *std::min_element(all.begin(), all.end());
}
inline int __reduce_max_sync(unsigned, int value) {
  const auto all = emulator::exchange("redux.max", value);
  return *std::max_element(all.begin(), all.end());
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selectors) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= (bytes >> (selectors >> i * 4 & 7) * 8 & 0xff) << i * 8;
  }
  return result;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
[[noreturn]] inline void __trap() { throw std::logic_error("trap"); }
inline int atomicMin(int* address, int value) {
  const emulator::Quiet quiet;
  const int old = *address;
  *address = std::min(old, value);
  return old;
}
inline int atomicMax(int* address, int value) {
  const emulator::Quiet quiet;
  const int old = *address;
  *address = std::max(old, value);
  return old;
}
// With the fences around it: a release and an acquire.
inline unsigned atomicInc(unsigned* address, unsigned last) {
  emulator::release(address);
  emulator::acquire(address);
  const emulator::Quiet quiet;
  const unsigned old = *address;
  *address = old >= last ? 0 : old + 1;
  return old;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
