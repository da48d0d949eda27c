// LEANATTN_CHECK=1: lengths, offsets and page ids that the ops would clamp raise instead. For
// finding bugs in a caller; on CUDA it costs copies and syncs, so it is off by default and ignored
// during graph capture.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "check.h"
#include "core/append_params.h"

namespace leanattn {

bool value_checks_wanted();

// Brings n values, `stride` apart, to the host.
using ReadValues =
    std::function<std::vector<int32_t>(const int32_t* values, int64_t stride, int n)>;

// Where they are there.
std::vector<int32_t> read_from_host(const int32_t* values, int64_t stride, int n);

// Of a decode. `append`: whose new tokens it sees, or null; the lengths are those before it then, and it
// has been checked.
void check_decode_values(const Checker& check, const DecodeParams& params,
                         std::optional<int64_t> max_seqlen_q, const AppendParams* append,
                         const ReadValues& read);

}  // namespace leanattn
