// The main loop of a consumer warpgroup, by wgmma: its slice of every tile goes through S = Q K^T, the
// online softmax and O += P V, in steps of kStepTokens. K, V and q are read from shared memory by the
// tensor cores; S, P and O stay in registers. All four warps do the same in step, for a wgmma is all
// of theirs: what is decided here is decided from what they all see.
#pragma once

#include "mainloop.h"
#include "step_values.h"
#include "wgmma.h"

namespace leanattn {

template <class Traits>
struct WarpgroupPlace {
  int slice;      // of the tile's tokens
  int row_group;  // of the item's rows: 16 of them
  int dim_group;  // of Dv
  int g;          // lane / 4: row within half a row group
  int t;          // lane % 4: columns 2t and 2t + 1 of 8

  __device__ __forceinline__ explicit WarpgroupPlace(int warp)
      : slice(warp / Traits::kRowGroups % Traits::kSlices),
        row_group(warp % Traits::kRowGroups),
        dim_group(warp / (Traits::kRowGroups * Traits::kSlices)),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4) {}

  // The item row of this lane in half h of its row group.
  __device__ __forceinline__ int row(int h) const { return row_group * 16 + h * 8 + g; }
};

// Rows row(0) and row(1).
template <class Traits>
struct WarpgroupState {
  float max[2];
  float sum[2];                      // this lane's share until reduce_sum
  float o[Traits::kWarpDim / 8][4];  // [64 rows, 8 of Dv] each; e / 2 is the half

  __device__ __forceinline__ void clear() {
    for (int h = 0; h < 2; ++h) {
      max[h] = kNegativeInfinity;
      sum[h] = 0.0f;
    }
    for (int j = 0; j < Traits::kWarpDim / 8; ++j) {
      for (int e = 0; e < 4; ++e) o[j][e] = 0.0f;
    }
  }

  // The lanes of a row sum different tokens; afterwards all hold the whole sum.
  __device__ __forceinline__ void reduce_sum() {
    for (int h = 0; h < 2; ++h) {
      for (int lanes = 1; lanes < 4; lanes *= 2) sum[h] += __shfl_xor_sync(~0u, sum[h], lanes);
    }
  }
};

template <class Traits, class Element>
class WarpgroupMainLoop {
  static_assert(!Traits::kWide, "K and V are apart here");

 public:
  using Place = WarpgroupPlace<Traits>;
  using State = WarpgroupState<Traits>;
  static constexpr int kStepTokens = Traits::kStepTokens;
  static constexpr int kBlocks = kStepTokens / 8;  // of 8 tokens, a step
  static constexpr int kValueBlocks = Traits::kWarpDim / 8;

  __device__ __forceinline__ WarpgroupMainLoop(const DecodeParams& params, const Place& place,
                                               typename Traits::SharedStorage&)
      : scoring_(params), place_(place) {}

  // Tiles [tile_begin, tile_end) of a segment.
  __device__ __forceinline__ void run(const typename Traits::Task& task, int tile_begin,
                                      int tile_end, Ring<Traits>& ring, State& state) {
    const Segment& segment = task.segment;
    segment_ = &segment;
    scoring_.begin(segment);
    warp_has_rows_ = place_.row_group * 16 < task.num_rows;
    const int first_row = place_.row_group / 4 * 64;
    warpgroup_has_rows_ = first_row < task.num_rows;
    q_ = make_operand(task.q + first_row * 128);
    ptx::fence_proxy_async();  // cp.async has written q by the generic proxy
    state.clear();
    for (int h = 0; h < 2; ++h) position_[h] = scoring_.position_of_row(place_.row(h));
    for (int tile = tile_begin; tile < tile_end; ++tile) take_tile(tile, ring, state);
    state.reduce_sum();
  }

 private:
  using Products = float[kBlocks][4];              // S: [64 rows, 8 tokens] each
  using Probabilities = uint32_t[kBlocks / 2][4];  // P as A operand: [64 rows, 16 tokens] each

  __device__ __forceinline__ void take_tile(int tile, Ring<Traits>& ring, State& state) {
    const KeyRange any = segment_->keys.any;
    const KeyRange all = segment_->keys.all;
    const Ring<Traits> keys = ring;
    ring.advance();
    const Ring<Traits> values = ring;
    ring.advance();
    keys.wait_full();
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) {
      const int row = place_.slice * Traits::kSliceTokens + step * kStepTokens;  // of the stage
      const int token = tile * Traits::kTile + row;
      // Subtracted, since token + kStepTokens may be 2^31.
      const bool nothing = token >= any.end || any.begin - token >= kStepTokens;
      const bool everything = token >= all.begin && all.end - token >= kStepTokens;
      Products products;
      if (!nothing && warpgroup_has_rows_) multiply_keys(keys.stage_smem(), row, products);
      if (step == Traits::kSteps - 1) keys.release();
      if (nothing) {
        values.wait_full();  // before the release, as ever
        continue;
      }
      Probabilities probabilities;
      if (everything && scoring_.scaled_only()) {
        softmax<true>(token, products, state, probabilities);
      } else {
        softmax<false>(token, products, state, probabilities);
      }
      values.wait_full();
      if (!everything) {
        const StepTokens tokens{token, row, kStepTokens};
        if (token < any.begin || any.end - token < kStepTokens) {
          clear_unseen_values<Traits>(values.stage_smem(), tokens, segment_->keys,
                                      threadIdx.x % Traits::kSliceThreads, Traits::kSliceThreads);
          // The zeros are for wgmma, and come before the copy that refills the stage.
          ptx::fence_proxy_async();
          ptx::bar_sync(kSliceBarrier + place_.slice, Traits::kSliceThreads);  // all are written
        }
        if (spoils_some_rows<Traits, Element>(values.stage_smem(), tokens, segment_->keys)) {
          multiply_values_by_token(values.stage_smem(), row, token, probabilities, state);
          continue;
        }
      }
      if (warpgroup_has_rows_) {
        multiply_values(values.stage_smem(), row, probabilities, state);
      }
    }
    values.release();
  }

  // Stage rows [row, row + kStepTokens).
  __device__ __forceinline__ void multiply_keys(const uint8_t* k_smem, int row,
                                                Products& products) const {
    const uint64_t k = make_operand(k_smem + row * 128);
    wgmma_begin(products);
#pragma unroll
    for (int depth = 0; depth < Traits::kDepthSteps; ++depth) {
      const int block = depth / 4;
      const int within = depth % 4 * 32;
      wgmma_scores<Element>(products,
                            advance_operand(q_, block * Traits::kQueryRows * 128 + within),
                            advance_operand(k, block * Traits::kTile * 128 + within), depth > 0);
    }
    wgmma_wait(products);
  }

  __device__ __forceinline__ void multiply_values(const uint8_t* v_smem, int row,
                                                  Probabilities& probabilities,
                                                  State& state) const {
    const int block = place_.dim_group * (Traits::kWarpDim / 64);
    const uint64_t v =
        make_operand(v_smem + block * (Traits::kTile * 128) + row * 128, Traits::kTile * 128);
    wgmma_begin(state.o, probabilities);
#pragma unroll
    for (int i = 0; i < kStepTokens / 16; ++i) {
      wgmma_values<Element>(state.o, probabilities[i], advance_operand(v, i * 16 * 128));
    }
    wgmma_wait(state.o, probabilities);
  }

  // Element e of block j of the products: half e / 2 of the rows.
  __device__ __forceinline__ int token_of(int token, int j, int e) const {
    return token + j * 8 + place_.t * 2 + e % 2;
  }

  // kClear: all rows see all keys, and nothing but a scale happens to the scores.
  template <bool kClear>
  __device__ __forceinline__ void softmax(int token, Products& products, State& state,
                                          Probabilities& probabilities) const {
    if (!warp_has_rows_) {  // of the warp; what comes of it, nobody reads
      for (int i = 0; i < kBlocks / 2; ++i) {
        for (int r = 0; r < 4; ++r) probabilities[i][r] = 0;
      }
      return;
    }
    float factor[2];
    bool rescale = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      finish_scores<kClear>(token, h, products);
      float new_max = state.max[h];
      for (int j = 0; j < kBlocks; ++j) {
        new_max = fmaxf(new_max, fmaxf(products[j][h * 2], products[j][h * 2 + 1]));
      }
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, lanes));
      }
      factor[h] = rescale_factor(state.max[h], new_max);
      rescale |= new_max != state.max[h];
      state.max[h] = new_max;
      state.sum[h] *= factor[h];
      const float base = exponent_base(new_max);
      for (int j = 0; j < kBlocks; ++j) {
        float (&p)[4] = products[j];
        for (int c = 0; c < 2; ++c) {
          p[h * 2 + c] = fast_exp2(p[h * 2 + c] - base);
          state.sum[h] += p[h * 2 + c];
        }
        probabilities[j / 2][j % 2 * 2 + h] = pack<Element>(p[h * 2], p[h * 2 + 1]);
      }
    }
    // Most steps bring no new maximum in any row.
    if (__any_sync(~0u, rescale)) {
#pragma unroll
      for (int j = 0; j < kValueBlocks; ++j) {
        for (int e = 0; e < 4; ++e) state.o[j][e] *= factor[e / 2];
      }
    }
  }

  // Dot products of half h become scores.
  template <bool kClear>
  __device__ __forceinline__ void finish_scores(int token, int h, Products& products) const {
    if constexpr (kClear) {
      for (int j = 0; j < kBlocks; ++j) {
        for (int e = h * 2; e < h * 2 + 2; ++e) products[j][e] = scoring_.scaled(products[j][e]);
      }
    } else {
      scoring_.finish(place_.row(h), position_[h], [&](auto score) {
        for (int j = 0; j < kBlocks; ++j) {
          for (int e = h * 2; e < h * 2 + 2; ++e) {
            products[j][e] = score(products[j][e], token_of(token, j, e));
          }
        }
      });
    }
  }

  // The slow and exact way, without wgmma: each token's value is added only to the rows that see it.
  __device__ __forceinline__ void multiply_values_by_token(const uint8_t* v_smem, int row,
                                                           int token, Probabilities& probabilities,
                                                           State& state) const {
#pragma unroll 1
    for (int offset = 0; offset < kStepTokens; ++offset) {
      // Probabilities of the step's next 16 tokens move into place, so that the loop stays rolled.
      if (offset % 16 == 0 && offset > 0) {
        for (int i = 0; i + 1 < kBlocks / 2; ++i) {
          for (int r = 0; r < 4; ++r) probabilities[i][r] = probabilities[i + 1][r];
        }
      }
      const int key = token + offset;
      if (!segment_->keys.any.contains(key)) continue;
      bool sees[2];
      float p[2];
      for (int h = 0; h < 2; ++h) {
        const uint32_t pair = offset % 16 < 8 ? probabilities[0][h] : probabilities[0][2 + h];
        const uint32_t of_key = __shfl_sync(~0u, pair, place_.g * 4 + offset % 8 / 2);
        const float2 both = unpack<Element>(of_key);
        p[h] = offset % 2 == 0 ? both.x : both.y;
        sees[h] = scoring_.keys_of(position_[h]).contains(key);
      }
#pragma unroll
      for (int j = 0; j < kValueBlocks; ++j) {
        const uint8_t* chunk_smem = v_smem + swizzled_offset<Traits::kTile>(
                                                 row + offset, place_.dim_group * kValueBlocks + j);
        const float2 v = unpack<Element>(reinterpret_cast<const uint32_t*>(chunk_smem)[place_.t]);
        for (int h = 0; h < 2; ++h) {
          if (!sees[h]) continue;
          state.o[j][h * 2] += p[h] * v.x;
          state.o[j][h * 2 + 1] += p[h] * v.y;
        }
      }
    }
  }

  Scoring<Traits> scoring_;
  const Place& place_;
  const Segment* segment_;
  uint64_t q_;  // operand of the warpgroup's 64 rows
  bool warp_has_rows_;
  bool warpgroup_has_rows_;
  int position_[2];
};

}  // namespace leanattn
