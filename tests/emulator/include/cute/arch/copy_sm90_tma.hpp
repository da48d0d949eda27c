// Bulk copies, emulated: of tensors boxes of [rows, 128 bytes] with the 128-byte swizzle.
#pragma once

#include <cuda.h>

#include "emulated_ptx.h"

namespace emulator {

// In the place of a CUtensorMap.
struct TensorMap {
  const uint8_t* data;
  int element_bytes;
  int64_t extent[4];  // innermost first
  int64_t stride[4];  // elements
  int box_rows;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

inline int64_t tensor_copies = 0;  // so far

}  // namespace emulator

namespace cute {

namespace TMA {
enum class CacheHintSm90 : uint64_t { EVICT_NORMAL };
}

inline void prefetch_tma_descriptor(const CUtensorMap*) {}

struct SM90_TMA_LOAD_4D {
  static void copy(const void* map_pointer, uint64_t* barrier, uint64_t, void* to, int c0, int c1,
                   int c2, int c3) {
    const auto& map = *static_cast<const emulator::TensorMap*>(map_pointer);
    uint8_t* smem = emulator::cta().smem;
    {
      const emulator::Quiet quiet;
      ++emulator::tensor_copies;
    }
    emulator::copy_later([&map, barrier, to, c0, c1, c2, c3, smem] {
      uint8_t* box = static_cast<uint8_t*>(to);
      for (int row = 0; row < map.box_rows; ++row) {
        for (int column = 0; column < 128 / map.element_bytes; ++column) {
          const int64_t at[4] = {c0 + column, c1 + row, c2, c3};
          bool inside = true;
          int64_t offset = 0;
          for (int i = 0; i < 4; ++i) {
            inside &= 0 <= at[i] && at[i] < map.extent[i];
            offset += at[i] * map.stride[i];
          }
          const int swizzle = (box + row * 128 - smem) / 128 % 8;
          const int byte = column * map.element_bytes;
          uint8_t* value = box + row * 128 + ((byte / 16) ^ swizzle) * 16 + byte % 16;
          if (inside) {
            std::memcpy(value, map.data + offset * map.element_bytes, map.element_bytes);
          } else {
            std::memset(value, 0, map.element_bytes);
          }
        }
      }
      emulator::release(barrier);
      auto& state = leanattn::ptx::mbarrier(barrier);
      const emulator::Quiet quiet;
      state.bytes -= map.box_rows * 128;
      state.check();
    });
  }
};

// `bytes` in a row; the hardware takes whole 16 bytes, on such boundaries, alone.
struct SM90_BULK_COPY_G2S {
  static void copy(const void* from, uint64_t* barrier, void* to, int32_t bytes) {
    const auto at = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
    if ((at(from) | at(to) | bytes) % 16 != 0) throw std::logic_error("a bulk copy off 16 bytes");
    emulator::copy_later([from, barrier, to, bytes] {
      std::memcpy(to, from, bytes);
      emulator::release(barrier);
      auto& state = leanattn::ptx::mbarrier(barrier);
      const emulator::Quiet quiet;
      state.bytes -= bytes;
      state.check();
    });
  }
};

}  // namespace cute
