// cp.async, emulated.
#pragma once

#include "emulator.h"

namespace cute {

inline void cp_async(void* to, const void* from, size_t bytes, bool inside) {
  const emulator::Quiet quiet;
  emulator::Fiber& self = emulator::fiber();
  ++self.issued;
  if (!self.copier) self.copier = std::make_shared<emulator::Observed>();
  const auto copy = [to, from, bytes, inside, &self] {
    if (inside) {
      std::memcpy(to, from, bytes);
    } else {
      std::memset(to, 0, bytes);
    }
    emulator::release(&self.landed);
    const emulator::Quiet quiet;
    ++self.landed;
  };
  emulator::copy_later(copy, self.copier);
}

template <class T>
struct SM80_CP_ASYNC_CACHEGLOBAL_ZFILL {
  static void copy(const T& from, T& to, bool inside) { cp_async(&to, &from, sizeof(T), inside); }
};

template <class T>
struct SM80_CP_ASYNC_CACHEALWAYS_ZFILL {
  static void copy(const T& from, T& to, bool inside) { cp_async(&to, &from, sizeof(T), inside); }
};

template <class T>
struct SM80_CP_ASYNC_CACHEGLOBAL {
  static void copy(const T& from, T& to) { cp_async(&to, &from, sizeof(T), true); }
};

template <class T>
struct SM80_CP_ASYNC_CACHEALWAYS {
  static void copy(const T& from, T& to) { cp_async(&to, &from, sizeof(T), true); }
};

inline void cp_async_fence() {
  const emulator::Quiet quiet;
  emulator::fiber().commits.push_back(emulator::fiber().issued);
  emulator::fiber().copier = nullptr;
}

template <int n>
void cp_async_wait() {
  emulator::Fiber& self = emulator::fiber();
  if (static_cast<int>(self.commits.size()) <= n) return;
  const int wanted = self.commits[self.commits.size() - 1 - n];
  emulator::yield_until("cp.async", [&self, wanted] { return self.landed >= wanted; });
  emulator::acquire(&self.landed);
}

}  // namespace cute
