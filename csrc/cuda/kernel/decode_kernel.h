// The kernel, in the order in which things happen. One CTA is one unit: it finds its share of the
// line, and then the producer warp copies and the consumer warps compute it, segment by segment.
// Reading order: schedule.h, softmax_state.h, traits.h, ring.h, loaders.h, mainloop.h, warp_merge.h,
// fixup.h.
#pragma once

#include "empty_rows.h"
#include "fixup.h"
#include "loaders.h"
#include "locate.h"
#include "mainloop.h"
#include "warp_merge.h"

namespace leanattn {

// q rows of the item into shared memory, swizzled; rows and columns beyond the item are zero.
template <class Traits>
__device__ __forceinline__ void load_queries(const DecodeParams& params, const Segment& segment,
                                             uint8_t* q_smem) {
  using Element = typename Traits::Element;
  constexpr int kChunks = Traits::kHeadDim / 8;
  const int rows = item_rows(params.problem, segment.sequence, segment.row_block);
  const Element* q = static_cast<const Element*>(params.q);
  for (int i = threadIdx.x; i < Traits::kRows * kChunks; i += Traits::kConsumerThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    uint4 values{};
    if (row < rows && chunk * 8 < params.head_dim) {
      const QueryRow r = query_row(params, segment, row);
      values = *reinterpret_cast<const uint4*>(
          q + q_offset(params, segment.seq, segment.sequence, r.query, r.head) + chunk * 8);
    }
    *reinterpret_cast<uint4*>(q_smem + swizzled_offset<Traits::kRows>(row, chunk)) = values;
  }
}

// The consumer warps' whole life.
template <class Traits>
__device__ __forceinline__ void consume(const DecodeParams& params, const Shares& shares, int unit,
                                        Ring<Traits> ring, typename Traits::SharedStorage& smem) {
  const WarpPlace<Traits> place(threadIdx.x / 32);
  MainLoop<Traits> main_loop(params, place, smem.q);
  for (int turn = 0;; turn ^= 1) {
    const Segment& segment = smem.segments[turn];
    if (threadIdx.x == 0) smem.has_segment[turn] = smem.consumer_walker.next(smem.segments[turn]);
    sync_consumers<Traits>();  // the segment is there; everybody has left the last one's main loop
    if (!smem.has_segment[turn]) break;
    const int rows = item_rows(params.problem, segment.sequence, segment.row_block);
    load_queries<Traits>(params, segment, smem.q);
    sync_consumers<Traits>();  // q is there; everybody has left the last segment's merge

    WarpState<Traits> state;
    main_loop.run(segment, ring, state);

    if (segment.is_whole()) {
      merge_warps<Traits>(smem, place, state, rows, params.head_dim_v,
                          [&](int row, int dim, const QuadState& merged) {
                            write_quad<Traits>(params, segment, row, dim, merged);
                          });
      continue;
    }
    const int64_t index = partial_index(shares, segment, unit);
    merge_warps<Traits>(smem, place, state, rows, params.head_dim_v,
                        [&](int row, int dim, const QuadState& merged) {
                          store_partial<Traits>(params, index, row, dim, merged);
                        });
    const Participants units = participants(shares, segment);
    if (draw_last_ticket<Traits>(params, segment, units, smem)) {
      merge_partials<Traits>(params, shares, segment, units);
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params,
                  const __grid_constant__ TensorMaps maps, int num_stages) {
  extern __shared__ __align__(1024) uint8_t dynamic_smem[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(dynamic_smem);
  const bool use_tma = maps.box_tokens > 0;

  Ring<Traits> ring(smem, num_stages);
  if (threadIdx.x == 0) {
    ring.init(use_tma ? TmaLoader<Traits>::kArrivals : CpAsyncLoader<Traits>::kArrivals);
#if __CUDA_ARCH__ >= 900
    cutlass::arch::fence_barrier_init();  // before the copy engine arrives on them
#endif
  }
  const int unit = blockIdx.x;
  const Place place = locate<Traits>(params, unit, smem);
  const SegmentWalker walker(params.problem, place.shares, unit, place.start);
  if (threadIdx.x == 0) smem.consumer_walker = walker;
  __syncthreads();  // the ring's barriers are initialised

  if (threadIdx.x >= Traits::kConsumerThreads) {
    if (use_tma) {
      produce(params, maps, walker, TmaLoader<Traits>{maps.box_tokens}, ring);
    } else {
      produce(params, maps, walker, CpAsyncLoader<Traits>{}, ring);
    }
  } else {
    consume<Traits>(params, place.shares, unit, ring, smem);
  }
  write_empty_rows<Traits>(params, place, smem);
}

}  // namespace leanattn
