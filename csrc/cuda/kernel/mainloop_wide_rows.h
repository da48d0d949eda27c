// The main loop of both consumer warpgroups for 64 rows of a wide head, by wgmma: S = Q K^T, the online softmax
// and O += P V. Each warpgroup scores half of a tile's tokens and has half of Dv, so that no product is
// computed twice: they agree on the rows' largest scores through shared memory, and P goes there too, where
// both read it as wgmma's operand.
#pragma once

#include "mainloop_warpgroup.h"
#include "wide_tile.h"

namespace leanattn {

template <class Traits, class Element>
class WideRowsMainLoop {
 public:
  using Place = WarpgroupPlace<Traits>;
  using State = WarpgroupState<Traits>;
  static constexpr int kHalfTokens = Traits::kTile / 2;
  static constexpr int kBlocks = kHalfTokens / 8;  // of 8 tokens, a half
  static constexpr int kValueBlocks = Traits::kWarpDim / 8;

  __device__ __forceinline__ WideRowsMainLoop(const DecodeParams& params, const Place& place,
                                              typename Traits::SharedStorage& smem)
      : scoring_(params), params_(params), place_(place), meeting_(smem.meetings[0]) {}

  // Tiles [tile_begin, tile_end) of a segment.
  __device__ __forceinline__ void run(const typename Traits::Task& task, int tile_begin,
                                      int tile_end, Ring<Traits>& ring, State& state) {
    segment_ = &task.segment;
    scoring_.begin(task.segment);
    q_ = make_operand(task.q);
    ptx::fence_proxy_async();  // cp.async has written q by the generic proxy
    state.clear();
    for (int h = 0; h < 2; ++h) position_[h] = scoring_.position_of_row(place_.row(h));
    for (int tile = tile_begin; tile < tile_end; ++tile) {
      take_wide_tile<Traits, Element>(*this, params_, segment_->keys, scoring_.scaled_only(), tile,
                                      ring, state);
    }
    state.reduce_sum();
    meet(state.sum, [](float left, float right) { return left + right; });
  }

  // Of take_wide_tile:

  using Scores = float[kBlocks][4];  // S: [64 rows, 8 tokens] each

  __device__ __forceinline__ void sync() const {
    ptx::bar_sync(kSliceBarrier, Traits::kSliceThreads);
  }

  __device__ __forceinline__ void multiply_keys(const uint8_t* k_smem, Scores& scores) const {
    const uint64_t k = rebase_operand(make_operand(k_smem + half() * kHalfTokens * 128));
    const uint64_t q = rebase_operand(q_);
    wgmma_begin(scores);
#pragma unroll
    for (int depth = 0; depth < Traits::kDepthSteps; ++depth) {
      const int block = depth / 4;
      const int within = depth % 4 * 32;
      wgmma_scores<Element>(scores, advance_operand(q, block * Traits::kQueryRows * 128 + within),
                            advance_operand(k, block * Traits::kTile * 128 + within), depth > 0);
    }
    wgmma_wait(scores);
  }

  __device__ __forceinline__ void multiply_values(const uint8_t* v_smem, State& state) const {
    const int block = half() * (Traits::kWarpDim / 64);
    const uint64_t v =
        rebase_operand(make_operand(v_smem + block * (Traits::kTile * 128), Traits::kTile * 128));
    const uint64_t p = rebase_operand(make_operand(meeting_.p));
    wgmma_begin(state.o);
#pragma unroll
    for (int i = 0; i < Traits::kTile / 16; ++i) {
      wgmma_values<Element>(state.o, advance_operand(p, i * 32), advance_operand(v, i * 16 * 128));
    }
    wgmma_wait(state.o);
  }

  // P goes to shared memory, [64 rows][64 tokens]. Every warp has been behind the barrier of this tile's
  // largest scores, so its products with the tile before are done.
  template <bool kClear>
  __device__ __forceinline__ void softmax(int token, Scores& scores, State& state) {
    float new_max[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      finish_scores<kClear>(token + half() * kHalfTokens, h, scores);
      new_max[h] = state.max[h];
      for (int j = 0; j < kBlocks; ++j) {
        new_max[h] = fmaxf(new_max[h], fmaxf(scores[j][h * 2], scores[j][h * 2 + 1]));
      }
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        new_max[h] = fmaxf(new_max[h], __shfl_xor_sync(~0u, new_max[h], lanes));
      }
    }
    meet(new_max, [](float left, float right) { return fmaxf(left, right); });
    float factor[2];
    bool rescale = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      factor[h] = rescale_factor(state.max[h], new_max[h]);
      rescale |= new_max[h] != state.max[h];
      state.max[h] = new_max[h];
      state.sum[h] *= factor[h];
      const float base = exponent_base(new_max[h]);
      for (int j = 0; j < kBlocks; ++j) {
        float (&p)[4] = scores[j];
        for (int c = 0; c < 2; ++c) {
          p[h * 2 + c] = fast_exp2(p[h * 2 + c] - base);
          state.sum[h] += p[h * 2 + c];
        }
        uint8_t* chunk_smem =
            meeting_.p + swizzled_offset<Traits::kQueryRows>(place_.row(h), half() * kBlocks + j);
        reinterpret_cast<uint32_t*>(chunk_smem)[place_.t] = pack<Element>(p[h * 2], p[h * 2 + 1]);
      }
    }
    // Most tiles bring no new maximum in any row.
    if (__any_sync(~0u, rescale)) {
#pragma unroll
      for (int j = 0; j < kValueBlocks; ++j) {
        for (int e = 0; e < 4; ++e) state.o[j][e] *= factor[e / 2];
      }
    }
  }

  // The slow and exact way, without wgmma: each token's value is added only to the rows that see it.
  __device__ __forceinline__ void multiply_values_by_token(const uint8_t* v_smem, int token,
                                                           State& state) const {
#pragma unroll 1
    for (int row = 0; row < Traits::kTile; ++row) {
      const int key = token + row;  // the one after the last may be 2^31
      if (!segment_->keys.any.contains(key)) continue;
      float p[2];
      bool sees[2];
      for (int h = 0; h < 2; ++h) {
        const uint8_t* chunk_smem =
            meeting_.p + swizzled_offset<Traits::kQueryRows>(place_.row(h), row / 8);
        p[h] = to_float(reinterpret_cast<const Element*>(chunk_smem)[row % 8]);
        sees[h] = scoring_.keys_of(position_[h]).contains(key);
      }
#pragma unroll
      for (int j = 0; j < kValueBlocks; ++j) {
        const uint8_t* chunk_smem =
            v_smem + swizzled_offset<Traits::kTile>(row, half() * kValueBlocks + j);
        const float2 v = unpack<Element>(reinterpret_cast<const uint32_t*>(chunk_smem)[place_.t]);
        for (int h = 0; h < 2; ++h) {
          if (!sees[h]) continue;
          state.o[j][h * 2] += p[h] * v.x;
          state.o[j][h * 2 + 1] += p[h] * v.y;
        }
      }
    }
  }

 private:
  // Which half of a tile's tokens this warpgroup scores, and of Dv it has.
  __device__ __forceinline__ int half() const { return place_.dim_group; }

  // A number of each row, which the four lanes of the row have, becomes combine(left half's, right half's).
  // Whoever comes here again writes to the other turn's place, and behind its barrier nobody reads this one's.
  template <class Combine>
  __device__ __forceinline__ void meet(float (&numbers)[2], const Combine& combine) {
    auto& rows = meeting_.rows[turn_];
    turn_ ^= 1;
    if (place_.t == 0) {
      for (int h = 0; h < 2; ++h) rows[half()][place_.row(h)] = numbers[h];
    }
    sync();  // both halves' numbers are there
    for (int h = 0; h < 2; ++h) {
      numbers[h] = combine(rows[0][place_.row(h)], rows[1][place_.row(h)]);
    }
  }

  // Dot products of half h of the rows, with the keys from `token` on, become scores.
  template <bool kClear>
  __device__ __forceinline__ void finish_scores(int token, int h, Scores& scores) const {
    if constexpr (kClear) {
      for (int j = 0; j < kBlocks; ++j) {
        for (int e = h * 2; e < h * 2 + 2; ++e) scores[j][e] = scoring_.scaled(scores[j][e]);
      }
    } else {
      scoring_.finish(place_.row(h), position_[h], [&](auto score) {
        for (int j = 0; j < kBlocks; ++j) {
          for (int e = h * 2; e < h * 2 + 2; ++e) {
            scores[j][e] = score(scores[j][e], token + j * 8 + place_.t * 2 + e % 2);
          }
        }
      });
    }
  }

  Scoring<Traits> scoring_;
  const DecodeParams& params_;
  const Place& place_;
  typename Traits::Meeting& meeting_;
  const Segment* segment_;
  uint64_t q_;  // operand: [64, D]
  int turn_ = 0;
  int position_[2];  // of this lane's rows
};

}  // namespace leanattn
