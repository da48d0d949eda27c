// Fills the rows of out and lse that see no key: items without tiles are in nobody's share, and with
// cu_seqlens_q there may be rows that no sequence covers.
#pragma once

#include "locate.h"
#include "output.h"

namespace leanattn {

// One row of out, by a warp.
template <class Traits>
__device__ __forceinline__ void write_empty_row(const DecodeParams& params, int seq, int q_row,
                                                int head, float lse) {
  Float16* out = static_cast<Float16*>(params.out) + out_offset(params, seq, q_row, head);
  for (int dim = threadIdx.x % 32 * 8; dim < out_head_dim(params); dim += 32 * 8) {
    *reinterpret_cast<uint4*>(out + dim) = uint4{};
  }
  if (threadIdx.x % 32 == 0 && params.lse) params.lse[lse_offset(params, seq, q_row, head)] = lse;
}

// Rows [begin, end) of packed queries, which belong to no sequence, by the warps in turn.
template <class Traits>
__device__ __forceinline__ void write_uncovered_rows(const DecodeParams& params, int begin, int end,
                                                     int warp, int num_warps) {
  for (int64_t row = int64_t{begin} + warp; row < end; row += num_warps) {
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
  for (int row = first; row < first + item_rows(problem, sequence, row_block); ++row) {
    const int head = head_kv * problem.group_size + row % problem.group_size;
    const float lse = params.sinks ? params.sinks[head * params.sinks_stride] : kNegativeInfinity;
    write_empty_row<Traits>(params, seq, sequence.query_begin + row / problem.group_size, head,
                            lse);
  }
}

// By every warp of every CTA, after locate.
template <class Traits>
__device__ __forceinline__ void write_empty_rows(const DecodeParams& params, const Place& place,
                                                 const typename Traits::SharedStorage& smem) {
  constexpr int kWarps = Traits::kThreads / 32;
  const Problem& problem = params.problem;
  const int warp = threadIdx.x / 32 + blockIdx.x * kWarps;
  const int num_warps = gridDim.x * kWarps;
  if (problem.cu_seqlens_q) {
    write_uncovered_rows<Traits>(params, 0, first_query_row(problem), warp, num_warps);
    write_uncovered_rows<Traits>(params, place.query_end, problem.total_q, warp, num_warps);
  }
  if (!place.any_empty) return;
  for (int64_t next = warp; next < problem.batch; next += num_warps) {
    const int seq = static_cast<int>(next);
    const Sequence sequence = find_sequence<Traits>(problem, seq, smem);
    const int blocks = num_empty_row_blocks(problem, sequence);
    for (int block = 0; block < blocks; ++block) {
      for (int head_kv = 0; head_kv < problem.num_heads_kv; ++head_kv) {
        write_empty_item<Traits>(params, seq, sequence, head_kv, block);
      }
    }
  }
}

}  // namespace leanattn
