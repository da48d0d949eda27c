// From tensors to MergeParams: checks, allocates, and hands over to the CPU implementation or to
// the launcher.
#include "merge.h"

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/merge_cpu.h"
#include "new_tensor.h"
#include "tensor_params.h"
#include "torch_parallel_for.h"
#ifdef LEANATTN_WITH_CUDA
#include "cuda/device_guard.h"
#include "cuda/merge.h"
#include "cuda_stream.h"
#endif

namespace leanattn {
namespace {

void check_arguments(const Checker& check, const Tensor& outs, const Tensor& lses) {
  check.supported_device(outs, "outs");
  check.same_device(lses, "lses", outs, "outs");
  const ScalarType type = outs.scalar_type();
  check.require(
      type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float, "outs",
      "must be float16, bfloat16 or float32, got ", name_of(type));
  check.dtype(lses, "lses", ScalarType::Float);
  check.require(outs.dim() >= 2, "outs", "must be [n, ..., head_dim], got shape ", shape_of(outs));
  const std::vector<int64_t> wanted(outs.sizes().begin(), outs.sizes().end() - 1);
  check.require(std::equal(wanted.begin(), wanted.end(), lses.sizes().begin(), lses.sizes().end()),
                "lses", "must have shape [n, ...] like outs' = ", list_of(wanted), ", got ",
                shape_of(lses));
  check.require(outs.size(outs.dim() - 1) >= 1, "outs", "must have a head dim of at least 1, got ",
                "shape ", shape_of(outs));
  int64_t rows = 1;
  for (int64_t dim = 1; dim < outs.dim() - 1; ++dim) rows *= outs.size(dim);
  check.require(rows <= kMaxInt && outs.size(0) <= kMaxInt && outs.size(outs.dim() - 1) <= kMaxInt,
                "outs", "must have fewer than 2^31 states, rows and dims, got shape ",
                shape_of(outs));
}

// The dtype of the merged out.
ScalarType check_dtype(const Checker& check, ScalarType type, std::optional<ScalarType> dtype) {
  if (!dtype || *dtype == type) return type;
  check.require(
      type == ScalarType::Float && (*dtype == ScalarType::Half || *dtype == ScalarType::BFloat16),
      "dtype", "must be outs', ", toString(type), ", or Half or BFloat16 with Float outs, got ",
      toString(*dtype));
  return *dtype;
}

// Fills in the row dimensions; false where there are too many of them.
bool set_rows(const Tensor& outs, const Tensor& lses, MergeParams& p) {
  p.num_rows = 1;
  p.num_dims = 0;
  int64_t sizes[kMaxMergeDims];
  for (int64_t dim = 1; dim < outs.dim() - 1; ++dim) {
    const int64_t size = outs.size(dim);
    p.num_rows *= static_cast<int>(size);
    if (size == 1) continue;
    const int last = p.num_dims - 1;
    const bool joins = p.num_dims > 0 && p.outs_strides[last] == size * outs.stride(dim) &&
                       p.lses_strides[last] == size * lses.stride(dim);
    if (!joins && p.num_dims == kMaxMergeDims) return false;
    const int at = joins ? last : p.num_dims++;
    sizes[at] = joins ? sizes[at] * size : size;
    p.outs_strides[at] = outs.stride(dim);
    p.lses_strides[at] = lses.stride(dim);
  }
  for (int dim = 0; dim < p.num_dims; ++dim)
    p.sizes[dim] = FastDivisor(static_cast<int>(sizes[dim]));
  return true;
}

void run(Tensor outs, Tensor lses, const Tensor& out, const Tensor& lse) {
  MergeParams p{};
  const int64_t last = outs.dim() - 1;
  if ((outs.stride(last) != 1 && outs.size(last) > 1) || !set_rows(outs, lses, p)) {
    outs = torch::stable::contiguous(outs);
    lses = torch::stable::contiguous(lses);
    set_rows(outs, lses, p);
  }
  p.element_type = element_type_of(outs);
  p.out_type = element_type_of(out);
  p.num_states = static_cast<int>(outs.size(0));
  p.head_dim = static_cast<int>(outs.size(last));
  p.outs = outs.const_data_ptr();
  p.outs_state_stride = outs.stride(0);
  p.lses = static_cast<const float*>(lses.const_data_ptr());
  p.lses_state_stride = lses.stride(0);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (outs.is_cpu()) {
    const int64_t row_work = int64_t{p.num_states + 1} * p.head_dim;
    return merge_cpu(p, torch_parallel_for(std::max<int64_t>(1, 32768 / row_work)));
  }
#ifdef LEANATTN_WITH_CUDA
  const int device = outs.get_device_index();
  const DeviceGuard guard(device);
  launch_merge(p, current_cuda_stream(device));
#endif
}

}  // namespace

std::tuple<Tensor, Tensor> merge_states(Tensor outs, Tensor lses, std::optional<ScalarType> dtype) {
  const Checker check("merge_states");
  check_arguments(check, outs, lses);
  const ScalarType out_type = check_dtype(check, outs.scalar_type(), dtype);
  const std::vector<int64_t> shape(outs.sizes().begin() + 1, outs.sizes().end());
  const std::vector<int64_t> rows(shape.begin(), shape.end() - 1);
  const Tensor out = empty_beside(outs, shape, out_type);
  const Tensor lse = empty_beside(outs, rows, ScalarType::Float);
  if (lse.numel() > 0) run(outs, lses, out, lse);
  return {out, lse};
}

}  // namespace leanattn
