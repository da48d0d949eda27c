// Tensors become the POD that the other layers know: pointers, sizes and strides of a decode call.
#pragma once

#include "core/params.h"
#include "decode_check.h"

namespace leanattn {

// All but what plan_decode sets and where the workspace is. The arguments have been checked.
DecodeParams make_params(const DecodeArguments& a, const Tensor& out, const OptionalTensor& lse);

}  // namespace leanattn
