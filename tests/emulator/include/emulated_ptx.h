// What csrc/cuda/kernel/ptx.h wraps, emulated.
#pragma once

#include "emulator.h"

namespace leanattn::ptx {

inline uint8_t* dynamic_smem() { return emulator::cta().smem; }

template <class T>
T* pin_smem(T* smem) {
  return smem;
}

// An mbarrier in its 8 bytes.
struct MBarrier {
  uint16_t phase : 1;
  uint16_t expected : 15;
  int16_t pending;
  int32_t bytes;

  void check() {
    if (pending == 0 && bytes == 0) {
      phase ^= 1;
      pending = expected;
    }
    if (pending < 0) throw std::logic_error("more arrivals than an mbarrier expects");
  }
};
static_assert(sizeof(MBarrier) == 8);

// To the sanitizer, whoever uses one reads it and only its initialisation writes it.
inline MBarrier& mbarrier(uint64_t* barrier_smem) {
  static_cast<void>(*static_cast<volatile uint64_t*>(barrier_smem));
  return *reinterpret_cast<MBarrier*>(barrier_smem);
}

inline void mbarrier_init(uint64_t* barrier_smem, uint32_t arrivals) {
  MBarrier& barrier = mbarrier(barrier_smem);
  barrier.phase = 0;
  barrier.expected = arrivals;
  barrier.pending = arrivals;
  barrier.bytes = 0;
}

inline void mbarrier_arrive(uint64_t* barrier_smem) {
  emulator::release(barrier_smem);
  MBarrier& barrier = mbarrier(barrier_smem);
  const emulator::Quiet quiet;
  --barrier.pending;
  barrier.check();
}

inline void cp_async_mbarrier_arrive_noinc(uint64_t* barrier_smem) {
  const emulator::Quiet quiet;
  emulator::Fiber& self = emulator::fiber();
  self.copier = nullptr;
  emulator::copy_later([barrier_smem, &self] {  // copies land in order
    emulator::acquire(&self.landed);
    mbarrier_arrive(barrier_smem);
  });
}

inline void mbarrier_wait_parity(uint64_t* barrier_smem, uint32_t parity) {
  mbarrier(barrier_smem);
  emulator::yield_until("an mbarrier",
                        [barrier_smem, parity] { return mbarrier(barrier_smem).phase != parity; });
  emulator::acquire(barrier_smem);
}

inline void bar_sync(int barrier, int threads) { emulator::sync(barrier, threads); }
inline void bar_arrive(int barrier, int threads) {
  emulator::arrive(emulator::cta().barriers.at(barrier), threads);
}

inline void fence_proxy_async() {}

inline void fence_acq_rel_gpu() {}  // atomicInc orders

inline void cluster_sync_relaxed() {
  emulator::Cluster& cluster = *emulator::cta().cluster;
  const emulator::Quiet quiet;
  const int generation = cluster.generation;
  ++cluster.arrived;
  cluster.check();
  emulator::yield_until("the cluster",
                        [&cluster, generation] { return cluster.generation != generation; });
}

}  // namespace leanattn::ptx
