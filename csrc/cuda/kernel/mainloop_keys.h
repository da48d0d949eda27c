// The main loop of a consumer warpgroup for few rows of a wide head, by wgmma with the keys as its 64 rows:
// S^T = K Q^T, the online softmax, O^T += V^T P^T. Both large operands are read where the copy put them, each
// once; the query rows, padded to 16 or 32, are the columns. The two warpgroups take tiles in turn, so that
// the softmax of one runs beside the products of the other, and neither waits for the other.
//
// Within a warpgroup a row's tokens are spread over lanes and warps, who agree on its largest score through
// shared memory, and P goes there too: it is wgmma's operand.
#pragma once

#include "mainloop.h"
#include "wgmma.h"
#include "wide_tile.h"

namespace leanattn {

template <class Traits>
struct KeysPlace {
  static constexpr int row_group = 0;  // there is one

  int slice;  // the warpgroup: tiles 2i + slice
  int warp;   // of the warpgroup
  int g;      // lane / 4: token, or element of Dv, within an 8-row half of a fragment
  int t;      // lane % 4: columns 2t and 2t + 1, which are query rows

  __device__ __forceinline__ explicit KeysPlace(int consumer_warp)
      : slice(consumer_warp / 4),
        warp(consumer_warp % 4),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4) {}

  // The item row of column c (0 or 1) of row step n.
  __device__ __forceinline__ int row(int n, int c) const { return n * 8 + t * 2 + c; }
  // The token of a tile of half `half` (0 or 1) of this lane's fragments of S^T.
  __device__ __forceinline__ int token(int half) const { return warp * 16 + half * 8 + g; }
  // The element of Dv of half `half` of block m.
  __device__ __forceinline__ int dim(int m, int half) const { return m * 64 + token(half); }
};

template <class Traits>
struct KeysState {
  static constexpr int kRowSteps = Traits::kRowSteps;
  static constexpr int kDimBlocks = Traits::kHeadDimV / 64;

  float max[kRowSteps][2];
  float sum[kRowSteps][2];            // this lane's share until the end
  float o[kDimBlocks][kRowSteps][4];  // O^T fragments: [64 of Dv, 8 rows]

  __device__ __forceinline__ void clear() {
    for (int n = 0; n < kRowSteps; ++n) {
      for (int c = 0; c < 2; ++c) {
        max[n][c] = kNegativeInfinity;
        sum[n][c] = 0.0f;
      }
      for (int m = 0; m < kDimBlocks; ++m) {
        for (int e = 0; e < 4; ++e) o[m][n][e] = 0.0f;
      }
    }
  }
};

template <class Traits, class Element>
class KeysMainLoop {
 public:
  using Place = KeysPlace<Traits>;
  using State = KeysState<Traits>;
  static constexpr int kRowSteps = Traits::kRowSteps;
  static constexpr int kDimBlocks = State::kDimBlocks;

  __device__ __forceinline__ KeysMainLoop(const DecodeParams& params, const Place& place,
                                          typename Traits::SharedStorage& smem)
      : scoring_(params), params_(params), place_(place), meeting_(smem.meetings[place.slice]) {}

  // Tiles [tile_begin, tile_end) of a segment.
  __device__ __forceinline__ void run(const typename Traits::Task& task, int tile_begin,
                                      int tile_end, Ring<Traits>& ring, State& state) {
    segment_ = &task.segment;
    scoring_.begin(task.segment);
    q_ = make_operand(task.q);
    ptx::fence_proxy_async();  // cp.async has written q by the generic proxy
    state.clear();
    for (int n = 0; n < kRowSteps; ++n) {
      for (int c = 0; c < 2; ++c) position_[n][c] = scoring_.position_of_row(place_.row(n, c));
    }
    for (int tile = tile_begin; tile < tile_end; ++tile) {
      if (tile % 2 == place_.slice) {
        take_wide_tile<Traits, Element>(*this, params_, segment_->keys, scoring_.scaled_only(),
                                        tile, ring, state);
      } else {
        // The other warpgroup's. An arrival must not count for an earlier round.
        for (int stage = values_in_keys<Traits>(params_) ? 1 : 0; stage < 2; ++stage) {
          ring.wait_full();
          ring.release();
          ring.advance();
        }
      }
    }
    add_up_sums(state);
  }

  // Of take_wide_tile:

  using Scores = float[kRowSteps][4];  // S^T: [64 tokens, 8 rows] each

  __device__ __forceinline__ void sync() const {
    ptx::bar_sync(kSliceBarrier + place_.slice, Traits::kSliceThreads);
  }

  __device__ __forceinline__ void multiply_keys(const uint8_t* k_smem, Scores& scores) const {
    const uint64_t k = rebase_operand(make_operand(k_smem));
    const uint64_t q = rebase_operand(q_);
    wgmma_begin(scores);
#pragma unroll
    for (int depth = 0; depth < Traits::kDepthSteps; ++depth) {
      const int block = depth / 4;
      const int within = depth % 4 * 32;
      wgmma_scores<Element>(scores, advance_operand(k, block * Traits::kTile * 128 + within),
                            advance_operand(q, block * Traits::kQueryRows * 128 + within),
                            depth > 0);
    }
    wgmma_wait(scores);
  }

  __device__ __forceinline__ void multiply_values(const uint8_t* v_smem, State& state) const {
    const uint64_t v = rebase_operand(make_operand(v_smem));
    const uint64_t p = rebase_operand(make_operand(meeting_.p));
    wgmma_begin(state.o);
#pragma unroll
    for (int step = 0; step < Traits::kTile / 16; ++step) {
#pragma unroll
      for (int m = 0; m < kDimBlocks; ++m) {
        wgmma_transposed_values<Element>(
            state.o[m], advance_operand(v, m * Traits::kTile * 128 + step * 16 * 128),
            advance_operand(p, step * 32));
      }
    }
    wgmma_wait(state.o);
  }

  // P^T goes to shared memory, [rows][64 tokens]. Every warp has been behind the barrier of this tile's
  // largest scores, so its products with the tile before are done.
  template <bool kClear>
  __device__ __forceinline__ void softmax(int token, Scores& scores, State& state) {
    float new_max[kRowSteps][2];
#pragma unroll
    for (int n = 0; n < kRowSteps; ++n) {
      finish_scores<kClear>(token, n, scores);
      for (int c = 0; c < 2; ++c) {
        new_max[n][c] = fmaxf(scores[n][c], scores[n][c + 2]);
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          new_max[n][c] = fmaxf(new_max[n][c], __shfl_xor_sync(~0u, new_max[n][c], lanes));
        }
      }
    }
    meet(new_max,
         [](float a, float b, float c, float d) { return fmaxf(fmaxf(a, b), fmaxf(c, d)); });
    bool rescale = false;
    float factor[kRowSteps][2];
#pragma unroll
    for (int n = 0; n < kRowSteps; ++n) {
      for (int c = 0; c < 2; ++c) {
        const float larger = fmaxf(state.max[n][c], new_max[n][c]);
        factor[n][c] = rescale_factor(state.max[n][c], larger);
        rescale |= larger != state.max[n][c];
        state.max[n][c] = larger;
        state.sum[n][c] *= factor[n][c];
        const float base = exponent_base(larger);
        for (int e = c; e < 4; e += 2) {
          scores[n][e] = fast_exp2(scores[n][e] - base);
          state.sum[n][c] += scores[n][e];
        }
      }
      for (int half = 0; half < 2; ++half) {
        // From [8 tokens, 8 rows] to [8 rows, 8 tokens].
        const uint32_t pair =
            movmatrix_trans(pack<Element>(scores[n][half * 2], scores[n][half * 2 + 1]));
        uint8_t* chunk_smem = meeting_.p + swizzled_offset<Traits::kQueryRows>(
                                               n * 8 + place_.g, place_.warp * 2 + half);
        reinterpret_cast<uint32_t*>(chunk_smem)[place_.t] = pair;
      }
    }
    // Most tiles bring no new maximum in any row.
    if (__any_sync(~0u, rescale)) {
#pragma unroll
      for (int m = 0; m < kDimBlocks; ++m) {
        for (int n = 0; n < kRowSteps; ++n) {
          for (int e = 0; e < 4; ++e) state.o[m][n][e] *= factor[n][e % 2];
        }
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
      float p[kRowSteps][2];
      bool sees[kRowSteps][2];
#pragma unroll
      for (int n = 0; n < kRowSteps; ++n) {
        for (int c = 0; c < 2; ++c) {
          const uint8_t* chunk_smem =
              meeting_.p + swizzled_offset<Traits::kQueryRows>(place_.row(n, c), row / 8);
          p[n][c] = to_float(reinterpret_cast<const Element*>(chunk_smem)[row % 8]);
          sees[n][c] = scoring_.keys_of(position_[n][c]).contains(key);
        }
      }
#pragma unroll
      for (int m = 0; m < kDimBlocks; ++m) {
        for (int half = 0; half < 2; ++half) {
          const int dim = place_.dim(m, half);
          const uint8_t* chunk_smem = v_smem + swizzled_offset<Traits::kTile>(row, dim / 8);
          const float v = to_float(reinterpret_cast<const Element*>(chunk_smem)[dim % 8]);
          for (int n = 0; n < kRowSteps; ++n) {
            for (int c = 0; c < 2; ++c) {
              if (sees[n][c]) state.o[m][n][half * 2 + c] += p[n][c] * v;
            }
          }
        }
      }
    }
  }

 private:
  // Numbers of each row, one of each lane (n, c), become those of all warps: combine(4 of them). Whoever
  // comes here again writes to the other turn's place, and behind its barrier nobody reads this one's.
  template <class Combine>
  __device__ __forceinline__ void meet(float (&numbers)[kRowSteps][2], const Combine& combine) {
    auto& rows = meeting_.rows[turn_];
    turn_ ^= 1;
    if (place_.g == 0) {
      for (int n = 0; n < kRowSteps; ++n) {
        *reinterpret_cast<float2*>(&rows[place_.warp][place_.row(n, 0)]) =
            float2{numbers[n][0], numbers[n][1]};
      }
    }
    sync();  // all warps' numbers are there
    for (int n = 0; n < kRowSteps; ++n) {
      float2 of[4];
      for (int warp = 0; warp < 4; ++warp) {
        of[warp] = *reinterpret_cast<const float2*>(&rows[warp][place_.row(n, 0)]);
      }
      numbers[n][0] = combine(of[0].x, of[1].x, of[2].x, of[3].x);
      numbers[n][1] = combine(of[0].y, of[1].y, of[2].y, of[3].y);
    }
  }

  // Dot products of row step n become scores.
  template <bool kClear>
  __device__ __forceinline__ void finish_scores(int token, int n, Scores& scores) const {
    if constexpr (kClear) {
      for (int e = 0; e < 4; ++e) scores[n][e] = scoring_.scaled(scores[n][e]);
    } else {
      for (int c = 0; c < 2; ++c) {
        scoring_.finish(place_.row(n, c), position_[n][c], [&](auto score) {
          for (int e = c; e < 4; e += 2) {
            scores[n][e] = score(scores[n][e], token + place_.token(e / 2));
          }
        });
      }
    }
  }

  // The lanes and warps of a row sum different tokens; afterwards all hold the whole sum.
  __device__ __forceinline__ void add_up_sums(State& state) {
    for (int n = 0; n < kRowSteps; ++n) {
      for (int c = 0; c < 2; ++c) {
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          state.sum[n][c] += __shfl_xor_sync(~0u, state.sum[n][c], lanes);
        }
      }
    }
    meet(state.sum, [](float a, float b, float c, float d) { return a + b + c + d; });
  }

  Scoring<Traits> scoring_;
  const DecodeParams& params_;
  const Place& place_;
  typename Traits::Meeting& meeting_;
  const Segment* segment_;
  uint64_t q_;  // operand: [kQueryRows, D]
  int turn_ = 0;
  int position_[kRowSteps][2];  // of this lane's rows
};

}  // namespace leanattn
