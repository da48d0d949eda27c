// Addresses in shared memory, emulated.
#pragma once

#include "emulator.h"

namespace cute {

inline uint32_t cast_smem_ptr_to_uint(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - emulator::cta().smem);
}

}  // namespace cute
