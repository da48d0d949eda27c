// The walk over one unit's share of the line: which segments it does, one after the other. Host and
// device; what a share is, and what a segment, stands in schedule.h.
#pragma once

#include <cstdint>

#include "schedule.h"

namespace leanattn {

// An item, by its number, where all sequences have as many.
struct ItemPlace {
  int seq, head, row_block;
};

template <bool kPlain>
LEANATTN_HD ItemPlace place_of_item(const Problem& p, int item) {
  const int head = kPlain ? item : item / p.row_blocks;  // over all sequences
  const int seq = head / p.num_heads_kv;
  return {seq, head - seq * p.num_heads_kv, kPlain ? 0 : item - head * p.row_blocks};
}

// The sequence of the first item of the unit's team; of any, where it idles.
template <bool kPlain = false, bool kAppends = false>
LEANATTN_HD Sequence load_team_sequence(const Problem& p, const Layout& layout, int unit) {
  const int item = max_of(first_item_at<kPlain>(p, layout, unit / layout.team_size), 0);
  return load_sequence<kPlain, kAppends>(p, place_of_item<kPlain>(p, item).seq, 0);
}

// Walks the segments of one unit, in line order. Its start reads nothing from memory and computes little:
// the first copy of a launch waits for it. kPlain: the problem has plain items;
// kAppends: load_sequence.
template <bool kPlain, bool kAppends = false>
class Walker {
 public:
  // Stream-K: the unit's share of the whole line. `start` is the position of `sequence`, which holds the
  // first tile of the share.
  LEANATTN_HD Walker(const Problem& problem, const Shares& shares, int unit, const Position& start,
                     const Sequence& sequence, const UniformLine& uniform = {})
      : problem_(problem),
        alike_(uniform.one_row_block),
        alike_keys_(uniform.keys),
        alike_item_(uniform.item),
        in_team_(false),
        shares_(shares),
        position_(start) {
    const bool idle = shares.is_idle(unit);
    next_ = idle ? 0 : shares.begin(unit);
    end_ = idle ? 0 : shares.end(unit);
    items_left_ = INT32_MAX;
    item_step_ = 1;
    if (next_ >= end_) return;
    enter_sequence(sequence);
    const int offset = next_ - position_.line;  // within the sequence
    head_ = uniform.one_row_block ? offset / uniform.tiles_per_head : offset / tiles_per_head_;
    item_line_ = position_.line + head_ * tiles_per_head_;
    row_block_ = 0;
    enter_item();
    if constexpr (!kPlain) {
      LEANATTN_KEEP_ROLLED
      while (next_ >= item_line_ + item_.size()) enter_next_row_block();
    }
  }

  // Teams: the unit's part of its team's items. The line starts at the team's first item, which is of
  // `sequence`: load_team_sequence.
  LEANATTN_HD Walker(const Problem& problem, const Layout& layout, int unit,
                     const Sequence& sequence, const UniformLine& uniform = {})
      : problem_(problem),
        alike_(uniform.one_row_block),
        alike_keys_(uniform.keys),
        alike_item_(uniform.item),
        in_team_(true) {
    next_ = 0;
    end_ = 0;
    const int slot = unit / layout.team_size;
    const int first_item = first_item_at<kPlain>(problem, layout, slot);
    if (first_item < 0) return;
    item_step_ = layout.item_step;
    items_left_ = layout.items_per_team;
    const int items_to_end = num_items<kPlain>(problem) - first_item;
    if (item_step_ == 1) {
      items_left_ = min_of(items_left_, items_to_end);
    } else {
      number_ = first_item;
      prepare_next_item(items_to_end);
    }
    const ItemPlace place = place_of_item<kPlain>(problem, first_item);
    row_block_ = place.row_block;
    position_ = {place.seq, 0, 0};
    head_ = place.head;
    sequence_ = sequence;
    item_line_ = 0;
    enter_item();
    if (layout.team_size == 1) {
      end_ = INT32_MAX;  // items_left_ tells when the share is done
      return;
    }
    shares_ = make_shares(item_.size(), layout.team_size, slot * layout.team_size);
    if (shares_.is_idle(unit)) return;
    next_ = shares_.begin(unit);
    end_ = shares_.end(unit);
  }

  // Fills in the next segment; false when the share is done.
  LEANATTN_HD bool next(Segment& segment) {
    if (next_ >= end_) return false;
    LEANATTN_KEEP_ROLLED
    while (next_ == item_line_ + item_.size()) {
      if (--items_left_ == 0) {
        end_ = next_;  // from now on every call says so
        return false;
      }
      enter_next_item();
    }
    segment.seq = position_.seq;
    segment.head = head_;
    segment.row_block = row_block_;
    segment.sequence = sequence_;
    segment.keys = keys_;
    segment.item = item_;
    segment.item_line = item_line_;
    segment.tile_begin = item_.begin + (next_ - item_line_);
    const int tiles = min_of(item_.end - segment.tile_begin, end_ - next_);
    segment.tile_end = segment.tile_begin + tiles;
    next_ += tiles;
    return true;
  }

  LEANATTN_HD bool in_team() const { return in_team_; }

  // For the segments that do not hold their whole item.
  LEANATTN_HD const Shares& shares() const { return shares_; }

 private:
  // Asks for the sequence of the item after this one, long before it is needed: on the way there are all
  // the copies in flight.
  LEANATTN_HD void prepare_next_item(int items_to_end) {
    if (item_step_ >= items_to_end) {
      items_left_ = 1;  // this one
      return;
    }
    number_ += item_step_;
    prepared_ =
        load_sequence<kPlain, kAppends>(problem_, place_of_item<kPlain>(problem_, number_).seq, 0);
  }

  LEANATTN_HD void enter_prepared_item() {
    item_line_ += item_.size();
    const ItemPlace place = place_of_item<kPlain>(problem_, number_);
    row_block_ = place.row_block;
    position_ = {place.seq, 0, 0};
    head_ = place.head;
    sequence_ = prepared_;
    enter_item();
    if (items_left_ > 1) prepare_next_item(num_items<kPlain>(problem_) - number_);
  }

  // It may have no tile.
  LEANATTN_HD void enter_next_item() {
    if (item_step_ != 1) return enter_prepared_item();
    if (row_block_ + 1 < num_row_blocks<kPlain>(problem_, sequence_)) return enter_next_row_block();
    item_line_ += item_.size();
    row_block_ = 0;
    if (++head_ == problem_.num_heads_kv) {
      head_ = 0;
      // Stream-K has no tiles in sequences without any; a team counts their items.
      do {
        enter_next_sequence();
      } while (!in_team_ && tiles_per_head_ == 0);
    }
    enter_item();
  }

  LEANATTN_HD void enter_next_row_block() {
    item_line_ += item_.size();
    ++row_block_;
    enter_item();
  }

  LEANATTN_HD void enter_item() {
    if (!kPlain && alike_) {
      keys_ = alike_keys_;
      item_ = alike_item_;
      return;
    }
    keys_ = item_keys<kPlain>(problem_, sequence_, row_block_);
    item_ = item_tiles(problem_, keys_.any);
  }

  LEANATTN_HD void enter_next_sequence() {
    position_ = {position_.seq + 1, next_query_begin<kPlain>(problem_, sequence_), sequence_end()};
    enter_sequence(load_sequence<kPlain, kAppends>(problem_, position_.seq, position_.query_begin));
  }

  LEANATTN_HD void enter_sequence(const Sequence& sequence) {
    sequence_ = sequence;
    if (in_team_) return;
    tiles_per_head_ =
        !kPlain && alike_ ? alike_item_.size() : tiles_per_head<kPlain>(problem_, sequence_);
  }

  LEANATTN_HD int sequence_end() const {
    return position_.line + problem_.num_heads_kv * tiles_per_head_;
  }

  // Copies: through pointers a kernel would fetch its own parameters from memory, instead of having them
  // as constants.
  Problem problem_;
  bool alike_;  // all items are, and so:
  ItemKeys alike_keys_;
  TileRange alike_item_;
  bool in_team_;
  Shares shares_;
  Position position_;  // of the sequence, and what it is:
  Sequence sequence_;
  int tiles_per_head_ = 0;  // for stream-K
  int head_;                // of the item, and what it is:
  int row_block_;
  ItemKeys keys_;
  TileRange item_;
  int item_line_;
  int items_left_;  // this one included
  int item_step_;
  int number_;  // where that is not 1: of the next item, and its sequence
  Sequence prepared_;
  int next_;  // on the line
  int end_;
};

using SegmentWalker = Walker<false>;

}  // namespace leanattn
