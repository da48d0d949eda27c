// A tile of a wide head by wgmma, the same for few rows and for many: what the main loops of both do in turn.
#pragma once

#include "ring.h"
#include "step_values.h"

namespace leanattn {

// Loop has multiply_keys, softmax, multiply_values and multiply_values_by_token; its warps that share a tile
// meet in softmax<kClear>, behind their products with the keys, and in sync().
template <class Traits, class Element, class Loop, class State>
__device__ __forceinline__ void take_wide_tile(Loop& loop, const DecodeParams& params,
                                               const ItemKeys& keys, bool scaled_only, int tile,
                                               Ring<Traits>& ring, State& state) {
  const int token = tile * Traits::kTile;
  // Subtracted, since token + kTile may be 2^31.
  const bool is_seen = token >= keys.any.begin && keys.any.end - token >= Traits::kTile;
  const bool is_clear = token >= keys.all.begin && keys.all.end - token >= Traits::kTile;
  const bool one_stage = values_in_keys<Traits>(params);
  typename Loop::Scores scores;
  ring.wait_full();
  loop.multiply_keys(ring.stage_smem(), scores);
  if (!one_stage) {
    ring.release();
    ring.advance();
  }
  if (is_clear && scaled_only) {
    loop.template softmax<true>(token, scores, state);
  } else {
    loop.template softmax<false>(token, scores, state);
  }
  if (!one_stage) ring.wait_full();
  uint8_t* v_smem = ring.stage_smem();
  const StepTokens step{token, 0, Traits::kTile};
  // Nobody reads the keys any more: all have met in the softmax.
  if (!is_seen) {
    clear_unseen_values<Traits>(v_smem, step, keys, threadIdx.x % Traits::kSliceThreads,
                                Traits::kSliceThreads);
  }
  // What has been written is for wgmma, and zeros come before the copy that refills the stage.
  ptx::fence_proxy_async();
  loop.sync();  // all of P is written, and all zeros
  if (!is_clear && spoils_some_rows<Traits, Element>(v_smem, step, keys)) {
    loop.multiply_values_by_token(v_smem, token, state);
  } else {
    loop.multiply_values(v_smem, state);
  }
  ring.release();
  ring.advance();
}

}  // namespace leanattn
