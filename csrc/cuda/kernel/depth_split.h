// Wide heads by mma: the four warps that share a slice, each for other dims of V, would all have to compute
// the same scores from all of D. Instead each computes its part of D, and they add the parts up through
// shared memory, all in the same order, so that they go on with the same bits.
#pragma once

#include "ptx.h"
#include "traits.h"

namespace leanattn {

// One warp's part of D, in depth steps of 16: [begin, begin + kWarpDepthSteps) or two steps less.
template <class Traits>
class DepthPart {
 public:
  static constexpr int kTokenSteps = Traits::kTokenSteps;
  static constexpr int kRowSteps = Traits::kRowSteps;

  __device__ __forceinline__ DepthPart(int part, int slice, typename Traits::SharedStorage& smem)
      : smem_(smem), slice_(slice), begin_(first_step(part)), end_(first_step(part + 1)) {}

  __device__ __forceinline__ int begin() const { return Traits::kSplitsDepth ? begin_ : 0; }

  // Whether the part has as many steps and one more.
  __device__ __forceinline__ bool contains(int step) const {
    return !Traits::kSplitsDepth || begin_ + step < end_;
  }

  // Products over the part become products over all of D: [kTokenSteps][kRowSteps] fragments.
  __device__ __forceinline__ void sum(float (&products)[kTokenSteps][kRowSteps][4]) {
    if constexpr (Traits::kSplitsDepth) {
      const int lane = threadIdx.x % 32;
      auto& parts = smem_.score_parts[turn_];
      turn_ ^= 1;
#pragma unroll
      for (int i = 0; i < kTokenSteps * kRowSteps; ++i) {
        const float (&p)[4] = products[i / kRowSteps][i % kRowSteps];
        parts[threadIdx.x / 32][i][lane] = float4{p[0], p[1], p[2], p[3]};
      }
      // All parts are there. The other turn's have been read, too: those of the tile after this one go
      // where nobody reads any more.
      ptx::bar_sync(kSliceBarrier + slice_, Traits::kSliceThreads);
#pragma unroll
      for (int i = 0; i < kTokenSteps * kRowSteps; ++i) {
        float4 total = parts[slice_][i][lane];
#pragma unroll
        for (int part = 1; part < Traits::kDepthParts; ++part) {
          const float4 p = parts[part * Traits::kSlices + slice_][i][lane];
          total = {total.x + p.x, total.y + p.y, total.z + p.z, total.w + p.w};
        }
        float (&p)[4] = products[i / kRowSteps][i % kRowSteps];
        p[0] = total.x;
        p[1] = total.y;
        p[2] = total.z;
        p[3] = total.w;
      }
    }
  }

 private:
  static_assert(!Traits::kSplitsDepth || Traits::kRowGroups == 1,
                "a slice's warps differ in Dv alone");

  static __device__ __forceinline__ int first_step(int part) {
    return part * (Traits::kDepthSteps / 2) / Traits::kDepthParts * 2;
  }

  typename Traits::SharedStorage& smem_;
  int slice_;
  int begin_, end_;
  int turn_ = 0;
};

}  // namespace leanattn
