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

// Windows of any size from -1 on: one that reaches past every int is none.
inline Mask make_mask(bool causal, int64_t window_left, int64_t window_right) {
  const auto window = [](int64_t size) { return size > INT32_MAX ? -1 : static_cast<int>(size); };
  return {window(window_left), causal ? 0 : window(window_right)};
}

// The keys that the query at `position` sees in a sequence of `length` tokens. The position is
// negative where a sequence has more queries than tokens; such a query may see nothing.
LEANATTN_HD KeyRange visible_keys(const Mask& mask, int length, int position) {
  // Written so that position + window, which may pass INT32_MAX, is never computed.
  const bool all_before = mask.window_left < 0 || position <= mask.window_left;
  const bool all_after = mask.window_right < 0 || length - 1 - position <= mask.window_right;
  const int begin = all_before ? 0 : position - mask.window_left;
  const int end = all_after ? length : position + 1 + mask.window_right;
  return {begin, max_of(begin, end)};
}

// The same for a sequence's last query, which has no key behind it: only a window's left end counts.
LEANATTN_HD KeyRange last_query_keys(const Mask& mask, int length) {
  const bool all = mask.window_left < 0 || length - 1 <= mask.window_left;
  return {all ? 0 : length - 1 - mask.window_left, length};
}

}  // namespace leanattn
