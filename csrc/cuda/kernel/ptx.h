// The PTX that CUTLASS has no wrapper for on both sm_80 and sm_90: its mbarrier wrappers need
// sm_90. One instruction a function, named after it; the rest comes from cute/arch.
#pragma once

#include "core/host_device.h"

#if defined(LEANATTN_EMULATED_ARCH)
#include <emulated_ptx.h>  // of tests/emulator
#else

#include <cstdint>

#include <cute/arch/util.hpp>

namespace leanattn::ptx {

// The CTA's dynamic shared memory.
__device__ __forceinline__ uint8_t* dynamic_smem() {
  extern __shared__ __align__(1024) uint8_t memory_smem[];
  return memory_smem;
}

// The same memory by an address that stays in a register. Of other addresses in shared memory ptxas works
// out the base anew at every use, from a special register that takes its time.
template <class T>
__device__ __forceinline__ T* pin_smem(T* smem) {
  uint32_t address = cute::cast_smem_ptr_to_uint(smem);
  asm volatile("" : "+r"(address));
  return static_cast<T*>(__cvta_shared_to_generic(address));
}

// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier-init
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier_smem, uint32_t arrivals) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(cute::cast_smem_ptr_to_uint(barrier_smem)),
      "r"(arrivals)
      : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier_smem) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(
                   cute::cast_smem_ptr_to_uint(barrier_smem))
               : "memory");
}

// Arrives once all cp.async of this thread so far have landed; does not raise the expected count.
__device__ __forceinline__ void cp_async_mbarrier_arrive_noinc(uint64_t* barrier_smem) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(
                   cute::cast_smem_ptr_to_uint(barrier_smem))
               : "memory");
}

// Waits until the phase of the given parity has completed.
__device__ __forceinline__ void mbarrier_wait_parity(uint64_t* barrier_smem, uint32_t parity) {
  const uint32_t address = cute::cast_smem_ptr_to_uint(barrier_smem);
  uint32_t done = 0;
  while (!done) {
#if LEANATTN_ARCH >= 900
    // Suspends the thread for a while instead of spinning.
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
#endif
  }
}

// A barrier among `threads` threads (a multiple of 32) of the CTA; barrier 0 is __syncthreads.
__device__ __forceinline__ void bar_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The same without waiting: counts this warp's threads among those that `barrier` waits for.
__device__ __forceinline__ void bar_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// What this thread has written to shared memory, or has seen written, comes before what wgmma and bulk
// copies do there afterwards. CUTLASS's lets the compiler move plain stores past it.
__device__ __forceinline__ void fence_proxy_async() {
#if LEANATTN_ARCH >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Between accesses of this thread, and what has been seen of others, to global memory: with an atomic
// after it a release, with one before it an acquire. __threadfence is sequentially consistent, and dearer.
__device__ __forceinline__ void fence_acq_rel_gpu() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// A barrier of the cluster that publishes nothing: it only keeps CTAs, and their shared memory, there.
__device__ __forceinline__ void cluster_sync_relaxed() {
#if LEANATTN_ARCH >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

}  // namespace leanattn::ptx

#endif
