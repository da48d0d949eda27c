#pragma once

#include "emulated_ptx.h"

namespace cutlass::arch {

inline void fence_barrier_init() {}

struct ClusterTransactionBarrier {
  static void arrive_and_expect_tx(uint64_t* barrier, uint32_t bytes) {
    leanattn::ptx::MBarrier& state = leanattn::ptx::mbarrier(barrier);
    const emulator::Quiet quiet;
    state.bytes += static_cast<int32_t>(bytes);
    leanattn::ptx::mbarrier_arrive(barrier);
  }
  static void expect_transaction(uint64_t* barrier, uint32_t bytes) {
    leanattn::ptx::MBarrier& state = leanattn::ptx::mbarrier(barrier);
    const emulator::Quiet quiet;
    state.bytes += static_cast<int32_t>(bytes);
  }
};

}  // namespace cutlass::arch
