// What wgmma must not meet among the values of a step, a stretch of tokens in a stage: it reads them as they
// lie, and 0 * NaN is NaN.
#pragma once

#include "core/schedule.h"
#include "mma.h"
#include "traits.h"

namespace leanattn {

// Tokens [token, token + tokens) in rows [row, row + tokens) of a stage.
struct StepTokens {
  int token, row, tokens;
};

// Calls visit(chunk_smem) for the 16-byte chunks of values of a step's keys, `threads` at a time.
template <class Traits, class Visit>
__device__ __forceinline__ void for_each_chunk(uint8_t* v_smem, const StepTokens& step,
                                               KeyRange keys, int thread, int threads,
                                               Visit visit) {
  constexpr int kChunks = Traits::kHeadDimV / 8;
  const int first = clamp_to(keys.begin - step.token, 0, step.tokens);
  // INT32_MAX is all that follow, the token behind the last possible one too.
  const int last =
      keys.end == INT32_MAX ? step.tokens : clamp_to(keys.end - step.token, 0, step.tokens);
#pragma unroll 1
  for (int i = first * kChunks + thread; i < last * kChunks; i += threads) {
    visit(v_smem + swizzled_offset<Traits::kTile>(step.row + i / kChunks, i % kChunks));
  }
}

// Zeroes the values that no row sees: they may be anything, NaN too. By `threads` threads, this one number
// `thread`. A fence and a barrier must follow, before wgmma and before the copy that refills the stage.
template <class Traits>
__device__ __forceinline__ void clear_unseen_values(uint8_t* v_smem, const StepTokens& step,
                                                    const ItemKeys& keys, int thread, int threads) {
  const auto clear = [&](KeyRange unseen) {
    for_each_chunk<Traits>(v_smem, step, unseen, thread, threads, [](uint8_t* chunk_smem) {
      *reinterpret_cast<uint4*>(chunk_smem) = uint4{};
    });
  };
  clear({0, keys.any.begin});
  clear({keys.any.end, INT32_MAX});
}

// True if the step holds a NaN or infinite value of a token that some rows see and others do not: in wgmma it
// would also reach the rows whose probability for it is 0. Every warp looks at all.
template <class Traits, class Element>
__device__ __forceinline__ bool spoils_some_rows(uint8_t* v_smem, const StepTokens& step,
                                                 const ItemKeys& keys) {
  if (Traits::kPlainItems || keys.alike()) return false;
  bool spoils = false;
  const auto look_at = [&](KeyRange seen_by_some) {
    for_each_chunk<Traits>(
        v_smem, step, seen_by_some, threadIdx.x % 32, 32, [&](const uint8_t* chunk_smem) {
          const uint4 chunk = *reinterpret_cast<const uint4*>(chunk_smem);
          spoils |= has_nonfinite<Element>(chunk.x) || has_nonfinite<Element>(chunk.y) ||
                    has_nonfinite<Element>(chunk.z) || has_nonfinite<Element>(chunk.w);
        });
  };
  if (keys.all.empty()) {
    look_at(keys.any);
  } else {
    look_at({keys.any.begin, keys.all.begin});
    look_at({keys.all.end, keys.any.end});
  }
  return __any_sync(~0u, spoils);
}

}  // namespace leanattn
