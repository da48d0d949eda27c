// Everything one append needs, as a POD: the contract between the binding, the CPU implementation
// and the kernel. No torch, no CUDA. Strides are in elements, those of dimensions of size 1 are 0;
// D and Dv are the head dims of K and V.
//
// What comes from device memory is made harmless here, once: lengths are clamped to [0, max_length],
// cu_seqlens entries to [previous entry, total], and a row that would lie beyond the capacity or in
// a page that there is not is not written. It is not clamped to one that there is: that would be
// another sequence's.
#pragma once

#include <cstdint>

#include "params.h"

namespace leanattn {

struct Rows {
  void* data;  // [batch, seq, heads, dim]
  int64_t batch_stride, seq_stride, head_stride, dim_stride;
};

struct RopeTable {
  const void* data;  // [max_position, rotary_dim / 2]
  int64_t position_stride, dim_stride;
};

struct Rope {
  int num_pairs;     // rotary_dim / 2; 0: no rotation
  bool interleaved;  // pair i is dims 2i and 2i + 1 (GPT-J), else i and num_pairs + i (NeoX)
  int max_position;
  bool tables_are_float32;  // else of the element type
  RopeTable cos, sin;
};

struct AppendParams {
  // First, and together: what a decode that appends needs of this. It finds its parameters cold in memory.
  Rope rope;
  // With cu_seqlens, [1, total, ...] with batch stride 0.
  Rows k;        // [B, Sn, Hkv, D]
  Rows v;        // [B, Sn, Hkv, Dv]
  Rows k_cache;  // [B, S, Hkv, D], or paged [num_pages, page_size, Hkv, D]
  Rows v_cache;  // the same with Dv
  Rows q;        // [B, Sn, Hq, D]
  Rows q_out;    // where it goes when it is rotated: q itself, or apart from it
  Scales k_scale, v_scale;

  ElementType element_type;  // of q, k and v
  CacheType cache_type;      // of both caches
  int batch;
  int num_tokens;   // new ones, of all sequences
  int num_heads_q;  // 0: no q
  int num_heads_kv;
  int head_dim;    // D
  int head_dim_v;  // Dv

  FastDivisor seqlen_new;     // new tokens a sequence, without cu_seqlens
  const int32_t* cu_seqlens;  // [B + 1], or null
  int64_t cu_seqlens_stride;
  const int32_t* cache_seqlens;  // [B], before the append
  int64_t cache_seqlens_stride;
  const int32_t* block_table;  // [B, max_pages], or null: contiguous caches
  int64_t block_table_batch_stride, block_table_page_stride;
  int num_pages;
  FastDivisor page_size;
  int capacity;  // tokens that a sequence can hold here
  Shard shard;

  // [B], or null: where to write how many tokens a sequence has afterwards, for each that has new ones.
  int32_t* attended_lengths;

  LEANATTN_HD bool keeps_q() const { return q_out.data != q.data; }
};

// A decode that appends on the way: the lengths of its problem are those before the append.
struct AppendDecodeParams : DecodeParams {
  AppendParams append;
};

// A new token: which sequence's, the how manieth of its new ones, and its row in q, k and v.
struct NewToken {
  int seq;
  int index;
  int row;
};

// Without cu_seqlens.
LEANATTN_HD NewToken uniform_token(const AppendParams& p, int token) {
  const int seq = token / p.seqlen_new;
  const int index = token - seq * p.seqlen_new;
  return {seq, index, index};
}

LEANATTN_HD int64_t row_offset(const Rows& rows, const NewToken& token, int head) {
  return token.seq * rows.batch_stride + token.row * rows.seq_stride + head * rows.head_stride;
}

// The tokens that a sequence can have, on all ranks.
LEANATTN_HD int max_length(const AppendParams& p) {
  return p.shard.is_whole() ? p.capacity : p.shard.max_length;
}

// Where in its sequence a new token stands: after the length, clamped, before the append.
LEANATTN_HD int64_t position_of(const AppendParams& p, const NewToken& token) {
  const int length =
      clamp_to(p.cache_seqlens[token.seq * p.cache_seqlens_stride], 0, max_length(p));
  return int64_t{length} + token.index;
}

// The tokens of a sequence after the append.
LEANATTN_HD int attended_length(const AppendParams& p, int seq, int new_tokens) {
  const int length = clamp_to(p.cache_seqlens[seq * p.cache_seqlens_stride], 0, p.capacity);
  return static_cast<int>(min_of<int64_t>(int64_t{length} + new_tokens, p.capacity));
}

// Likewise, where `token` is the first of its sequence's new ones.
LEANATTN_HD int attended_length(const AppendParams& p, const NewToken& token) {
  int new_tokens = p.seqlen_new;
  if (p.cu_seqlens) {
    const int end = p.cu_seqlens[(token.seq + 1) * p.cu_seqlens_stride];
    new_tokens = min_of(end, p.num_tokens) - token.row;
  }
  return attended_length(p, token.seq, new_tokens);
}

// Where a new token goes in the caches.
struct CacheSlot {
  int page;  // in contiguous caches the sequence; -1: nowhere
  int row;   // within the page

  LEANATTN_HD bool exists() const { return page >= 0; }
};

LEANATTN_HD CacheSlot find_slot(const AppendParams& p, int seq, int64_t position) {
  if (position >= max_length(p)) return {-1, 0};
  int key = static_cast<int>(position);
  if (!p.shard.is_whole()) {
    if (!p.shard.has(key)) return {-1, 0};
    key = p.shard.keys_before(key);
  }
  if (!p.block_table) return {seq, key};
  const int index = key / p.page_size;
  const int page =
      p.block_table[seq * p.block_table_batch_stride + index * p.block_table_page_stride];
  if (page < 0 || page >= p.num_pages) return {-1, 0};
  return {page, key - index * p.page_size};
}

LEANATTN_HD int64_t slot_offset(const Rows& cache, const CacheSlot& slot, int head) {
  return slot.page * cache.batch_stride + slot.row * cache.seq_stride + head * cache.head_stride;
}

// The row of cos and sin for a position.
LEANATTN_HD int rope_position(const Rope& rope, int64_t position) {
  return static_cast<int>(min_of<int64_t>(position, rope.max_position - 1));
}

// Rotates the pair (x, y) by the angle of this cosine and sine: RoFormer, arXiv 2104.09864, eq. 34.
LEANATTN_HD void rotate(float& x, float& y, float cos, float sin) {
  const float rotated = x * cos - y * sin;
  y = x * sin + y * cos;
  x = rotated;
}

}  // namespace leanattn
