// The election of a lane, emulated.
#pragma once

#include "emulator.h"

namespace cute {

inline uint32_t elect_one_sync() {
  emulator::exchange("elect", 0);
  return emulator::fiber().thread % 32 == 0;
}

}  // namespace cute
