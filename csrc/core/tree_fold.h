// The fixed tree in which a batch-invariant decode merges an item's tiles. Its leaves are the tiles of
// the sequence, by their own number; a node (level, index) is the merge of its two children, and a
// child without a tile of the item is left out. So the shape follows from the tiles that the item has,
// and neither from who computed which nor from the sequences around it.
//
//   level 2              .---------(2,0)---------.               tiles 1..4 of an item:
//   level 1         .--(1,0)--.             .--(1,1)--.          ((t1) + (t2 + t3)) + t4
//   level 0      (0,0)      (0,1)        (0,2)      (0,3) ...
//
// A unit that has some of an item's tiles folds them up as far as its own tiles reach and leaves the
// nodes that it could not merge: at most two a level, one at either end. Pure integer functions, host
// and device; the states are the caller's.
#pragma once

#include "schedule.h"

namespace leanattn {

struct TreeNode {
  int level;
  int index;

  // The tiles that it covers.
  LEANATTN_HD int64_t begin() const { return int64_t{index} << level; }
  LEANATTN_HD int64_t end() const { return int64_t{index + 1} << level; }
  LEANATTN_HD TreeNode parent() const { return {level + 1, index >> 1}; }
  LEANATTN_HD bool covers(TileRange tiles) const {
    return begin() <= tiles.begin && end() >= tiles.end;
  }
};

// Nodes that a unit may leave of one item, for items of at most `tiles` tiles that begin anywhere
// below `tiles_end`.
LEANATTN_HD constexpr int max_nodes(int tiles_end) {
  int levels = 1;
  while ((int64_t{1} << (levels - 1)) < tiles_end) ++levels;
  return 2 * levels;
}

// Folds nodes, given in token order, of a unit that has the tiles from `own_begin` on. `Stack` holds
// the states that wait for their right sibling, one a level: load(level) -> State and
// store(level, State). What cannot be merged any further goes to emit(TreeNode, State), in token
// order; the last node of all, where the unit has the whole item, too.
template <class State, class Stack, class Emit>
LEANATTN_HD void fold_node(TileRange item, int own_begin, TreeNode node, State state, Stack& stack,
                           const Emit& emit) {
  LEANATTN_KEEP_ROLLED
  while (!node.covers(item)) {
    if (node.index % 2 != 0) {
      const TreeNode left{node.level, node.index - 1};
      if (left.end() > item.begin) {
        // With a tile of the unit's own, or all tiles before the item's first being nobody's.
        const bool own = left.begin() >= own_begin || own_begin == item.begin;
        if (!own) break;
        State merged = stack.load(node.level);
        const State right[1] = {state};
        merged.merge(right);
        state = merged;
      }
    } else {
      const TreeNode right{node.level, node.index + 1};
      if (right.begin() < item.end) {
        stack.store(node.level, state);
        return;
      }
    }
    node = node.parent();
  }
  emit(node, state);
}

// Emits what still waits on the stack when a unit's tiles end at `own_end`, before the item does.
template <class State, class Stack, class Emit>
LEANATTN_HD void fold_rest(TileRange item, int own_begin, int own_end, Stack& stack,
                           const Emit& emit) {
  if (own_end == item.end) return;
  for (int level = 30; level >= 0; --level) {
    const TreeNode node{level, (own_end >> level) - 1};
    if ((own_end >> level) % 2 == 0) continue;
    const bool own = node.begin() >= own_begin || own_begin == item.begin;
    if (own && node.end() > own_begin) emit(node, stack.load(level));
  }
}

// The nodes that a unit with tiles [begin, end) of an item leaves, one after the other: what fold_node
// and fold_rest emit. `at`: where the last node ended, at first `begin`.
LEANATTN_HD TreeNode next_node(TileRange item, int begin, int end, int64_t at) {
  const int64_t tile = at;
  TreeNode node{0, static_cast<int>(tile)};
  const bool at_start = tile == begin && begin == item.begin;
  LEANATTN_KEEP_ROLLED
  while (!node.covers(item)) {
    const TreeNode parent = node.parent();
    const bool starts_here = parent.begin() == tile || at_start;
    const bool ends_here = parent.end() <= end || end == item.end;
    if (!starts_here || !ends_here) break;
    node = parent;
  }
  return node;
}

}  // namespace leanattn
