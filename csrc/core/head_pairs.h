// Two neighbouring KV heads as one of twice the head dim. Where a head's rows have 128 bytes and the
// next head's lie right behind them, as in [B, S, Hkv, 64], the copies of one head are so short that the
// memory loses some of its speed. A pair's rows have 256.
//
//    a token's row of K   | head 0: D | head 1: D | head 2: D | head 3: D |
//    pairs                |        pair 0         |        pair 1         |
//
// A pair's query rows are those of both heads. Each is multiplied by both halves, and has its own head's
// half of the products q.k and of the output; the other is not added as zero but left out, since it may
// be NaN. So a pair costs twice the arithmetic, which should hide behind the copies while its rows are
// few, and its partials are twice as wide: cost_model.h chooses.
//
// DecodeParams describe the pairs as if they were the cache's heads: schedule, loaders and fixup know
// nothing of them. Who does: TaskQueue puts q into both halves, MainLoop takes a row's half of the
// products, has_output its half of the output, and the scales are those of the row's own head.
#pragma once

#include "params.h"

namespace leanattn {

// Packed query rows that a pair's item may have: with more the arithmetic should show.
constexpr int kMaxPairRows = 16;

// The half of a pair, 0 or 1, that a query head's KV head is; 0 without pairs.
LEANATTN_HD int half_of_pair(const DecodeParams& p, int query_head) {
  return p.head_pairs && query_head % p.problem.group_size * 2 >= p.problem.group_size;
}

// The KV head, as the scales count them, of a query head.
LEANATTN_HD int own_kv_head(const DecodeParams& p, const Segment& segment, int query_head) {
  return p.head_pairs ? segment.head * 2 + half_of_pair(p, query_head) : segment.head;
}

// Dv of out.
LEANATTN_HD int out_head_dim(const DecodeParams& p) {
  return p.head_pairs ? p.head_dim_v / 2 : p.head_dim_v;
}

}  // namespace leanattn
