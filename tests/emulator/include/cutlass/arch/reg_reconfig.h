// Registers moved between warpgroups, emulated: there are enough.
#pragma once

#include <cstdint>

namespace cutlass::arch {

template <uint32_t kRegisters>
inline void warpgroup_reg_alloc() {}
template <uint32_t kRegisters>
inline void warpgroup_reg_dealloc() {}

}  // namespace cutlass::arch
