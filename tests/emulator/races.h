// What ThreadSanitizer must be told, where the emulator is compiled with -fsanitize=thread, to find
// races of the kernel: each CUDA thread and each copy in flight is a thread of its own to it, and only
// what orders memory on a GPU orders them. Then a missing barrier shows in any order of events.
#pragma once

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulator {

#if defined(__SANITIZE_THREAD__)

// False, for a test of the sanitizer's sight: nothing orders anything.
inline bool orders_memory = true;

// Everything before the release comes before everything after an acquire of the same address that
// follows it.
inline void release(const void* address) {
  if (orders_memory) __tsan_release(const_cast<void*>(address));
}
inline void acquire(const void* address) {
  if (orders_memory) __tsan_acquire(const_cast<void*>(address));
}

// While one lives, what this thread reads and writes is the emulator's business, not the kernel's.
struct Quiet {
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

// A thread, as the sanitizer sees it.
class Observed {
 public:
  Observed() : context_(__tsan_create_fiber(0)) {}
  Observed(const Observed&) = delete;
  ~Observed() { __tsan_destroy_fiber(context_); }

  // Right before the stacks are switched, or instead of it. Orders nothing.
  void enter() const { __tsan_switch_to_fiber(context_, __tsan_switch_to_fiber_no_sync); }

 private:
  void* context_;
};

// The thread that runs the emulator.
class Observer {
 public:
  void enter() const { __tsan_switch_to_fiber(context_, __tsan_switch_to_fiber_no_sync); }

 private:
  void* context_ = __tsan_get_current_fiber();
};

#else

inline void release(const void*) {}
inline void acquire(const void*) {}
struct Quiet {
  ~Quiet() {}
};
struct Observed {
  void enter() const {}
};
struct Observer {
  void enter() const {}
};

#endif

}  // namespace emulator
