#pragma once

#include "emulated_ptx.h"

namespace cutlass::arch {

inline void fence_barrier_init() {}
inline void fence_view_async_shared() {}

struct ClusterTransactionBarrier {
  static void arrive_and_expect_tx(uint64_t* barrier, uint32_t bytes) {
    leanattn::ptx::mbarrier(barrier).bytes += static_cast<int32_t>(bytes);
    leanattn::ptx::mbarrier_arrive(barrier);
  }
};

}  // namespace cutlass::arch
