// New tensors, by a function of torch's stable C interface: torch::stable::empty looks up its op by name
// and boxes its arguments in every call, which takes longer than the tensor itself.
#pragma once

#include <algorithm>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

namespace leanattn {

// Contiguous, on t's device, its elements as they happen to be.
inline torch::stable::Tensor empty_beside(const torch::stable::Tensor& t,
                                          const std::vector<int64_t>& sizes,
                                          torch::headeronly::ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
      device_index, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace leanattn
