// From the dot products of a segment's rows to scores in log2 units: scale, softcap, ALiBi and the
// mask. Shared by the main loops, which differ in what elements a lane holds.
#pragma once

#include "../../params.h"

namespace leanattn {

class Scoring {
 public:
  // One query row.
  struct Row {
    int position;
    KeyRange keys;  // that it sees
    float slope;    // of its head
  };

  __device__ __forceinline__ explicit Scoring(const DecodeParams& params)
      : params_(params),
        plain_(params.softcap == 0.0f && params.alibi_slopes == nullptr),
        scale_log2_(params.softmax_scale * kLog2E) {}

  __device__ __forceinline__ void begin(const Segment& segment) { segment_ = &segment; }

  __device__ __forceinline__ int position_of_row(int item_row) const {
    return query_row(params_, *segment_, item_row).position;
  }

  __device__ __forceinline__ KeyRange keys_of(int position) const {
    return visible_keys(params_.problem.mask, segment_->sequence.length, position);
  }

  __device__ __forceinline__ Row row(int item_row, int position) const {
    Row row{position, keys_of(position), 0.0f};
    if (params_.alibi_slopes) {
      const int head = query_row(params_, *segment_, item_row).head;
      row.slope = params_.alibi_slopes[segment_->seq * params_.alibi_batch_stride +
                                       head * params_.alibi_head_stride];
    }
    return row;
  }

  // Whether a score is only the scaled product, wherever the key is seen.
  __device__ __forceinline__ bool plain() const { return plain_; }
  __device__ __forceinline__ float scaled(float dot) const { return dot * scale_log2_; }

  // -inf where the row does not see the key.
  __device__ __forceinline__ float score(const Row& row, float dot, int key) const {
    const float score =
        plain_ ? scaled(dot) : score_log2(params_, dot, row.slope, abs(row.position - key));
    return row.keys.contains(key) ? score : kNegativeInfinity;
  }

 private:
  const DecodeParams& params_;
  const Segment* segment_ = nullptr;
  bool plain_;
  float scale_log2_;
};

}  // namespace leanattn
