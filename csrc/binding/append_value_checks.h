// LEANATTN_CHECK=1 for the append ops: lengths, offsets and page ids that would be clamped, and new
// tokens that would not be written, raise instead. See value_checks.h.
#pragma once

#include "check.h"
#include "core/append_params.h"
#include "value_checks.h"

namespace leanattn {

void check_append_values(const Checker& check, const AppendParams& params, const ReadValues& read);

}  // namespace leanattn
