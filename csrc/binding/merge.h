// Merging partial attention results: what is behind the schema in ops.cpp.
#pragma once

#include <optional>
#include <tuple>

#include "check.h"

namespace leanattn {

// outs [n, ..., D] and lses [n, ...] -> out [..., D], lse [...].
std::tuple<Tensor, Tensor> merge_states(Tensor outs, Tensor lses, std::optional<ScalarType> dtype);

}  // namespace leanattn
