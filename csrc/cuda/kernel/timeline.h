// When each CTA of a launch got where, for bench/timeline.py. Only a build with LEANATTN_TIMELINE=1 has
// it; in any other mark() is nothing.
#pragma once

#include "core/params.h"

namespace leanattn {

// In the order in which they come; of those that come again, the last time counts.
enum class Mark {
  kEntry,       // the producer's first instruction
  kFirstKeys,   // its first K is under way
  kFirstQuery,  // and q
  kSetUp,       // all barriers are initialised
  kFirstTask,   // the consumers have one
  kLoopEnd,     // their last tile
  kMerged,      // the warps' states are one
  kTicket,      // drawn, and the answer is there
  kExit,        // the consumers are done
};

#ifdef LEANATTN_TIMELINE
// By one thread.
__device__ __forceinline__ void mark(const DecodeParams& params, Mark mark, bool condition = true) {
  if (!condition || !params.timeline || blockIdx.x >= kMaxTimelineUnits) return;
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns)::"memory");
  params.timeline[blockIdx.x * kNumMarks + static_cast<int>(mark)] = ns;
}
#else
__device__ __forceinline__ void mark(const DecodeParams&, Mark, bool = true) {}
#endif

}  // namespace leanattn
