// Which tokens of a sequence are in this cache, where several ranks, a GPU each, share its tokens out.
// They are dealt out in turn, I at a time: rank r of n has tokens [rI, (r + 1)I), and so on every nI. A
// token's number counts over all ranks; a key's is its place in a rank's own cache. Both have the same
// order, so that a range of tokens is a range of keys.
#pragma once

#include <cstdint>

#include "fast_divisor.h"
#include "mask.h"

namespace leanattn {

// All zeros: one rank, which has everything.
struct Shard {
  FastDivisor interleave;  // I
  FastDivisor period;      // nI
  int others;              // (n - 1)I: of a period, the tokens that other ranks have
  int first_token;         // rI
  int max_length;          // of a sequence, on all ranks together

  LEANATTN_HD bool is_whole() const { return others == 0; }

  // How many of the tokens [0, end) are here.
  LEANATTN_HD int keys_before(int end) const {
    const int rounds = end / period;
    const int rest = end - rounds * period - first_token;
    return rounds * interleave + clamp_to<int>(rest, 0, interleave);
  }

  LEANATTN_HD KeyRange keys_of(const KeyRange& tokens) const {
    return {keys_before(tokens.begin), keys_before(tokens.end)};
  }

  LEANATTN_HD bool has(int token) const {
    const int rest = token % period - first_token;
    return 0 <= rest && rest < interleave;
  }

  // Unsigned, since a key behind the last one may stand for a token beyond 2^31.
  LEANATTN_HD int token_of(int key) const {
    const uint32_t rounds = key / interleave;
    return static_cast<int>(key + rounds * static_cast<uint32_t>(others) + first_token);
  }
};

// Of `rank` of `ranks` with room for `capacity` tokens each; ranks * interleave < 2^31. The first rank
// fills up first, so what all can hold ends where that has no more room.
inline Shard make_shard(int ranks, int rank, int interleave, int capacity) {
  const int64_t whole_rounds = int64_t{capacity / interleave} * ranks * interleave;
  const int64_t max_length = whole_rounds + capacity % interleave;
  return {interleave, ranks * interleave, (ranks - 1) * interleave, rank * interleave,
          static_cast<int>(min_of<int64_t>(ranks == 1 ? capacity : max_length, INT32_MAX))};
}

}  // namespace leanattn
