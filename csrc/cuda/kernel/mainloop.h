// The main loop of a consumer warp, by mma: its slice of every tile goes through S^T = K Q^T, the online
// softmax and O^T += V^T P^T, all in registers. It knows nothing of other CTAs, and of other warps only
// those that a wide head's D is shared out among.
#pragma once

#include "cache_fragments.h"
#include "depth_split.h"
#include "new_row.h"
#include "ring.h"
#include "scoring.h"

namespace leanattn {

// Which part of the [tokens, rows, Dv] space a warp computes, and which elements its lane holds.
template <class Traits>
struct WarpPlace {
  int slice;      // of the tile's tokens
  int row_group;  // of the item's rows
  int dim_group;  // of Dv
  int g;          // lane / 4: token (or dim) within an 8-row half of a fragment
  int t;          // lane % 4: columns 2t and 2t + 1, which are query rows

  __device__ __forceinline__ explicit WarpPlace(int warp)
      : slice(warp % Traits::kSlices),
        row_group(warp / Traits::kSlices % Traits::kRowGroups),
        dim_group(warp / (Traits::kSlices * Traits::kRowGroups)),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4) {}

  // The item row of column c (0 or 1) of row step n.
  __device__ __forceinline__ int row(int n, int c) const {
    return row_group * Traits::kWarpRows + n * 8 + t * 2 + c;
  }

  // The element of Dv of half `half` (0 or 1) of dim step j; see cache_fragments.h.
  __device__ __forceinline__ int dim(int j, int half) const {
    const int within = Traits::kFloat8 ? g * 2 + half : g + half * 8;
    return dim_group * Traits::kWarpDim + j * 16 + within;
  }
};

template <class Traits>
struct WarpState {
  float max[Traits::kRowSteps][2];
  float sum[Traits::kRowSteps][2];                   // this lane's share until reduce_sum
  float o[Traits::kDimSteps][Traits::kRowSteps][4];  // O^T fragments: [16 of Dv, 8 rows]

  __device__ __forceinline__ void clear() {
    for (int n = 0; n < Traits::kRowSteps; ++n) {
      for (int c = 0; c < 2; ++c) {
        max[n][c] = kNegativeInfinity;
        sum[n][c] = 0.0f;
      }
      for (int j = 0; j < Traits::kDimSteps; ++j) {
        for (int i = 0; i < 4; ++i) o[j][n][i] = 0.0f;
      }
    }
  }

  // The lanes of a column sum different tokens; afterwards all hold the whole sum.
  __device__ __forceinline__ void reduce_sum() {
    for (int n = 0; n < Traits::kRowSteps; ++n) {
      for (int c = 0; c < 2; ++c) {
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          sum[n][c] += __shfl_xor_sync(~0u, sum[n][c], lanes);
        }
      }
    }
  }
};

// Element: of the products' operands, __half or __nv_bfloat16.
template <class Traits, class Element>
class MainLoop {
 public:
  static constexpr int kTokenSteps = Traits::kTokenSteps;
  static constexpr int kRowSteps = Traits::kRowSteps;
  static constexpr int kDimSteps = Traits::kDimSteps;
  static constexpr int kWarpDepthSteps = Traits::kWarpDepthSteps;

  __device__ __forceinline__ MainLoop(const DecodeParams& params, const WarpPlace<Traits>& place,
                                      typename Traits::SharedStorage& smem)
      : scoring_(params),
        fragments_(params),
        depth_(place.dim_group, place.slice, smem),
        params_(params),
        place_(place) {}

  // Tiles [tile_begin, tile_end) of a segment.
  __device__ __forceinline__ void run(const typename Traits::Task& task, int tile_begin,
                                      int tile_end, Ring<Traits>& ring, WarpState<Traits>& state) {
    const Segment& segment = task.segment;
    if constexpr (Traits::kAppends) new_row_ = NewRowOverlay<Traits>(params_, task);
    segment_ = &segment;
    scoring_.begin(segment);
    q_smem_ = task.q;
    state.clear();
#pragma unroll  // rolled, the loop would keep all of this in local memory
    for (int n = 0; n < kRowSteps; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const QueryRow row = query_row<Traits::kPlainItems>(params_, segment, place_.row(n, c));
        position_[n][c] = row.position;
        if constexpr (Traits::kPairsHeads) half_[n][c] = half_of_pair(params_, row.head);
        if constexpr (Traits::kFloat8) {
          factor_[n][c] =
              task.q_factors[place_.row(n, c)] *
              scale_of(params_.k_scale, segment.seq, own_kv_head(params_, segment, row.head));
        }
      }
    }
    if constexpr (Traits::kQueryInRegisters) {
#pragma unroll
      for (int n = 0; n < kRowSteps; ++n) {
#pragma unroll
        for (int depth = 0; depth < kWarpDepthSteps; depth += 2) {
          if (!depth_.contains(depth)) break;
          load_query(n, depth_.begin() + depth, query_[n][depth], query_[n][depth + 1]);
        }
      }
    }
    for (int tile = tile_begin; tile < tile_end; ++tile) {
      const int token = tile * Traits::kTile + place_.slice * Traits::kSliceTokens;
      const KeyRange any = segment.keys.any;
      // Subtracted, since token + kSliceTokens may be 2^31.
      const bool nothing = token >= any.end || any.begin - token >= Traits::kSliceTokens;
      // Over a slice that is clear no new row is laid, so that the code for it is there once.
      const bool clear = scoring_.scaled_only() && is_seen_by_all(token) && !has_new_row(token);
      if (nothing) {
        // A warp with nothing to do still follows the ring: its arrival must not count for an
        // earlier round.
        for (int stage = values_in_keys<Traits>(params_) ? 1 : 0; stage < 2; ++stage) {
          ring.wait_full();
          ring.release();
          ring.advance();
        }
      } else if (clear) {
        step<true>(token, ring, state);
      } else {
        step<false>(token, ring, state);
      }
    }
    state.reduce_sum();
  }

 private:
  using Scores = float[kTokenSteps][kRowSteps][4];            // S^T: [16 tokens, 8 rows]
  using Probabilities = uint32_t[kTokenSteps][kRowSteps][2];  // P^T as B operand

  // Whether all rows see the whole slice that starts at `token`.
  __device__ __forceinline__ bool is_seen_by_all(int token) const {
    const KeyRange all = segment_->keys.all;
    return token >= all.begin && all.end - token >= Traits::kSliceTokens;
  }

  // kClear: all rows see all keys, and nothing but a scale happens to the scores.
  template <bool kClear>
  __device__ __forceinline__ void step(int token, Ring<Traits>& ring, WarpState<Traits>& state) {
    Scores scores;
    ring.wait_full();
    if constexpr (!kClear && Traits::kAppends) {
      if (has_new_row(token)) new_row_.lay(true, ring.stage_smem());
    }
    multiply_keys(ring.stage_smem(), scores);
    if (!values_in_keys<Traits>(params_)) {
      ring.release();
      ring.advance();
    }
    depth_.sum(scores);

    Probabilities probabilities;
    softmax<kClear>(token, scores, state, probabilities);

    if (!values_in_keys<Traits>(params_)) ring.wait_full();
    if constexpr (!kClear && Traits::kAppends) {
      if (has_new_row(token)) new_row_.lay(false, ring.stage_smem());
    }
    multiply_values<kClear>(ring.stage_smem(), token, probabilities, state);
    ring.release();
    ring.advance();
  }

  // Whether a new row is to be laid over this warp's slice, which starts at `token`.
  __device__ __forceinline__ bool has_new_row(int token) const {
    if constexpr (Traits::kAppends) return new_row_.is_in_slice(token);
    return false;
  }

  // B fragments of q for two depth steps: Q^T [32 of D, 8 rows].
  __device__ __forceinline__ void load_query(int n, int depth, uint32_t (&b0)[2],
                                             uint32_t (&b1)[2]) const {
    const int lane = threadIdx.x % 32;
    if constexpr (Traits::kFloat8) {
      const int row = place_.row_group * Traits::kWarpRows + n * 8 + place_.g;
      const auto load = [&](int depth, uint32_t (&b)[2]) {
        const uint8_t* chunk_smem = q_smem_ + query_offset<Traits>(row, depth * 2 + place_.t / 2);
        const uint2 pairs = reinterpret_cast<const uint2*>(chunk_smem)[place_.t % 2];
        b[0] = pairs.x;
        b[1] = pairs.y;
      };
      load(depth, b0);
      load(depth + 1, b1);
    } else {
      const int row = place_.row_group * Traits::kWarpRows + n * 8 + lane % 8;
      uint32_t r[4];
      ldmatrix_x4(r, q_smem_ + query_offset<Traits>(row, depth * 2 + lane / 8));
      b0[0] = r[0];
      b0[1] = r[1];
      b1[0] = r[2];
      b1[1] = r[3];
    }
  }

  __device__ __forceinline__ void multiply_keys(const uint8_t* k_smem, Scores& scores) const {
    // Of two, pairs of heads have one for each half of D.
    constexpr int kChains = Traits::kScoreChains;
    constexpr int kChainSteps = kWarpDepthSteps / kChains;
    float chains[kChains][kTokenSteps][kRowSteps][4] = {};
#pragma unroll
    for (int i = 0; i < kTokenSteps; ++i) {
      const int row = place_.slice * Traits::kSliceTokens + i * 16;
#pragma unroll
      for (int depth = 0; depth < kWarpDepthSteps; depth += 2) {
        if (!depth_.contains(depth)) break;
        uint32_t a[2][4];
        fragments_.load_keys(k_smem, row, depth_.begin() + depth, a);
#pragma unroll
        for (int n = 0; n < kRowSteps; ++n) {
          uint32_t b[2][2];
          if constexpr (Traits::kQueryInRegisters) {
            for (int d = 0; d < 2; ++d) {
              for (int r = 0; r < 2; ++r) b[d][r] = query_[n][depth + d][r];
            }
          } else {
            load_query(n, depth, b[0], b[1]);
          }
          for (int d = 0; d < 2; ++d) {
            mma_m16n8k16<Element>(chains[(depth + d) / kChainSteps][i][n], a[d], b[d]);
          }
        }
      }
    }
    for (int i = 0; i < kTokenSteps; ++i) {
      for (int n = 0; n < kRowSteps; ++n) {
        for (int e = 0; e < 4; ++e) {
          if constexpr (kChains == 1) {
            scores[i][n][e] = chains[0][i][n][e];
          } else if (Traits::kPairsHeads && params_.head_pairs) {
            scores[i][n][e] = chains[0][i][n][e];
            if (half_[n][e % 2]) scores[i][n][e] = chains[1][i][n][e];
          } else {
            scores[i][n][e] = chains[0][i][n][e] + chains[1][i][n][e];
          }
        }
      }
    }
  }

  // Element e of a score fragment: token g (+ 8 for e >= 2), column e % 2.
  __device__ __forceinline__ int token_of(int token, int i, int e) const {
    return token + i * 16 + place_.g + e / 2 * 8;
  }

  template <bool kClear>
  __device__ __forceinline__ void softmax(int token, Scores& scores, WarpState<Traits>& state,
                                          Probabilities& probabilities) const {
    bool rescale = false;
    float factor[kRowSteps][2];
#pragma unroll
    for (int n = 0; n < kRowSteps; ++n) {
      finish_scores<kClear>(token, n, scores);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float new_max = state.max[n][c];
        for (int i = 0; i < kTokenSteps; ++i) {
          new_max = fmaxf(new_max, fmaxf(scores[i][n][c], scores[i][n][c + 2]));
        }
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, lanes));
        }
        factor[n][c] = rescale_factor(state.max[n][c], new_max);
        rescale |= new_max != state.max[n][c];
        state.max[n][c] = new_max;
        state.sum[n][c] = __fmul_rn(state.sum[n][c], factor[n][c]);  // see Scoring::scaled
        const float base = exponent_base(new_max);
        for (int i = 0; i < kTokenSteps; ++i) {
          for (int half = 0; half < 4; half += 2) {
            float& score = scores[i][n][c + half];
            score = fast_exp2(score - base);
            state.sum[n][c] += score;
          }
        }
      }
      for (int i = 0; i < kTokenSteps; ++i) {
        const float (&p)[4] = scores[i][n];
        probabilities[i][n][0] = movmatrix_trans(pack<Element>(p[0], p[1]));
        probabilities[i][n][1] = movmatrix_trans(pack<Element>(p[2], p[3]));
      }
    }
    // Most tiles bring no new maximum in any row.
    if (__any_sync(~0u, rescale)) {
#pragma unroll
      for (int j = 0; j < kDimSteps; ++j) {
        for (int n = 0; n < kRowSteps; ++n) {
          for (int e = 0; e < 4; ++e) state.o[j][n][e] *= factor[n][e % 2];
        }
      }
    }
  }

  // Dot products of row step n become scores.
  template <bool kClear>
  __device__ __forceinline__ void finish_scores(int token, int n, Scores& scores) const {
    if constexpr (Traits::kFloat8) {
      for (int i = 0; i < kTokenSteps; ++i) {
        for (int e = 0; e < 4; ++e) scores[i][n][e] *= factor_[n][e % 2];
      }
    }
    if constexpr (kClear) {
      for (int i = 0; i < kTokenSteps; ++i) {
        for (int e = 0; e < 4; ++e) scores[i][n][e] = scoring_.scaled(scores[i][n][e]);
      }
    } else {
      for (int c = 0; c < 2; ++c) {
        scoring_.finish(place_.row(n, c), position_[n][c], [&](auto score) {
          for (int i = 0; i < kTokenSteps; ++i) {
            for (int e = c; e < 4; e += 2) {
              scores[i][n][e] = score(scores[i][n][e], token_of(token, i, e));
            }
          }
        });
      }
    }
  }

  // V^T [16 of Dv, 16 tokens]: dim step j, token step i of this warp's slice.
  __device__ __forceinline__ void load_values(const uint8_t* v_smem, int i, int j,
                                              uint32_t (&a)[4]) const {
    const int row = place_.slice * Traits::kSliceTokens + i * 16;
    fragments_.load_values(v_smem, row, place_.dim_group * kDimSteps + j, a);
  }

  template <bool kClear>
  __device__ __forceinline__ void multiply_values(const uint8_t* v_smem, int token,
                                                  const Probabilities& probabilities,
                                                  WarpState<Traits>& state) const {
    if constexpr (!kClear && !Traits::kPlainItems) {
      if (spoils_some_rows(v_smem, token)) {
        multiply_values_by_token(v_smem, token, probabilities, state);
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kTokenSteps; ++i) {
#pragma unroll
      for (int j = 0; j < kDimSteps; ++j) {
        uint32_t a[4];
        load_values(v_smem, i, j, a);
        // Rows that nobody sees may hold anything, NaN too, and 0 * NaN is NaN.
        if constexpr (!kClear) keep_tokens(a, segment_->keys.any, token + i * 16);
#pragma unroll
        for (int n = 0; n < kRowSteps; ++n) {
          mma_m16n8k16<Element>(state.o[j][n], a, probabilities[i][n]);
        }
      }
    }
  }

  // Zeroes the tokens of a V^T fragment that starts at `token` which `keep` does not contain.
  __device__ __forceinline__ void keep_tokens(uint32_t (&a)[4], KeyRange keep, int token) const {
    const uint32_t low = pair_mask(keep, token + place_.t * 2);
    const uint32_t high = pair_mask(keep, token + place_.t * 2 + 8);
    a[0] &= low;
    a[1] &= low;
    a[2] &= high;
    a[3] &= high;
  }

  // True if the slice holds a NaN or infinite value of a token that some rows see and others do not:
  // in the mma it would also reach the rows whose probability for it is 0.
  __device__ __forceinline__ bool spoils_some_rows(const uint8_t* v_smem, int token) const {
    const KeyRange any = segment_->keys.any;
    const KeyRange all = segment_->keys.all;
    if (segment_->keys.alike() || is_seen_by_all(token)) return false;
    bool spoils = false;
#pragma unroll 1
    for (int i = 0; i < kTokenSteps; ++i) {
#pragma unroll 1
      for (int j = 0; j < kDimSteps; ++j) {
        uint32_t a[4];
        load_values(v_smem, i, j, a);
        keep_tokens(a, any, token + i * 16);
        const uint32_t low = ~pair_mask(all, token + i * 16 + place_.t * 2);
        const uint32_t high = ~pair_mask(all, token + i * 16 + place_.t * 2 + 8);
        spoils |= has_nonfinite<Element>(a[0] & low) || has_nonfinite<Element>(a[1] & low) ||
                  has_nonfinite<Element>(a[2] & high) || has_nonfinite<Element>(a[3] & high);
      }
    }
    return __any_sync(~0u, spoils);
  }

  // The slow and exact way: each token's product is added only to the rows that see it.
  __device__ __forceinline__ void multiply_values_by_token(const uint8_t* v_smem, int token,
                                                           const Probabilities& probabilities,
                                                           WarpState<Traits>& state) const {
#pragma unroll
    for (int i = 0; i < kTokenSteps; ++i) {
#pragma unroll 1
      for (int offset = 0; offset < 16; ++offset) {  // the token after the last may be 2^31
        const int key = token + i * 16 + offset;
        if (!segment_->keys.any.contains(key)) continue;
        bool sees[kRowSteps][2];
#pragma unroll
        for (int n = 0; n < kRowSteps; ++n) {
          for (int c = 0; c < 2; ++c) {
            sees[n][c] = scoring_.keys_of(position_[n][c]).contains(key);
          }
        }
#pragma unroll
        for (int j = 0; j < kDimSteps; ++j) {
          uint32_t a[4];
          load_values(v_smem, i, j, a);
          keep_tokens(a, {key, key + 1}, token + i * 16);
#pragma unroll
          for (int n = 0; n < kRowSteps; ++n) {
            float product[4] = {};
            mma_m16n8k16<Element>(product, a, probabilities[i][n]);
            for (int e = 0; e < 4; ++e) {
              if (sees[n][e % 2]) state.o[j][n][e] += product[e];
            }
          }
        }
      }
    }
  }

  Scoring<Traits> scoring_;
  CacheFragments<Traits> fragments_;
  DepthPart<Traits> depth_;
  const DecodeParams& params_;
  const WarpPlace<Traits>& place_;
  const uint8_t* q_smem_;  // [kRows, kQueryPitch]
  const Segment* segment_;
  [[no_unique_address]] NewRowOf<Traits> new_row_;
  int position_[kRowSteps][2];  // of this lane's rows
  bool half_[kRowSteps][2];     // of a pair of heads: theirs
  float factor_[kRowSteps][2];  // with float8 caches: of their products
  uint32_t query_[Traits::kQueryInRegisters ? kRowSteps : 1]
                 [Traits::kQueryInRegisters ? kWarpDepthSteps : 2][2];
};

}  // namespace leanattn
