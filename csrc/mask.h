// Which keys a query sees. Every mask of the library (length, causal, sliding window) leaves each
// query one contiguous range of keys, so a mask is a function from a position to a range. Nothing
// here knows of tiles, heads or memory.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace leanattn {

// Keys [begin, end); empty if begin == end.
struct KeyRange {
  int begin;
  int end;

  LEANATTN_HD bool empty() const { return begin == end; }
  LEANATTN_HD bool contains(int key) const { return begin <= key && key < end; }
};

// How far a query sees to either side of its own position; -1 is no limit. A causal mask is
// window_right == 0.
struct Mask {
  int window_left;
  int window_right;
};

// The keys that the query at `position` sees in a sequence of `length` tokens. The position is
// negative where a sequence has more queries than tokens; such a query may see nothing.
LEANATTN_HD KeyRange visible_keys(const Mask& mask, int length, int position) {
  // 64-bit: position + window may pass INT32_MAX.
  int64_t begin = 0;
  int64_t end = length;
  if (mask.window_left >= 0) begin = max_of<int64_t>(begin, int64_t{position} - mask.window_left);
  if (mask.window_right >= 0) {
    end = min_of<int64_t>(end, int64_t{position} + 1 + mask.window_right);
  }
  return {static_cast<int>(begin), static_cast<int>(max_of(begin, end))};
}

}  // namespace leanattn
