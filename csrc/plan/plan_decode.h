// How a decode is laid out: rows of an item, pairs of heads, and which units take what. All that the
// host can decide, from shapes alone: the lengths are on the device, which does the rest (schedule.h).
//
// LEANATTN_LAYOUT, LEANATTN_NUM_UNITS and LEANATTN_HEAD_PAIRS force it, for tests and tuning.
#pragma once

#include "core/params.h"
#include "device.h"

namespace leanattn {

// Both set rows_per_item, row_blocks and the layout of params, which are otherwise whole. They throw
// PlanError for what cannot be laid out, and for a knob that holds what it must not.

// On a GPU; pairs of heads too, and the line of a launch whose sequences are alike.
void plan_decode(DecodeParams& params, const Device& device);

// On the CPU, whose units are turns of `num_threads` threads.
void plan_decode_on_cpu(DecodeParams& params, int num_threads);

}  // namespace leanattn
