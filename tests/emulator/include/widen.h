// A number of 16 bits as a float, by a table: CUDA's functions are slow on a CPU, and products take
// most of the emulator's time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace emulator {

template <class Element>
inline const std::vector<float> widened = [] {
  std::vector<float> values(65536);
  for (int i = 0; i < 65536; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    Element element;
    std::memcpy(static_cast<void*>(&element), &bits, 2);
    values[i] = static_cast<float>(element);
  }
  return values;
}();

template <class Element>
float widen(uint16_t bits) {
  return widened<Element>[bits];
}

}  // namespace emulator
