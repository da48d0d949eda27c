// Finds a unit's place on the line: a prefix sum over the lengths, by the whole CTA. Each thread
// takes a stripe of neighbouring sequences, so any batch size goes the same way.
#pragma once

#include "core/segment_walker.h"
#include "traits.h"

namespace leanattn {

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return max_of(a, b);
  }
};

// Exclusive scan over the threads of the CTA, from `identity`; total over all of them.
template <int kThreads, class T, class Op>
__device__ __forceinline__ T exclusive_scan(T value, T identity, Op op, T* warps_smem, T& total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  T inclusive = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(~0u, inclusive, distance);
    if (lane >= distance) inclusive = op(other, inclusive);
  }
  if (lane == 31) warps_smem[warp] = inclusive;
  __syncthreads();  // the warps' totals are there
  T before = identity;
  total = identity;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w == warp) before = total;
    total = op(total, warps_smem[w]);
  }
  const T previous = __shfl_up_sync(~0u, inclusive, 1);
  return lane == 0 ? before : op(before, previous);
}

struct Place {
  bool in_teams;   // the layout has teams and the items are alike enough for them
  Shares shares;   // of stream-K
  Position start;  // of the sequence in which this unit's share begins
  int query_end;   // where the last sequence's queries end
  bool any_empty;  // some sequence may have rows that see no key
};

__device__ __forceinline__ SegmentWalker make_walker(const DecodeParams& params, const Place& place,
                                                     int unit) {
  if (place.in_teams) return SegmentWalker(params.problem, params.layout, unit, params.uniform);
  return SegmentWalker(params.problem, place.shares, unit, place.start, params.uniform);
}

// Sequences a thread.
template <class Traits>
__device__ __forceinline__ int stripe_length(const Problem& problem) {
  return (problem.batch - 1) / Traits::kThreads + 1;  // there is at least one sequence
}

// Any sequence, after locate.
template <class Traits>
__device__ __forceinline__ Sequence find_sequence(const Problem& problem, int seq,
                                                  const typename Traits::SharedStorage& smem) {
  if (!problem.cu_seqlens_q) return load_sequence(problem, seq, 0);
  const int stripe = stripe_length<Traits>(problem);
  int query_begin = smem.stripe_query_begin[seq / stripe];
  for (int before = seq / stripe * stripe; before < seq; ++before) {
    query_begin = next_query_begin(problem, load_sequence(problem, before, query_begin));
  }
  return load_sequence(problem, seq, query_begin);
}

template <class Traits>
__device__ __forceinline__ Place locate(const DecodeParams& params, int unit,
                                        typename Traits::SharedStorage& smem) {
  const Problem& problem = params.problem;
  const Layout& layout = params.layout;
  Place place;
  place.in_teams = has_teams(layout);
  place.query_end = 0;
  if (params.is_uniform) {
    place.any_empty = params.uniform.any_empty;
    if (!place.in_teams) {
      place.shares = params.uniform.shares;
      place.start = params.uniform.start(unit);
    }
    return place;
  }
  if (place.in_teams && problem.batch == 1) {  // one length: the items are alike
    place.any_empty = true;
    return place;
  }

  const int stripe = stripe_length<Traits>(problem);
  const auto stripe_begin = [&](int thread) {
    return static_cast<int>(min_of<int64_t>(int64_t{thread} * stripe, problem.batch));
  };
  const int first = stripe_begin(threadIdx.x);
  const int last = stripe_begin(threadIdx.x + 1);

  // Clamping an entry of cu_seqlens_q to the one before makes a running maximum of it.
  int query_begin = 0;
  if (problem.cu_seqlens_q) {
    int largest = first_query_row(problem);
    for (int seq = first; seq < last; ++seq) {
      largest = max_of(largest, problem.cu_seqlens_q[(seq + 1) * problem.cu_seqlens_q_stride]);
    }
    query_begin = exclusive_scan<Traits::kThreads>(largest, first_query_row(problem), Max{},
                                                   smem.scan_queries, place.query_end);
    query_begin = min_of(query_begin, problem.total_q);
    place.query_end = min_of(place.query_end, problem.total_q);
    smem.stripe_query_begin[threadIdx.x] = query_begin;
  }

  int tiles = 0;
  int longest = 0;  // tiles of a sequence and KV head, over all row blocks
  int running = query_begin;
  bool empty = false;
  for (int seq = first; seq < last; ++seq) {
    const Sequence sequence = load_sequence(problem, seq, running);
    const int of_head = tiles_per_head(problem, sequence);
    tiles += problem.num_heads_kv * of_head;
    longest = max_of(longest, of_head);
    empty |= has_empty_items(problem, sequence);
    running = next_query_begin(problem, sequence);
  }
  int num_tiles;
  Position position;
  position.line = exclusive_scan<Traits::kThreads>(tiles, 0, Sum{}, smem.scan_tiles, num_tiles);

  place.shares = make_shares(num_tiles, layout.num_units);
  if (has_teams(layout)) {
    exclusive_scan<Traits::kThreads>(longest, 0, Max{}, smem.scan_largest, longest);
    // Row blocks of a sequence are close to alike.
    const int of_item = ceil_div<int>(longest, problem.row_blocks);
    const int64_t team_share =
        ceil_div<int64_t>(int64_t{of_item} * layout.items_per_team, layout.team_size);
    const int64_t worst = num_tiles + int64_t{layout.slack_tiles} * layout.team_units;
    place.in_teams = team_share * layout.team_units <= worst;
  }
  const int wanted = place.shares.is_idle(unit) ? -1 : place.shares.begin(unit);
  if (position.line <= wanted && wanted < position.line + tiles) {
    // The stripe with the unit's first tile: walk it to the sequence.
    position.query_begin = query_begin;
    for (position.seq = first;; ++position.seq) {
      const Sequence sequence = load_sequence(problem, position.seq, position.query_begin);
      const int here = problem.num_heads_kv * tiles_per_head(problem, sequence);
      if (wanted < position.line + here) break;
      position.line += here;
      position.query_begin = next_query_begin(problem, sequence);
    }
    smem.start = position;
  }
  place.any_empty = __syncthreads_or(empty);  // also: smem.start is there
  place.start = smem.start;
  return place;
}

}  // namespace leanattn
