// The stream-K schedule: pure integer functions, shared by the kernels, the CPU implementation and
// the tests. No CUDA, no tensors; the only memory read is the two length arrays of the Problem.
//
// A work item is (sequence, KV head, block of packed query rows). Its keys are cut into tiles of
// 2^tile_tokens_log2 tokens, at multiples of that from the start of the sequence, and only those tiles
// count that some row of the item sees. The tiles of all items, item after item, form one line; each
// unit takes an equal stretch of it, its share. What a unit does of one item is a segment.
//
//    item     |---- 0 ----|- 1 -|------- 2 -------|--- 3 ---|        one line of tiles
//    unit     |   0   |   1   |   2   |   3   |   4   |   5 |        equal shares
//    segment  |   0   | 0 | 1 |.|   2 |   2   |.2|3   |  3  |
//
// So a unit has at most two segments that do not hold their whole item: its first and its last.
// Those leave a partial (an unfinished softmax state) and the fixup merges an item's partials in the
// order of its units. A unit is one CTA, or one CPU thread's turn: nothing here depends on which.
// (Stream-K: arXiv 2301.03598, section 4; LeanAttention: arXiv 2405.10480, IV-C.)
//
// Where items are alike, no cut need cross the border of an item: the units form teams, and either a
// team of several units takes one item, or a unit alone takes some whole ones. See Layout, and
// cost_model.h for when.
//
// Items that see no key have no tile; nobody's share holds them and their rows are filled apart.
//
// Everything that comes from device memory is clamped here, once: lengths to [0, max_length],
// cu_seqlens_q entries to [previous entry, total_q].
#pragma once

#include <cstdint>

#include "fast_divisor.h"
#include "host_device.h"
#include "mask.h"
#include "shard.h"

namespace leanattn {

// Tokens a tile; by head dim alone (the larger of K's and V's), so that the cut points of a sequence
// depend on nothing else.
LEANATTN_HD constexpr int tile_tokens_log2_for(int head_dim) {
  return head_dim <= 128 ? 7 : head_dim <= 256 ? 6 : 5;
}

// The same of head dims beyond 256 by wgmma, which has keys as 64 rows.
constexpr int kWideTileTokensLog2 = 6;

// The largest D and Dv. Those beyond 256 are for multi-head latent attention, whose keys are its values
// and 64 columns more.
constexpr int kMaxHeadDim = 576;
constexpr int kMaxHeadDimV = 512;

// Head dims are padded to one that kernels exist for; where that is kMaxHeadDim, Dv to kMaxHeadDimV.
LEANATTN_HD constexpr int padded_head_dim(int head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : head_dim <= 256 ? 256 : kMaxHeadDim;
}
LEANATTN_HD constexpr int padded_head_dim_v(int padded_head_dim) {
  return padded_head_dim < kMaxHeadDimV ? padded_head_dim : kMaxHeadDimV;
}

// Less than INT32_MAX, which stands for the end of a share that is not counted in tiles.
constexpr int64_t kMaxTiles = INT32_MAX - 1;

// What the schedule depends on.
struct Problem {
  const int32_t* cache_seqlens;  // [batch], or null: every sequence has max_length(p) tokens
  int64_t cache_seqlens_stride;
  const int32_t* cu_seqlens_q;  // [batch + 1], or null: every sequence has `seqlen_q` queries
  int64_t cu_seqlens_q_stride;
  int batch;
  FastDivisor num_heads_kv;
  FastDivisor group_size;  // query heads a KV head
  int seqlen_q;            // queries a sequence, without cu_seqlens_q
  int total_q;             // query rows in all, with cu_seqlens_q
  int capacity;            // tokens that a sequence can hold here
  int tile_tokens_log2;
  FastDivisor rows_per_item;  // packed query rows (queries x group_size) that an item holds at most
  FastDivisor row_blocks;  // items a sequence and KV head, without cu_seqlens_q; see row_blocks_of
  Mask mask;
  Shard shard;
};

// Most decodes have plain items: one query a sequence, its last, its rows of a KV head in one item, and
// no token elsewhere. Kernels for them are compiled with kPlain, as are the functions that they call:
// they give the same, and the rest of a Problem costs them nothing.
LEANATTN_HD bool has_plain_items(const Problem& p) {
  return !p.cu_seqlens_q && p.seqlen_q == 1 && p.row_blocks == 1 && p.shard.is_whole();
}

struct Sequence {
  int length;       // tokens, on all ranks
  int query_begin;  // first row in the packed queries; 0 without cu_seqlens_q
  int num_queries;
};

// Tiles [begin, end) of a sequence.
struct TileRange {
  int begin;
  int end;

  LEANATTN_HD int size() const { return end - begin; }
};

// row_blocks of a Problem; a divisor cannot be 0.
LEANATTN_HD int row_blocks_of(int seqlen_q, int group_size, int rows_per_item) {
  return max_of(1,
                static_cast<int>(ceil_div<int64_t>(int64_t{seqlen_q} * group_size, rows_per_item)));
}

// --- One sequence ------------------------------------------------------------------------------

LEANATTN_HD int first_query_row(const Problem& p) {
  return p.cu_seqlens_q ? clamp_to(p.cu_seqlens_q[0], 0, p.total_q) : 0;
}

// The tokens that a sequence can have, on all ranks.
LEANATTN_HD int max_length(const Problem& p) {
  return p.shard.is_whole() ? p.capacity : p.shard.max_length;
}

// The sequence `seq`, whose queries begin where those of the one before it end. kAppends: it has one token
// more than cache_seqlens says, as far as there is room; that is given then, and capacity not 0.
template <bool kPlain = false, bool kAppends = false>
LEANATTN_HD Sequence load_sequence(const Problem& p, int seq, int query_begin) {
  Sequence s;
  if constexpr (kAppends) {
    static_assert(kPlain, "of other items positions depend on how many tokens are new");
    const int length = p.cache_seqlens[seq * p.cache_seqlens_stride];
    return {clamp_to(length, 0, p.capacity - 1) + 1, 0, 1};
  }
  const int longest = kPlain ? p.capacity : max_length(p);
  s.length = p.cache_seqlens ? clamp_to(p.cache_seqlens[seq * p.cache_seqlens_stride], 0, longest)
                             : longest;
  s.query_begin = kPlain ? 0 : query_begin;
  s.num_queries = kPlain ? 1 : p.seqlen_q;
  if (!kPlain && p.cu_seqlens_q) {
    const int query_end = p.cu_seqlens_q[(seq + 1) * p.cu_seqlens_q_stride];
    s.num_queries = clamp_to(query_end, query_begin, p.total_q) - query_begin;
  }
  return s;
}

template <bool kPlain = false>
LEANATTN_HD int next_query_begin(const Problem& p, const Sequence& s) {
  return !kPlain && p.cu_seqlens_q ? s.query_begin + s.num_queries : 0;
}

LEANATTN_HD int position_of(const Sequence& s, int query) {
  return s.length - s.num_queries + query;
}

LEANATTN_HD int num_rows(const Problem& p, const Sequence& s) {
  return s.num_queries * p.group_size;
}

template <bool kPlain = false>
LEANATTN_HD int num_row_blocks(const Problem& p, const Sequence& s) {
  if (kPlain) return 1;
  // Not rounded up by adding first: there may be almost 2^31 rows.
  const int rows = num_rows(p, s);
  return rows == 0 ? 0 : (rows - 1) / p.rows_per_item + 1;
}

// --- One item ----------------------------------------------------------------------------------

// Rows of the item; row r holds query r / group_size and head r % group_size of the group.
template <bool kPlain = false>
LEANATTN_HD int item_rows(const Problem& p, const Sequence& s, int row_block) {
  if (kPlain) return p.group_size;
  return min_of<int>(p.rows_per_item, num_rows(p, s) - row_block * p.rows_per_item);
}

// The keys that the query at `position` sees.
LEANATTN_HD KeyRange keys_seen_from(const Problem& p, const Sequence& s, int position) {
  const KeyRange tokens = visible_keys(p.mask, s.length, position);
  return p.shard.is_whole() ? tokens : p.shard.keys_of(tokens);
}

LEANATTN_HD KeyRange row_keys(const Problem& p, const Sequence& s, int row) {
  return keys_seen_from(p, s, position_of(s, row / p.group_size));
}

// The keys that at least one row of the item sees, and those that every row sees. Both ends of a
// row's range only move up from row to row, so the first and the last row tell.
struct ItemKeys {
  KeyRange any;
  KeyRange all;

  LEANATTN_HD bool alike() const { return any.begin == all.begin && any.end == all.end; }
};

template <bool kPlain = false>
LEANATTN_HD ItemKeys item_keys(const Problem& p, const Sequence& s, int row_block) {
  if (kPlain) {
    const KeyRange keys = last_query_keys(p.mask, s.length);
    return {keys, keys};
  }
  const int first_row = row_block * p.rows_per_item;
  const KeyRange first = row_keys(p, s, first_row);
  const KeyRange last = row_keys(p, s, first_row + item_rows(p, s, row_block) - 1);
  ItemKeys keys;
  keys.any = {first.begin, last.end};
  keys.all = {last.begin, max_of(last.begin, first.end)};
  return keys;
}

LEANATTN_HD TileRange item_tiles(const Problem& p, const KeyRange& any) {
  if (any.empty()) return {0, 0};
  return {any.begin >> p.tile_tokens_log2, ((any.end - 1) >> p.tile_tokens_log2) + 1};
}

// Whether none of the item's rows sees a key: it has no tile.
template <bool kPlain = false>
LEANATTN_HD bool is_empty_item(const Problem& p, const Sequence& s, int row_block) {
  return item_keys<kPlain>(p, s, row_block).any.empty();
}

// How many of a sequence's row blocks there are up to the last that is_empty_item may be true of. Later
// rows see later tokens, so empty ones come first; but where other ranks have tokens, any may be empty.
template <bool kPlain = false>
LEANATTN_HD int end_of_empty_items(const Problem& p, const Sequence& s) {
  if (kPlain) return s.length == 0;
  const int row_blocks = num_row_blocks(p, s);
  if (!p.shard.is_whole()) return row_blocks;
  int empty = 0;
  LEANATTN_KEEP_ROLLED
  while (empty < row_blocks && is_empty_item(p, s, empty)) ++empty;
  return empty;
}

template <bool kPlain = false>
LEANATTN_HD int tiles_per_head(const Problem& p, const Sequence& s) {
  if (kPlain) return item_tiles(p, last_query_keys(p.mask, s.length)).size();
  int tiles = 0;
  const int row_blocks = num_row_blocks(p, s);
  LEANATTN_KEEP_ROLLED
  for (int block = 0; block < row_blocks; ++block) {
    tiles += item_tiles(p, item_keys(p, s, block).any).size();
  }
  return tiles;
}

// The most tiles that the line can have, whatever the lengths are. Callers see to it that this is at
// most kMaxTiles; all else counts tiles in int.
LEANATTN_HD int64_t max_tiles(const Problem& p) {
  const int64_t tiles_per_item = ceil_div<int64_t>(p.capacity, 1 << p.tile_tokens_log2);
  int64_t row_blocks =
      p.batch * ceil_div<int64_t>(int64_t{p.seqlen_q} * p.group_size, p.rows_per_item);
  if (p.cu_seqlens_q) {
    row_blocks = p.batch + ceil_div<int64_t>(int64_t{p.total_q} * p.group_size, p.rows_per_item);
  }
  return row_blocks * p.num_heads_kv * tiles_per_item;
}

// --- Who takes what ----------------------------------------------------------------------------

// CTAs that a cluster has at most: the most that every device with clusters takes.
constexpr int kMaxClusterSize = 8;

// How a launch lays the items on its units. Units team * team_size + rank form a team.
struct Layout {
  FastDivisor num_units;
  // 0: stream-K, equal shares of the whole line for all units. Else the items that a team takes;
  // one, where it has several units: they share it out evenly.
  int items_per_team;
  // From one item of a team to its next: 1, or num_teams. Then all teams are at neighbouring items at the
  // same time, as is best where heads lie beside each other in memory.
  int item_step;
  FastDivisor team_size;
  // Teams that have items.
  int num_teams;
  // Where only the device knows the lengths, and so whether the items are alike: how many tiles more than
  // their mean the longest share may have. Else the units share out the line.
  int slack_tiles;
  // Teams that there are units for. For that case they may be more than num_teams; those that have items
  // are spread over the units then, since neighbours share a way to the memory.
  FastDivisor team_slots;
};

LEANATTN_HD bool has_teams(const Layout& layout) { return layout.items_per_team > 0; }

template <bool kPlain = false>
LEANATTN_HD int num_items(const Problem& p) {
  return p.batch * p.num_heads_kv * (kPlain ? 1 : int{p.row_blocks});
}

// The team whose place is `slot`, or -1: it idles.
LEANATTN_HD int team_at(const Layout& layout, int slot) {
  if (layout.num_teams >= layout.team_slots) return slot < layout.num_teams ? slot : -1;
  const int team = slot * layout.num_teams / layout.team_slots;
  return (slot + 1) * layout.num_teams / layout.team_slots > team ? team : -1;
}

// The first of the items of the team whose place is `slot`, or -1.
template <bool kPlain = false>
LEANATTN_HD int first_item_at(const Problem& p, const Layout& layout, int slot) {
  const int team = team_at(layout, slot);
  const int first = layout.item_step == 1 ? team * layout.items_per_team : team;
  return team >= 0 && first < num_items<kPlain>(p) ? first : -1;
}

// Equal shares of a stretch of the line for a run of neighbouring units.
struct Shares {
  int num_tiles;  // of the stretch
  int first_unit;
  int num_units;    // that get a share; any others idle
  int small_share;  // tiles; the first `num_larger` units get one more
  int num_larger;

  // In tiles from the start of the stretch.
  LEANATTN_HD int begin(int unit) const {
    return (unit - first_unit) * small_share + min_of(unit - first_unit, num_larger);
  }
  LEANATTN_HD int end(int unit) const { return begin(unit + 1); }
  // The inverse of begin: the unit whose share holds `tile`.
  LEANATTN_HD int unit_of(int tile) const {
    const int in_larger = num_larger * (small_share + 1);
    return first_unit + (tile < in_larger ? tile / (small_share + 1)
                                          : num_larger + (tile - in_larger) / small_share);
  }
  LEANATTN_HD bool is_idle(int unit) const { return unit >= first_unit + num_units; }
};

template <class Int>
LEANATTN_HD Shares make_shares(int num_tiles, Int max_units, int first_unit = 0) {
  if (num_tiles < max_units) return {num_tiles, first_unit, num_tiles, 1, 0};
  const int small_share = num_tiles / max_units;
  return {num_tiles, first_unit, max_units, small_share, num_tiles - small_share * max_units};
}

// Where a sequence begins: on the line, and in the packed queries.
struct Position {
  int seq;
  int query_begin;
  int line;
};

// Tiles [tile_begin, tile_end) of one item, done by one unit.
struct Segment {
  int seq;
  int head;  // KV head
  int row_block;
  Sequence sequence;
  ItemKeys keys;
  TileRange item;  // all tiles of the item
  int tile_begin;
  int tile_end;
  int item_line;  // where the item begins on the line

  LEANATTN_HD bool is_whole() const { return tile_begin == item.begin && tile_end == item.end; }
};

// The units that share an item, [first, last] both inclusive, and where their partials are.
struct Participants {
  int first;
  int last;
  int first_slot;

  LEANATTN_HD int count() const { return last - first + 1; }
  // Where a unit's partial is. A unit has two slots: one for the item that its share begins in, one
  // for any other, which can only be one that begins in its share.
  LEANATTN_HD int64_t slot(int unit) const {
    return int64_t{unit} * 2 + (unit == first ? first_slot : 0);
  }
};

// Participants::slot of a unit that has this segment, without a search for the others.
LEANATTN_HD int64_t own_slot(const Shares& shares, const Segment& segment, int unit) {
  const bool is_first = segment.tile_begin == segment.item.begin;
  return int64_t{unit} * 2 + (is_first && shares.begin(unit) < segment.item_line ? 1 : 0);
}

LEANATTN_HD Participants participants(const Shares& shares, const Segment& segment) {
  const int first = shares.unit_of(segment.item_line);
  return {first, shares.unit_of(segment.item_line + segment.item.size() - 1),
          shares.begin(first) < segment.item_line ? 1 : 0};
}

// The tiles of the segment's item that are in a unit's share.
LEANATTN_HD TileRange tiles_of_unit(const Shares& shares, const Segment& segment, int unit) {
  const int to_item = segment.item.begin - segment.item_line;
  return {max_of(segment.item.begin, shares.begin(unit) + to_item),
          min_of(segment.item.end, shares.end(unit) + to_item)};
}

// Where all sequences are alike, what the host can work out ahead of the kernel.
struct UniformLine {
  bool one_row_block;  // then all items are alike, and these hold for each:
  TileRange item;
  ItemKeys keys;
  Shares shares;  // for stream-K
  FastDivisor tiles_per_sequence;
  FastDivisor tiles_per_head;

  LEANATTN_HD Position start(int unit) const {
    const int line = shares.is_idle(unit) ? 0 : shares.begin(unit);
    const int seq = line / tiles_per_sequence;
    return {seq, 0, seq * tiles_per_sequence};
  }
};

inline UniformLine make_uniform_line(const Problem& problem, int max_units) {
  const Sequence sequence = load_sequence(problem, 0, 0);
  const int tiles = problem.num_heads_kv * tiles_per_head(problem, sequence);
  UniformLine line{};
  line.one_row_block = problem.row_blocks == 1;
  if (line.one_row_block) {
    line.keys = item_keys(problem, sequence, 0);
    line.item = item_tiles(problem, line.keys.any);
  }
  line.shares = make_shares(problem.batch * tiles, max_units);
  line.tiles_per_sequence = max_of(tiles, 1);
  line.tiles_per_head = max_of(tiles / problem.num_heads_kv, 1);
  return line;
}

}  // namespace leanattn
