// Writing results: a merged state becomes four neighbouring elements of one row of out, and its lse.
#pragma once

#include "mma.h"
#include "traits.h"

namespace leanattn {

// The state that a thread merges: one row of an item, four neighbouring elements of Dv.
using QuadState = SoftmaxState<4>;

// stats: max, sum.
__device__ __forceinline__ QuadState make_quad_state(float2 stats, float4 o) {
  QuadState state;
  state.max = stats.x;
  state.sum = stats.y;
  state.o[0] = o.x;
  state.o[1] = o.y;
  state.o[2] = o.z;
  state.o[3] = o.w;
  return state;
}

// By the consumer threads: calls visit(row, dim) for every row in [row_begin, row_end) and every
// fourth element of Dv, neighbouring threads at neighbouring dims.
template <class Traits, class Visit>
__device__ __forceinline__ void for_each_quad(int row_begin, int row_end, int head_dim_v,
                                              Visit visit) {
  constexpr int kQuads = Traits::kHeadDimV / 4;  // a power of two
  constexpr int kRowsAtOnce = Traits::kConsumerThreads / kQuads;
  const int dim = threadIdx.x % kQuads * 4;
  if (dim >= head_dim_v) return;
  for (int row = row_begin + threadIdx.x / kQuads; row < row_end; row += kRowsAtOnce) {
    visit(row, dim);
  }
}

template <class Element>
__device__ __forceinline__ uint2 pack_quad(const float (&o)[4], float factor) {
  return {pack<Element>(o[0] * factor, o[1] * factor), pack<Element>(o[2] * factor, o[3] * factor)};
}

// Whether these elements of an item's row belong to out: with pairs of heads, its own head's half does.
template <class Traits>
__device__ __forceinline__ bool has_output(const DecodeParams& params, const Segment& segment,
                                           int item_row, int dim) {
  if constexpr (Traits::kPairsHeads) {
    if (params.head_pairs) {
      const int query_head = query_row(params, segment, item_row).head;
      return dim / (Traits::kHeadDimV / 2) == half_of_pair(params, query_head);
    }
  }
  return true;
}

// Where has_output says so.
template <class Traits>
__device__ __forceinline__ void write_quad(const DecodeParams& params, const Segment& segment,
                                           int item_row, int dim, QuadState state) {
  const QueryRow row = query_row<Traits::kPlainItems>(params, segment, item_row);
  if constexpr (Traits::kPairsHeads) {
    if (params.head_pairs) dim -= half_of_pair(params, row.head) * (Traits::kHeadDimV / 2);
  }
  const int q_row = segment.sequence.query_begin + row.query;
  const bool wants_lse = dim == 0 && params.lse;
  const bool has_keys = state.sum != 0.0f;
  float lse = 0.0f;
  if (params.sinks) {
    const float sink = params.sinks[row.head * params.sinks_stride];
    state.merge_sink(sink);
    if (wants_lse) lse = lse_of(state.max, state.sum, sink);
  } else if (wants_lse) {
    lse = lse_of(state.max, state.sum);
  }
  if (wants_lse) params.lse[lse_offset(params, segment.seq, q_row, row.head)] = lse;
  float factor = inverse_of(state.sum);
  if constexpr (Traits::kFloat8) {
    factor *= scale_of(params.v_scale, segment.seq, own_kv_head(params, segment, row.head));
  }
  if (!has_keys) factor = 0.0f;  // be the sink and the scale NaN
  const int64_t offset = out_offset(params, segment.seq, q_row, row.head) + dim;
  if (Traits::Features::kFloat32Out && params.float32_out) {
    const float4 o = {state.o[0] * factor, state.o[1] * factor, state.o[2] * factor,
                      state.o[3] * factor};
    *reinterpret_cast<float4*>(static_cast<float*>(params.out) + offset) = o;
    return;
  }
  const uint2 packed = is_bfloat16<Traits>(params) ? pack_quad<__nv_bfloat16>(state.o, factor)
                                                   : pack_quad<__half>(state.o, factor);
  *reinterpret_cast<uint2*>(static_cast<Float16*>(params.out) + offset) = packed;
}

}  // namespace leanattn
