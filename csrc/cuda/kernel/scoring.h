// From the dot products of a segment's rows to scores in log2 units: scale, softcap, ALiBi and the
// mask. Shared by the main loops, which differ in what elements a lane holds.
#pragma once

#include "traits.h"

namespace leanattn {

template <class Traits>
class Scoring {
 public:
  __device__ __forceinline__ explicit Scoring(const DecodeParams& params)
      : params_(params),
        scaled_only_(Traits::Features::kScaledScores ||
                     (params.softcap == 0.0f && params.alibi_slopes == nullptr)),
        scale_log2_(params.softmax_scale * kLog2E) {}

  __device__ __forceinline__ void begin(const Segment& segment) { segment_ = &segment; }

  __device__ __forceinline__ int position_of_row(int item_row) const {
    return query_row<Traits::kPlainItems>(params_, *segment_, item_row).position;
  }

  __device__ __forceinline__ KeyRange keys_of(int position) const {
    if constexpr (Traits::kPlainItems) return segment_->keys.any;
    return keys_seen_from(problem_of<Traits>(params_), segment_->sequence, position);
  }

  // Whether a score is only the scaled product, wherever the key is seen.
  __device__ __forceinline__ bool scaled_only() const { return scaled_only_; }
  // Not to be fused with what follows, in some kernels and not in others.
  __device__ __forceinline__ float scaled(float dot) const { return __fmul_rn(dot, scale_log2_); }

  // For the row at `position`: calls visit(score) once, where score(dot, key) is the row's score for
  // the key, -inf if it does not see it. One branch for all elements: the code for each is short or long.
  template <class Visit>
  __device__ __forceinline__ void finish(int item_row, int position, const Visit& visit) const {
    const KeyRange keys = keys_of(position);
    if (scaled_only_) {
      visit(
          [&](float dot, int key) { return keys.contains(key) ? scaled(dot) : kNegativeInfinity; });
      return;
    }
    if constexpr (!Traits::Features::kScaledScores) {
      float slope = 0.0f;
      if (params_.alibi_slopes) {
        const int head = query_row(params_, *segment_, item_row).head;
        slope = params_.alibi_slopes[segment_->seq * params_.alibi_batch_stride +
                                     head * params_.alibi_head_stride];
      }
      // ALiBi over several ranks comes after all else, apart: this is the long code.
      const Shard shard = problem_of<Traits>(params_).shard;
      const float later_slope = shard.is_whole() ? 0.0f : slope;
      if (later_slope != 0.0f) slope = 0.0f;
      visit([&](float dot, int key) {
        const float score = score_log2(params_, dot, slope, abs(position - key));
        return keys.contains(key) ? score : kNegativeInfinity;
      });
      if (later_slope == 0.0f) return;
      visit([&](float score, int key) {
        const auto distance = static_cast<float>(abs(position - shard.token_of(key)));
        return keys.contains(key) ? score - later_slope * distance * kLog2E : kNegativeInfinity;
      });
    }
  }

 private:
  const DecodeParams& params_;
  const Segment* segment_ = nullptr;
  bool scaled_only_;
  float scale_log2_;
};

}  // namespace leanattn
