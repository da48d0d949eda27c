// Fills the rows of out and lse that see no key: items without tiles are in nobody's share, and with
// cu_seqlens_q there may be rows that no sequence covers.
#pragma once

#include "locate.h"
#include "output.h"

namespace leanattn {

template <class Element>
__device__ __forceinline__ void clear_row(const DecodeParams& params, int64_t offset) {
  constexpr int kWidth = 16 / sizeof(Element);
  Element* out = static_cast<Element*>(params.out) + offset;
  for (int dim = threadIdx.x % 32 * kWidth; dim < out_head_dim(params); dim += 32 * kWidth) {
    *reinterpret_cast<uint4*>(out + dim) = uint4{};
  }
}

// One row of out, by a warp.
template <class Traits>
__device__ __forceinline__ void write_empty_row(const DecodeParams& params, int seq, int q_row,
                                                int head, float lse) {
  const int64_t offset = out_offset(params, seq, q_row, head);
  if (Traits::Features::kFloat32Out && params.float32_out) {
    clear_row<float>(params, offset);
  } else {
    clear_row<Float16>(params, offset);
  }
  if (threadIdx.x % 32 == 0 && params.lse) params.lse[lse_offset(params, seq, q_row, head)] = lse;
}

// Rows [begin, end) of packed queries, which belong to no sequence, by the CTAs' first helper warps in turn.
template <class Traits>
__device__ __forceinline__ void write_uncovered_rows(const DecodeParams& params, int begin,
                                                     int end) {
  for (int64_t row = int64_t{begin} + blockIdx.x; row < end; row += gridDim.x) {
    for (int head = 0; head < params.num_heads_q; ++head) {
      write_empty_row<Traits>(params, 0, static_cast<int>(row), head, kNegativeInfinity);
    }
  }
}

// By a warp.
template <class Traits>
__device__ __forceinline__ void write_empty_item(const DecodeParams& params, int seq,
                                                 const Sequence& sequence, int head_kv,
                                                 int row_block) {
  const Problem& problem = params.problem;
  const int first = row_block * problem.rows_per_item;
  const int rows = item_rows<Traits::kPlainItems>(problem, sequence, row_block);
  for (int row = first; row < first + rows; ++row) {
    const int head = head_kv * problem.group_size + row % problem.group_size;
    const float lse = params.sinks ? params.sinks[head * params.sinks_stride] : kNegativeInfinity;
    write_empty_row<Traits>(params, seq, sequence.query_begin + row / problem.group_size, head,
                            lse);
  }
}

// The largest of entries 0 to `last` of cu_seqlens_q, by a warp.
__device__ __forceinline__ int largest_offset(const Problem& problem, int last) {
  int largest = 0;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i <= last; i += 32) {
    largest = max_of(largest, problem.cu_seqlens_q[i * problem.cu_seqlens_q_stride]);
  }
  return WarpGroup{}.largest(largest);
}

// By the first helper warps of all CTAs, each with a stripe of neighbouring sequences, 32 at a time.
template <class Traits>
__device__ __forceinline__ void write_empty_rows(const DecodeParams& params) {
  constexpr bool kPlain = Traits::kPlainItems;
  const Problem problem = problem_of<Traits>(params);
  const bool has_offsets = !kPlain && problem.cu_seqlens_q;
  const int lane = threadIdx.x % 32;
  const int stripe = (problem.batch - 1) / static_cast<int>(gridDim.x) + 1;
  const int begin = static_cast<int>(min_of<int64_t>(int64_t{blockIdx.x} * stripe, problem.batch));
  const int end = min_of(begin + stripe, problem.batch);
  int query_begin = 0;
  if (has_offsets) {
    const int first = first_query_row(problem);
    const int query_end = clamp_to(largest_offset(problem, problem.batch), first, problem.total_q);
    write_uncovered_rows<Traits>(params, 0, first);
    write_uncovered_rows<Traits>(params, query_end, problem.total_q);
    query_begin = clamp_to(largest_offset(problem, begin), first, problem.total_q);
  }
  LEANATTN_KEEP_ROLLED
  for (int group = begin; group < end; group += 32) {
    const int seq = min_of(group + lane, problem.batch - 1);
    Sequence sequence;
    if (has_offsets) {
      // A sequence begins where the largest offset up to it is.
      const int mine = problem.cu_seqlens_q[(seq + 1) * problem.cu_seqlens_q_stride];
      const int before = WarpGroup{}.scan(mine, query_begin, Max{});
      const int my_begin = clamp_to(before, query_begin, problem.total_q);
      query_begin = clamp_to(WarpGroup{}.largest(mine), query_begin, problem.total_q);
      sequence = load_sequence<kPlain>(problem, seq, my_begin);
    } else {
      sequence = load_sequence<kPlain>(problem, seq, 0);
    }
    const int my_blocks = group + lane < end ? end_of_empty_items<kPlain>(problem, sequence) : 0;
    unsigned lanes = __ballot_sync(~0u, my_blocks > 0);
    LEANATTN_KEEP_ROLLED
    for (; lanes != 0; lanes &= lanes - 1) {
      const int from = __ffs(static_cast<int>(lanes)) - 1;
      const Sequence empty{__shfl_sync(~0u, sequence.length, from),
                           __shfl_sync(~0u, sequence.query_begin, from),
                           __shfl_sync(~0u, sequence.num_queries, from)};
      const int blocks = __shfl_sync(~0u, my_blocks, from);
      LEANATTN_KEEP_ROLLED
      for (int block = 0; block < blocks; ++block) {
        if (!kPlain && !is_empty_item(problem, empty, block)) continue;
        LEANATTN_KEEP_ROLLED
        for (int head_kv = 0; head_kv < problem.num_heads_kv; ++head_kv) {
          write_empty_item<Traits>(params, group + from, empty, head_kv, block);
        }
      }
    }
  }
}

}  // namespace leanattn
