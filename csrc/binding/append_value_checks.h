// LEANATTN_CHECK=1 for the append ops: lengths, offsets and page ids that would be clamped, and new
// tokens that would not be written, raise instead. See value_checks.h.
#pragma once

#include <functional>
#include <vector>

#include "check.h"
#include "core/append_params.h"

namespace leanattn {

// Brings n values, `stride` apart, to the host.
using ReadValues =
    std::function<std::vector<int32_t>(const int32_t* values, int64_t stride, int n)>;

void check_append_values(const Checker& check, const AppendParams& params, const ReadValues& read);

}  // namespace leanattn
