// The ring between the producer warps and the consumer warps. A stage is full when its copy has
// landed and empty when every consumer warp has read it; each side walks the stages in order and
// flips the phase it waits for whenever it passes the last one.
#pragma once

#include "ptx.h"
#include "traits.h"

namespace leanattn {

template <class Traits>
__device__ __forceinline__ void sync_consumers() {
  ptx::bar_sync(kConsumerBarrier, Traits::kConsumerThreads);
}

struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance(int num_stages) {
    if (++stage == num_stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Whether a tile takes one stage, of keys whose first columns are the values, instead of two.
template <class Traits>
__device__ __forceinline__ bool values_in_keys(const DecodeParams& params) {
  return Traits::kWide && params.values_in_keys;
}

template <class Traits>
class Ring {
 public:
  using SharedStorage = typename Traits::SharedStorage;

  // `bulk_copies`: by the copy engine, else by cp.async.
  __device__ __forceinline__ Ring(SharedStorage& smem, int num_stages, bool bulk_copies)
      : smem_(&smem), num_stages_(num_stages), bulk_copies_(bulk_copies) {}

  // By one lane of the producer: the barriers of the first tile's stages, before its first copy, and all
  // others, before the set-up barrier. `arrivals` fill a stage.
  __device__ __forceinline__ void init_first(int arrivals) { init(0, 2, arrivals); }
  __device__ __forceinline__ void init_rest(int arrivals) { init(2, Traits::kMaxStages, arrivals); }

  __device__ __forceinline__ uint8_t* stages_smem() const {
    return reinterpret_cast<uint8_t*>(smem_) + Traits::kRingOffset;
  }
  __device__ __forceinline__ uint8_t* stage_smem() const {
    return stages_smem() + position_.stage * Traits::kStageBytes;
  }
  __device__ __forceinline__ uint64_t* full_barrier() const {
    return &smem_->full[position_.stage];
  }

  // Producer: until every consumer warp has read the stage. A fresh barrier counts as just past the
  // phase of parity 1, so that the first round does not wait.
  __device__ __forceinline__ void wait_empty() const {
    ptx::mbarrier_wait_parity(&smem_->empty[position_.stage], position_.phase ^ 1);
    // No lane may fall a whole round behind the one that copies: it would wait for a phase long gone.
    __syncwarp();
  }

  // Consumer: until the copy has landed; the wait acquires what the copy wrote.
  __device__ __forceinline__ void wait_full() const {
    ptx::mbarrier_wait_parity(full_barrier(), position_.phase);
    // wgmma reads by way of the asynchronous proxy, as bulk copies write; cp.async does not.
    if constexpr (Traits::kWgmma) {
      if (!bulk_copies_) ptx::fence_proxy_async();
    }
  }

  // Consumer, whole warp: done reading. The lanes' reads come before lane 0's arrival.
  __device__ __forceinline__ void release() const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&smem_->empty[position_.stage]);
  }

  __device__ __forceinline__ void advance() { position_.advance(num_stages_); }
  __device__ __forceinline__ int num_stages() const { return num_stages_; }

 private:
  __device__ __forceinline__ void init(int begin, int end, int arrivals) {
#pragma unroll
    for (int stage = begin; stage < end; ++stage) {  // a few stores, and no loop
      ptx::mbarrier_init(&smem_->full[stage], arrivals);
      ptx::mbarrier_init(&smem_->empty[stage], Traits::kConsumerWarps);
    }
  }

  SharedStorage* smem_;
  int num_stages_;
  bool bulk_copies_;
  RingPosition position_;
};

}  // namespace leanattn
