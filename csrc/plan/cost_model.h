// Which layout a launch uses: whole items, one item a team or a cluster, or stream-K. All that the
// choice rests on is here, each constant with where it comes from; `python -m bench.tune` compares the
// choice with every other one, and what it printed for 119 shapes on an H200 is what the constants of v12
// of bench/VERSIONS.md were fitted to, all together.
//
// Host only, no CUDA. Times in us, as differences between layouts: what all pay is left out.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/schedule.h"

namespace leanattn {

struct Machine {
  int num_sms;
  double bytes_per_us;  // of its memory
  // Clusters of [size] CTAs that run at once; 0 where there are none.
  std::array<int, kMaxClusterSize + 1> max_clusters;
};

// What the fixups of one item cost after its last tile. What no layout avoids is left out, and so a
// cluster's is next to nothing.
constexpr double kStreamKFixupUs = 5.5;    // partials, ticket, merge, and a second segment's start
constexpr double kTeamFixupUs = 5.0;       // partials, ticket, merge
constexpr double kClusterFixupUs = 0.1;    // a cluster barrier, and distributed shared memory
constexpr double kMergeBytesPerUs = 20e3;  // of partials, by one CTA
constexpr double kStreamKSlower = 1.01;    // to read
// Units do not end together, the less so the more each reads.
constexpr double kUnevenBytesPerUs = 1e6;
// Of one unit, times the rows of an item: with many, its products and the softmax hold it back. By items
// of 64 and 71 rows.
constexpr double kRowBytesPerUs = 2.6e6;

// The items of a launch, taken to be alike.
struct Items {
  int count;
  int tiles;          // of each
  int rows;           // of each, padded
  double tile_bytes;  // of K and V together
  double partial_bytes;
};

// Bytes a us that n units read.
inline double speed_of(int n, const Items& items, const Machine& machine) {
  // Part of all SMs, and of the memory's speed.
  constexpr double kPoints[][2] = {{0.00, 0.000}, {0.24, 0.712}, {0.30, 0.880}, {0.364, 0.965},
                                   {0.48, 0.975}, {0.85, 0.985}, {0.97, 1.000}};
  const double part = static_cast<double>(n) / machine.num_sms;
  double speed = 1.0;
  for (int i = 1; i < 7; ++i) {
    if (part > kPoints[i][0]) continue;
    const double along = (part - kPoints[i - 1][0]) / (kPoints[i][0] - kPoints[i - 1][0]);
    speed = kPoints[i - 1][1] + along * (kPoints[i][1] - kPoints[i - 1][1]);
    break;
  }
  return std::min(speed * machine.bytes_per_us, n * kRowBytesPerUs / items.rows);
}

// What part of that speed rows of 128 bytes reach where other heads' lie between them: [B, S, H, 64] was
// read at 4.30 TB/s, [B, S, H, 128] at 4.50, by a prototype that only reads, 1-8 GiB, on an H200.
constexpr double kShortRowSpeed = 4.30 / 4.50;

// `more` units read `larger` tiles each and `others` read `smaller`: together until those are done.
inline double read_us(const Items& items, const Machine& machine, int more, int64_t larger,
                      int others, int64_t smaller) {
  double us = (more > 0 ? larger : smaller) * items.tile_bytes / kUnevenBytesPerUs;
  const auto add = [&](int units, int64_t tiles) {
    if (units > 0) us += units * tiles * items.tile_bytes / speed_of(units, items, machine);
  };
  add(more + others, smaller);
  add(more, larger - smaller);
  return us;
}

struct LayoutChoice {
  Layout layout;
  bool is_clustered;
  double us;
};

// num_units: 0 for all SMs.
inline LayoutChoice stream_k(const Items& items, const Machine& machine, int num_units = 0) {
  if (num_units == 0) num_units = machine.num_sms;
  const int64_t tiles = int64_t{items.count} * items.tiles;
  const int units = static_cast<int>(std::clamp<int64_t>(tiles, 1, num_units));
  const int64_t small = tiles / units;
  const int more = static_cast<int>(tiles % units);
  double us = read_us(items, machine, more, small + 1, units - more, small);
  const bool cuts = small > 0 && (more > 0 || small % std::max(items.tiles, 1) != 0);
  if (cuts) {
    const double partials = std::ceil(static_cast<double>(items.tiles) / small) + 1;
    us = us * kStreamKSlower + kStreamKFixupUs + partials * items.partial_bytes / kMergeBytesPerUs;
  }
  return {{units, 0, 1, 1, 0, 0, 1}, false, us};
}

// Items that a unit takes before it is better for all units to be at neighbouring ones. By a kernel that
// only reads, [B, S, 8, 128], on an H200: 8 a unit, 1024 tokens, took 125.5 us one after the other and 121.0
// by steps; 2 of 2048 tokens 61.6 and 61.6, 2 of 8192 tokens 236.6 and 238.7.
constexpr int kManyItems = 4;

// What a fixup costs in teams, but for the merge of the partials.
inline double fixup_us(const Layout& layout, bool clustered) {
  if (layout.team_size == 1) return 0.0;
  return clustered ? kClusterFixupUs : kTeamFixupUs;
}

// Teams of `size` units; with 1, each takes as few whole items as all SMs together can.
inline LayoutChoice teams(const Items& items, const Machine& machine, int size, bool clustered) {
  const int per_team = size == 1 ? ceil_div(std::max(items.count, 1), machine.num_sms) : 1;
  const int num_teams = ceil_div(std::max(items.count, 1), per_team);
  const int step = per_team < kManyItems ? 1 : num_teams;
  LayoutChoice choice{
      {num_teams * size, per_team, step, size, num_teams, 0, num_teams}, clustered, 0.0};
  if (size == 1) {
    const int full = num_teams - (items.count % per_team != 0);
    const int64_t tiles = items.tiles;
    choice.us = read_us(items, machine, full, per_team * tiles, num_teams - full,
                        items.count % per_team * tiles);
    return choice;
  }
  const int more = items.tiles % size;
  choice.us = read_us(items, machine, more * num_teams, items.tiles / size + 1,
                      (size - more) * num_teams, items.tiles / size);
  choice.us += fixup_us(choice.layout, clustered) +
               (clustered ? 1 : size) * items.partial_bytes / kMergeBytesPerUs;
  return choice;
}

// Clusters of even sizes alone: of 126 shapes on an H200, an odd one was ahead of all other layouts by 1 to
// 2% in three, and mostly behind the even sizes beside it, by up to 78%.
inline bool fits(const Items& items, const Machine& machine, int size, bool clustered) {
  if (size == 1) return !clustered;
  if (size > items.tiles) return false;
  return clustered
             ? size % 2 == 0 && size <= kMaxClusterSize && items.count <= machine.max_clusters[size]
             : int64_t{items.count} * size <= machine.num_sms;
}

inline LayoutChoice choose_layout(const Items& items, const Machine& machine) {
  LayoutChoice best = teams(items, machine, 1, false);
  const auto consider = [&](const LayoutChoice& choice) {
    if (choice.us < best.us) best = choice;
  };
  for (int size = 2; size <= kMaxClusterSize; ++size) {
    if (fits(items, machine, size, true)) consider(teams(items, machine, size, true));
  }
  // Without clusters: all SMs, or fewer where merging so many partials would take longer.
  const int most = std::min(items.tiles, machine.num_sms / std::max(items.count, 1));
  for (int size = most; size > 1; size /= 2) consider(teams(items, machine, size, false));
  consider(stream_k(items, machine));
  const double tile_us = items.tile_bytes * machine.num_sms / machine.bytes_per_us;
  best.layout.slack_tiles =
      static_cast<int>((kStreamKFixupUs - fixup_us(best.layout, best.is_clustered)) / tile_us);
  return best;
}

}  // namespace leanattn
