// Everything one decode call needs, as a POD: the contract between the binding, the CPU
// implementation and the kernels. No torch, no CUDA. Strides are in elements; D and Dv are the head
// dims of K and V; a tensor that is absent is null.
#pragma once

#include <cstdint>

#include "schedule.h"
#include "softmax_state.h"

namespace leanattn {

enum class ElementType { kFloat32, kFloat16, kBFloat16 };
enum class CacheType { kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kFloat8E5M2 };

LEANATTN_HD bool is_float8(CacheType type) {
  return type == CacheType::kFloat8E4M3 || type == CacheType::kFloat8E5M2;
}

// What the numbers of a float8 cache stand for: times this.
struct Scales {
  const float* data;  // [B, Hkv], or null: 1
  int64_t batch_stride, head_stride;
};

LEANATTN_HD float scale_of(const Scales& scales, int seq, int head) {
  return scales.data ? scales.data[seq * scales.batch_stride + head * scales.head_stride] : 1.0f;
}

// Rows that a batch-invariant item holds at most, on CUDA.
constexpr int kFoldRows = 16;

// Of a timeline, in a build that measures it: cuda/kernel/timeline.h.
constexpr int kNumMarks = 9;
constexpr int kMaxTimelineUnits = 256;

struct DecodeParams {
  ElementType element_type;  // of q and out
  CacheType cache_type;      // of k and v: the same, or a float8
  int head_dim;              // D, on CUDA padded to whole 16 bytes of q
  int head_dim_v;            // Dv, likewise of out
  int num_heads_q;
  Problem problem;  // lengths, mask, shape of the schedule
  Layout layout;
  bool is_uniform;   // no lengths in device memory: `uniform` holds
  int cluster_size;  // of whole clusters of so many CTAs a team consists, which merge in distributed
                     // shared memory; 1: of single CTAs
  UniformLine uniform;

  // With cu_seqlens_q, B is 1 and Sq is total_q here: the batch stride of q, out and lse is 0.
  const void* q;  // [B, Sq, Hq, D]
  int64_t q_batch_stride, q_seq_stride, q_head_stride, q_dim_stride;
  const void* k;  // [B, S, Hkv, D], or paged [num_pages, page_size, Hkv, D]
  int64_t k_batch_stride, k_seq_stride, k_head_stride, k_dim_stride;
  const void* v;  // [B, S, Hkv, Dv], or paged [num_pages, page_size, Hkv, Dv]
  int64_t v_batch_stride, v_seq_stride, v_head_stride, v_dim_stride;
  bool values_in_keys;  // v is k's first Dv columns
  bool head_pairs;      // D, Dv, Hkv and the caches' strides are of pairs of heads: head_pairs.h
  bool float32_out;     // out is float32, whatever q is
  // The page of each page_size tokens of a sequence, or null: contiguous caches. Entries of pages
  // that no query sees are never read. The caches' batch strides are strides of pages.
  const int32_t* block_table;  // [B, max_pages]
  int64_t block_table_batch_stride, block_table_page_stride;
  int num_pages;
  FastDivisor page_size;
  Scales k_scale, v_scale;

  void* out;  // [B, Sq, Hq, Dv]
  int64_t out_batch_stride, out_seq_stride, out_head_stride, out_dim_stride;
  const float* sinks;  // [Hq], or null; beside what else the end of an item needs
  int64_t sinks_stride;
  float* lse;  // [B, Sq, Hq], or null: not wanted
  int64_t lse_batch_stride, lse_seq_stride, lse_head_stride;

  float softmax_scale;
  float softcap;              // 0: off
  const float* alibi_slopes;  // [B, Hq]
  int64_t alibi_batch_stride, alibi_head_stride;

  // Tiles are merged in a fixed tree, so that nothing around a sequence changes its bits: tree_fold.h.
  bool batch_invariant;
  int max_nodes;  // partials that a segment leaves at most: 1, or what tree_fold.h says

  // The fixup's memory; null where the layout leaves no partials in global memory: workspace.h.
  // Slots 0 and 1 of a unit hold the partials of a segment each: schedule.h.
  float* partial_o;      // [layout.num_units, 2, max_nodes, rows_per_item, Dv]
  float* partial_stats;  // [layout.num_units, 2, max_nodes, rows_per_item, 2]: max, sum
  // Batch-invariant only: states that wait for their sibling in the tree.
  SoftmaxState<4>* fold_states;  // [layout.num_units, max_nodes / 2, rows_per_item, padded Dv / 4]
  int32_t* counters;             // tickets, zero before and after; see counter_index
  bool counter_per_item;         // one counter an item instead of one a unit

  int k_columns, v_columns;  // D and Dv as the caches have them
#ifdef LEANATTN_TIMELINE
  uint64_t* timeline;  // [kMaxTimelineUnits, kNumMarks], or null
#endif
};

// The head dim that the kernel for a call is compiled for; D is padded to it, and Dv to
// padded_head_dim_v of it. Rows of K and V have at least 128 bytes there.
LEANATTN_HD int kernel_head_dim(const DecodeParams& p) {
  const int padded = padded_head_dim(max_of(p.head_dim, p.head_dim_v));
  return is_float8(p.cache_type) ? max_of(padded, 128) : padded;
}

// Where a query row lives in q, out and lse, in elements.
LEANATTN_HD int64_t q_offset(const DecodeParams& p, int seq, const Sequence& s, int query,
                             int head) {
  return seq * p.q_batch_stride + (s.query_begin + query) * p.q_seq_stride + head * p.q_head_stride;
}

// Where a token of a sequence lives in the caches.
struct CacheRow {
  int page;  // in contiguous caches the sequence
  int row;   // within the page
};

// Entry `index` of a sequence's row of the block table: a page id that may be anything.
LEANATTN_HD const int32_t* block_table_entry(const DecodeParams& p, int seq, int index) {
  return p.block_table + seq * p.block_table_batch_stride + index * p.block_table_page_stride;
}

LEANATTN_HD int clamp_page(const DecodeParams& p, int page) {
  return clamp_to(page, 0, p.num_pages - 1);
}

LEANATTN_HD CacheRow cache_row(const DecodeParams& p, int seq, int token) {
  if (!p.block_table) return {seq, token};
  const int index = token / p.page_size;
  return {clamp_page(p, *block_table_entry(p, seq, index)), token - index * p.page_size};
}

LEANATTN_HD int64_t out_offset(const DecodeParams& p, int seq, int query_row, int head) {
  return seq * p.out_batch_stride + query_row * p.out_seq_stride + head * p.out_head_stride;
}

LEANATTN_HD int64_t lse_offset(const DecodeParams& p, int seq, int query_row, int head) {
  return seq * p.lse_batch_stride + query_row * p.lse_seq_stride + head * p.lse_head_stride;
}

// Index of partial `node` of the segment that has a slot: times rows_per_item * Dv into partial_o.
LEANATTN_HD int64_t partial_index(const DecodeParams& p, int64_t slot, int node) {
  return slot * p.max_nodes + node;
}

// Of all items, where all sequences have as many.
template <bool kPlain = false>
LEANATTN_HD int item_number(const DecodeParams& p, const Segment& segment) {
  const int row_blocks = num_row_blocks<kPlain>(p.problem, segment.sequence);
  return (segment.seq * p.problem.num_heads_kv + segment.head) * row_blocks + segment.row_block;
}

// The counter of an item that several units share. An item is known by the unit that it begins in:
// of the items that begin in one unit's share only the last can go on in the next. Where there are
// fewer items than units, by its own number, so that a few counters are enough.
template <bool kPlain = false>
LEANATTN_HD int counter_index(const DecodeParams& p, const Segment& segment, int first_unit) {
  return p.counter_per_item ? item_number<kPlain>(p, segment) : first_unit;
}

// A team of several clusters has one counter a rank within a cluster: those of a rank merge its rows.
LEANATTN_HD bool has_several_clusters(const DecodeParams& p) {
  return p.cluster_size > 1 && p.layout.team_size > p.cluster_size;
}
template <bool kPlain = false>
LEANATTN_HD int rank_counter_index(const DecodeParams& p, const Segment& segment, int rank) {
  return item_number<kPlain>(p, segment) * p.cluster_size + rank;
}

// One row of an item, resolved.
struct QueryRow {
  int query;     // within its sequence
  int head;      // query head
  int position;  // where the query stands among the tokens
};

template <bool kPlain = false>
LEANATTN_HD QueryRow query_row(const DecodeParams& p, const Segment& segment, int row) {
  if (kPlain) return {0, segment.head * p.problem.group_size + row, segment.sequence.length - 1};
  const int packed = segment.row_block * p.problem.rows_per_item + row;
  const int query = packed / p.problem.group_size;
  return {query, segment.head * p.problem.group_size + packed % p.problem.group_size,
          position_of(segment.sequence, query)};
}

// A raw dot product q.k becomes a score in units of log2: scale, softcap, ALiBi, in this order.
// slope is 0 without ALiBi. Real is float on the GPU; the CPU can afford double.
template <class Real>
LEANATTN_HD Real score_log2(const DecodeParams& p, Real dot, float slope, int distance) {
  Real score = dot * p.softmax_scale;
  if (p.softcap != 0.0f) score = p.softcap * tanh(score / p.softcap);
  score -= slope * static_cast<Real>(distance);
  return score * static_cast<Real>(1.4426950408889634);
}

}  // namespace leanattn
