// Finds a unit's place: by what the host prepared where the sequences are alike, else by a prefix sum over
// the lengths. Up to kWarpSequences sequences are one warp's, the producer's, without a barrier and with
// all lengths asked for at once; larger batches are shared out among all threads of the CTA. Each takes a
// stripe of neighbouring sequences.
#pragma once

#include "core/segment_walker.h"
#include "ptx.h"
#include "traits.h"

namespace leanattn {

template <class Traits>
using WalkerOf = Walker<Traits::kPlainItems, Traits::kAppends>;

constexpr int kWarpStripe = 8;
constexpr int kWarpSequences = 32 * kWarpStripe;

struct Sum {
  __device__ __forceinline__ int operator()(int a, int b) const { return a + b; }
};
struct Max {
  __device__ __forceinline__ int operator()(int a, int b) const { return max_of(a, b); }
};

// Those who look together. scan(): exclusive, from `identity`, over all of them; and the total. Sums and
// maxima come by reductions, not by shuffles, where that can be: then the compiler knows that they are
// the same in all lanes, and so is the walk that begins with them, which makes for shorter code.
struct WarpGroup {
  static constexpr int kThreads = 32;

  __device__ __forceinline__ int index() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int total(int value) const { return __reduce_add_sync(~0u, value); }
  __device__ __forceinline__ int largest(int value) const { return __reduce_max_sync(~0u, value); }

  template <class Op>
  __device__ __forceinline__ int scan(int value, int identity, Op op) const {
    int inclusive = value;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, inclusive, distance);
      if (index() >= distance) inclusive = op(other, inclusive);
    }
    const int before = __shfl_up_sync(~0u, inclusive, 1);
    return index() == 0 ? identity : before;
  }

  // What the one who has found it brings, for all; 0 where nobody has. No number is negative.
  __device__ __forceinline__ void share(bool found, Position& position, Sequence& sequence) const {
    const auto of_finder = [&](int number) { return largest(found ? number : 0); };
    position = {of_finder(position.seq), of_finder(position.query_begin), of_finder(position.line)};
    sequence = {of_finder(sequence.length), of_finder(sequence.query_begin),
                of_finder(sequence.num_queries)};
  }
};

template <class Traits>
struct CtaGroup {
  static constexpr int kThreads = Traits::kThreads;

  typename Traits::SharedStorage& smem;

  __device__ __forceinline__ int index() const { return threadIdx.x; }

  __device__ __forceinline__ int total(int value) const {
    return combine(__reduce_add_sync(~0u, value), 0, Sum{}).all;
  }
  __device__ __forceinline__ int largest(int value) const {
    return combine(__reduce_max_sync(~0u, value), 0, Max{}).all;
  }
  template <class Op>
  __device__ __forceinline__ int scan(int value, int identity, Op op) const {
    const int before_in_warp = WarpGroup{}.scan(value, identity, op);
    const int of_warp = __shfl_sync(~0u, op(before_in_warp, value), 31);
    return op(combine(of_warp, identity, op).before, before_in_warp);
  }

  __device__ __forceinline__ void share(bool found, Position& position, Sequence& sequence) const {
    if (found) {
      smem.place.start = position;
      smem.place.sequence = sequence;
    }
    __syncthreads();  // it is there
    position = smem.place.start;
    sequence = smem.place.sequence;
  }

 private:
  struct Combined {
    int before, all;  // of the warps before this one, and of all
  };

  template <class Op>
  __device__ __forceinline__ Combined combine(int of_warp, int identity, Op op) const {
    __syncthreads();  // what came before has been read
    if (threadIdx.x % 32 == 0) smem.scan[threadIdx.x / 32] = of_warp;
    __syncthreads();  // every warp's is there
    Combined combined{identity, identity};
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      if (warp == static_cast<int>(threadIdx.x) / 32) combined.before = combined.all;
      combined.all = op(combined.all, smem.scan[warp]);
    }
    return combined;
  }
};

// Whether teams can be told from the host's knowledge alone: one sequence is like itself.
__device__ __forceinline__ bool has_teams_for_sure(const DecodeParams& params) {
  return has_teams(params.layout) && (params.is_uniform || params.problem.batch == 1);
}

// Whether the whole CTA is needed to find its units' places.
__device__ __forceinline__ bool needs_all_threads(const DecodeParams& params) {
  return params.problem.batch > kWarpSequences && !params.is_uniform;
}

// kStripe: sequences a thread has at most; plain ones are asked for at once. 0: any number.
template <class Traits, int kStripe, class Group, class Meanwhile>
__device__ __forceinline__ Place locate_among(const DecodeParams& params, int unit,
                                              const Group& group, const Meanwhile& meanwhile) {
  constexpr bool kPlain = Traits::kPlainItems;
  const Problem problem = problem_of<Traits>(params);
  const Layout& layout = params.layout;
  Place place;
  place.in_teams = has_teams(layout);
  // Asked for with all the others, whatever comes of them.
  if (place.in_teams)
    place.sequence = load_team_sequence<kPlain, Traits::kAppends>(problem, layout, unit);
  const int stripe = kStripe == 1 ? 1 : (problem.batch - 1) / Group::kThreads + 1;
  const int first = min_of(group.index() * stripe, problem.batch);
  const int last = min_of(first + stripe, problem.batch);
  // Calls visit(seq, sequence) for the thread's sequences, until it says that it is enough.
  constexpr bool kAtOnce = kStripe > 0 && kPlain;
  int lengths[kAtOnce ? kStripe : 1];
  if constexpr (kAtOnce) {
#pragma unroll
    for (int i = 0; i < kStripe; ++i) {
      const int seq = min_of(first + i, problem.batch - 1);
      lengths[i] = load_sequence<kPlain, Traits::kAppends>(problem, seq, 0).length;
    }
  }
  meanwhile();
  const auto for_each_sequence = [&](int query_begin, const auto& visit) {
    if constexpr (kAtOnce) {
#pragma unroll
      for (int i = 0; i < kStripe; ++i) {
        if (first + i < last && visit(first + i, Sequence{lengths[i], 0, 1})) break;
      }
    } else {
#pragma unroll 1
      for (int seq = first; seq < last; ++seq) {
        const Sequence sequence =
            load_sequence<kPlain, Traits::kAppends>(problem, seq, query_begin);
        if (visit(seq, sequence)) break;
        query_begin = next_query_begin<kPlain>(problem, sequence);
      }
    }
  };

  // Clamping an entry of cu_seqlens_q to the one before makes a running maximum of it.
  int query_begin = 0;
  if (!kPlain && problem.cu_seqlens_q) {
    int largest = first_query_row(problem);
    for (int seq = first; seq < last; ++seq) {
      largest = max_of(largest, problem.cu_seqlens_q[(seq + 1) * problem.cu_seqlens_q_stride]);
    }
    query_begin = group.scan(largest, first_query_row(problem), Max{});
    query_begin = clamp_to(query_begin, first_query_row(problem), problem.total_q);
  }

  int tiles = 0;
  int longest = 0;  // tiles of a sequence and KV head, over all row blocks
  for_each_sequence(query_begin, [&](int, const Sequence& sequence) {
    const int of_head = tiles_per_head<kPlain>(problem, sequence);
    tiles += problem.num_heads_kv * of_head;
    longest = max_of(longest, of_head);
    return false;
  });
  const int num_tiles = group.total(tiles);
  if (place.in_teams) {
    // Row blocks of a sequence are close to alike.
    const int of_item = group.largest(longest);
    const int of_one = kPlain ? of_item : ceil_div<int>(of_item, problem.row_blocks);
    const int units = layout.num_teams * layout.team_size;
    const int64_t share = (int64_t{of_one} * layout.items_per_team + layout.team_size - 1) /
                          static_cast<uint32_t>(int{layout.team_size});
    place.in_teams = share * units <= num_tiles + int64_t{layout.slack_tiles} * units;
    if (place.in_teams) return place;
  }

  const int line = group.scan(tiles, 0, Sum{});
  place.shares = make_shares(num_tiles, layout.num_units);
  const int wanted = place.shares.is_idle(unit) ? -1 : place.shares.begin(unit);
  const bool found = line <= wanted && wanted < line + tiles;
  if (found) {
    // The stripe with the unit's first tile: on to the sequence.
    place.start.line = line;
    for_each_sequence(query_begin, [&](int seq, const Sequence& sequence) {
      place.start.seq = seq;
      place.start.query_begin = sequence.query_begin;
      place.sequence = sequence;
      const int here = problem.num_heads_kv * tiles_per_head<kPlain>(problem, sequence);
      if (wanted < place.start.line + here) return true;
      place.start.line += here;
      return false;
    });
  }
  group.share(found, place.start, place.sequence);
  return place;
}

// For large batches, by all threads of the CTA: puts the place into shared memory.
template <class Traits>
LEANATTN_OUT_OF_LINE void locate_by_all(const DecodeParams& params,
                                        typename Traits::SharedStorage& smem) {
  const Place place = locate_among<Traits, 0>(params, blockIdx.x, CtaGroup<Traits>{smem}, [] {});
  __syncthreads();  // the start has been read
  if (threadIdx.x == 0) smem.place = place;
  __syncthreads();  // the place is there
}

// By a warp: the walk of the unit's share. meanwhile(): what there is to do on the way to memory.
template <class Traits, class Meanwhile>
__device__ __forceinline__ WalkerOf<Traits> locate(const DecodeParams& params, int unit,
                                                   const typename Traits::SharedStorage& smem,
                                                   const Meanwhile& meanwhile) {
  constexpr bool kPlain = Traits::kPlainItems;
  const Problem problem = problem_of<Traits>(params);
  Place place;
  if (has_teams_for_sure(params)) {
    place.in_teams = true;
    place.sequence = load_team_sequence<kPlain, Traits::kAppends>(problem, params.layout, unit);
    meanwhile();
  } else if (params.is_uniform) {
    meanwhile();
    place.in_teams = false;
    place.shares = params.uniform.shares;
    place.start = params.uniform.start(unit);
    place.sequence = load_sequence<kPlain, Traits::kAppends>(problem, 0, 0);
  } else if (needs_all_threads(params)) {
    place = smem.place;
    meanwhile();
  } else if (kPlain && problem.batch <= 32) {
    place = locate_among<Traits, 1>(params, unit, WarpGroup{}, meanwhile);
  } else {
    place = locate_among<Traits, kWarpStripe>(params, unit, WarpGroup{}, meanwhile);
  }
  if (place.in_teams) {
    return WalkerOf<Traits>(problem, params.layout, unit, place.sequence, params.uniform);
  }
  return WalkerOf<Traits>(problem, place.shares, unit, place.start, place.sequence, params.uniform);
}

}  // namespace leanattn
