// wgmma's descriptors of operands in shared memory, emulated.
#pragma once

#include "emulator.h"

namespace cute {

namespace SM90::GMMA {
enum class LayoutType : uint8_t { INTERLEAVE = 0, B128 = 1, B64 = 2, B32 = 3 };
}

// The bits as in the PTX ISA.
union GmmaDescriptor {
  uint64_t desc_ = 0;
  struct {
    uint16_t start_address_ : 14, : 2;
    uint16_t leading_byte_offset_ : 14, : 2;
    uint16_t stride_byte_offset_ : 14, : 2;
    uint8_t : 1, base_offset_ : 3, : 4;
    uint8_t : 6, layout_type_ : 2;
  } bitfield;

  GmmaDescriptor() = default;
  explicit GmmaDescriptor(uint64_t descriptor) : desc_(descriptor) {}
  operator uint64_t() const { return desc_; }
};
static_assert(sizeof(GmmaDescriptor) == 8);

}  // namespace cute
