#include "merge_cpu.h"

#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace leanattn {
namespace {

template <class Element, class Out>
void merge_row(const MergeParams& p, int row_index) {
  const MergeRow row = find_merge_row(p, row_index);
  const float base = merge_base(p, row);
  float sum = 0.0f;
  std::vector<float> o(p.head_dim, 0.0f);
  for (int i = 0; i < p.num_states; ++i) {
    const float lse = p.lses[row.lses_offset + i * p.lses_state_stride];
    if (saw_nothing(lse)) continue;
    const float weight = merge_weight(lse, base);
    const Element* from =
        static_cast<const Element*>(p.outs) + row.outs_offset + i * p.outs_state_stride;
    sum += weight;
    for (int d = 0; d < p.head_dim; ++d) o[d] += weight * static_cast<float>(from[d]);
  }
  const float factor = inverse_of(sum);
  Out* out = static_cast<Out*>(p.out) + int64_t{row_index} * p.head_dim;
  for (int d = 0; d < p.head_dim; ++d) out[d] = static_cast<Out>(o[d] * factor);
  p.lse[row_index] = merged_lse(base, sum);
}

template <class Element, class Out = Element>
void merge(const MergeParams& p, const ParallelFor& parallel_for) {
  parallel_for(p.num_rows, [&](int64_t row) { merge_row<Element, Out>(p, static_cast<int>(row)); });
}

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

void merge_float32(const MergeParams& p, const ParallelFor& parallel_for) {
  switch (p.out_type) {
    case ElementType::kFloat32:
      return merge<float>(p, parallel_for);
    case ElementType::kFloat16:
      return merge<float, Half>(p, parallel_for);
    case ElementType::kBFloat16:
      return merge<float, BFloat16>(p, parallel_for);
  }
}

}  // namespace

void merge_cpu(const MergeParams& params, const ParallelFor& parallel_for) {
  switch (params.element_type) {
    case ElementType::kFloat32:
      return merge_float32(params, parallel_for);
    case ElementType::kFloat16:
      return merge<Half>(params, parallel_for);
    case ElementType::kBFloat16:
      return merge<BFloat16>(params, parallel_for);
  }
}

}  // namespace leanattn
