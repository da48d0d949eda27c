// Merging partial results: a thread does some neighbouring elements of one row, over all states in
// their order, so that the bits depend on nothing else.
#include "merge.h"

#include "kernel/vector.h"
#include "launch_grid.h"

namespace leanattn {
namespace {

constexpr int kThreads = 128;

// threads_per_row: a power of two up to kThreads.
template <class Element, class Out, int kWidth>
__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeParams p, int threads_per_row) {
  const int rows_per_cta = kThreads / threads_per_row;
  const int64_t row_index = int64_t{blockIdx.x} * rows_per_cta + threadIdx.x / threads_per_row;
  if (row_index >= p.num_rows) return;
  const MergeRow row = find_merge_row(p, static_cast<int>(row_index));
  const float base = merge_base(p, row);
  const int first = threadIdx.x % threads_per_row * kWidth;
  for (int dim = first; dim < p.head_dim; dim += threads_per_row * kWidth) {
    const Element* outs = static_cast<const Element*>(p.outs) + row.outs_offset + dim;
    float sum = 0.0f;
    float o[kWidth] = {};
#pragma unroll 4
    for (int i = 0; i < p.num_states; ++i) {
      const float lse = p.lses[row.lses_offset + i * p.lses_state_stride];
      const Vector<Element, kWidth> values = load_vector<kWidth>(outs + i * p.outs_state_stride);
      // Selected, not skipped: a branch would keep the loads of several states from overlapping.
      const bool counts = !saw_nothing(lse);
      const float weight = counts ? merge_weight(lse, base) : 0.0f;
      sum += weight;
      for (int d = 0; d < kWidth; ++d) {
        o[d] += counts ? weight * to_float(values.element[d]) : 0.0f;
      }
    }
    const float factor = inverse_of(sum);
    Vector<Out, kWidth> result;
    for (int d = 0; d < kWidth; ++d) result.element[d] = from_float<Out>(o[d] * factor);
    store_vector(static_cast<Out*>(p.out) + row_index * p.head_dim + dim, result);
    if (dim == 0) p.lse[row_index] = merged_lse(base, sum);
  }
}

// Whether every row begins on a 16-byte boundary and has a whole number of vectors.
template <class Element>
bool is_vectorizable(const MergeParams& p) {
  const auto whole = [](int64_t elements) { return elements * sizeof(Element) % 16 == 0; };
  bool aligned = is_aligned(p.outs, 16) && is_aligned(p.out, 16) && whole(p.head_dim) &&
                 (p.num_states == 1 || whole(p.outs_state_stride));
  for (int dim = 0; dim < p.num_dims; ++dim) aligned = aligned && whole(p.outs_strides[dim]);
  return aligned;
}

template <class Element, class Out, int kWidth>
void launch(const MergeParams& p, cudaStream_t stream) {
  int threads_per_row = 1;
  while (threads_per_row < kThreads && threads_per_row * kWidth < p.head_dim) threads_per_row *= 2;
  const int64_t grid = ceil_div<int64_t>(p.num_rows, kThreads / threads_per_row);
  launch_grid("merge_kernel", merge_kernel<Element, Out, kWidth>, grid, kThreads, stream, p,
              threads_per_row);
}

template <class Element, class Out = Element>
void launch_widest(const MergeParams& p, cudaStream_t stream) {
  if (is_vectorizable<Element>(p)) return launch<Element, Out, 16 / sizeof(Element)>(p, stream);
  launch<Element, Out, 1>(p, stream);
}

void launch_float32(const MergeParams& p, cudaStream_t stream) {
  switch (p.out_type) {
    case ElementType::kFloat32:
      return launch_widest<float>(p, stream);
    case ElementType::kFloat16:
      return launch_widest<float, __half>(p, stream);
    case ElementType::kBFloat16:
      return launch_widest<float, __nv_bfloat16>(p, stream);
  }
}

template <class Element, class Out = Element>
void load_kernels() {
  load_kernel(merge_kernel<Element, Out, 16 / sizeof(Element)>);
  load_kernel(merge_kernel<Element, Out, 1>);
}

}  // namespace

void launch_merge(const MergeParams& params, cudaStream_t stream) {
  switch (params.element_type) {
    case ElementType::kFloat32:
      return launch_float32(params, stream);
    case ElementType::kFloat16:
      return launch_widest<__half>(params, stream);
    case ElementType::kBFloat16:
      return launch_widest<__nv_bfloat16>(params, stream);
  }
}

void warm_up_merge() {
  load_kernels<float>();
  load_kernels<__half>();
  load_kernels<__nv_bfloat16>();
  load_kernels<float, __half>();
  load_kernels<float, __nv_bfloat16>();
}

}  // namespace leanattn
