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
constexpr double kStreamKFixupUs = 5.5;  // partials, ticket, merge, and a second segment's start
constexpr double kTeamFixupUs = 5.0;     // partials, ticket, merge
constexpr double kClusterFixupUs = 0.1;  // a cluster barrier, and distributed shared memory
constexpr double kClustersFixupUs =
    3.0;  // of a team of several: partials of clusters, a ticket a rank
constexpr double kMergeBytesPerUs = 20e3;  // of partials, by one CTA
constexpr double kStreamKSlower = 1.01;    // to read
constexpr double kClustersSlower = 1.04;   // likewise, where a team has several
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
  double copy_bytes_per_us = std::numeric_limits<double>::infinity();  // of one unit, at most

  // What one unit reads, however few there are.
  double unit_bytes_per_us() const;
};

// What one unit gets done of head dims beyond 256, by tiles of 64 tokens of 576: 16 rows, an H200.
constexpr double kWideBytesPerUs = 56e3;

// What one unit copies of pages, in boxes that lie inside one, or row by row where no box of 8 rows does. By
// what pages of 1 to 256 tokens took on an H200, [*, H, 128].
inline double page_bytes_per_us(int page_size, int tile_tokens) {
  const int box_rows = std::min(page_size & -page_size, tile_tokens);
  if (box_rows < 8) return 21.7e3;
  const double box_bytes = box_rows * 128.0;
  return box_bytes / (0.035 + box_bytes / 65e3);
}

inline double Items::unit_bytes_per_us() const {
  return std::min(kRowBytesPerUs / rows, copy_bytes_per_us);
}

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
  return std::min(speed * machine.bytes_per_us, n * items.unit_bytes_per_us());
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
  int cluster_size;  // 1: no clusters
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
  return {{units, 0, 1, 1, 0, 0, 1}, 1, us};
}

// Items that a unit takes before it is better for all units to be at neighbouring ones. By a kernel that
// only reads, [B, S, 8, 128], on an H200: 8 a unit, 1024 tokens, took 125.5 us one after the other and 121.0
// by steps; 2 of 2048 tokens 61.6 and 61.6, 2 of 8192 tokens 236.6 and 238.7.
constexpr int kManyItems = 4;

// What a fixup costs in teams, but for the merge of the partials.
inline double fixup_us(const LayoutChoice& choice) {
  const int team_size = choice.layout.team_size;
  if (team_size == 1) return 0.0;
  if (choice.cluster_size == 1) return kTeamFixupUs;
  return team_size == choice.cluster_size ? kClusterFixupUs : kClustersFixupUs;
}

// Teams of `num_clusters` clusters, or single CTAs where cluster_size is 1; teams of one CTA each take as few
// whole items as all SMs together can.
inline LayoutChoice teams(const Items& items, const Machine& machine, int cluster_size,
                          int num_clusters) {
  const int size = cluster_size * num_clusters;
  const int per_team = size == 1 ? ceil_div(std::max(items.count, 1), machine.num_sms) : 1;
  const int num_teams = ceil_div(std::max(items.count, 1), per_team);
  const int step = per_team < kManyItems ? 1 : num_teams;
  LayoutChoice choice{
      {num_teams * size, per_team, step, size, num_teams, 0, num_teams}, cluster_size, 0.0};
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
  if (cluster_size > 1 && num_clusters > 1) choice.us *= kClustersSlower;
  // The partials of clusters are merged by as many CTAs as a cluster has.
  const double partials = static_cast<double>(num_clusters) / cluster_size;
  choice.us += fixup_us(choice) + partials * items.partial_bytes / kMergeBytesPerUs;
  return choice;
}

// Clusters of even sizes alone: of 126 shapes on an H200, an odd one was ahead of all other layouts by 1 to
// 2% in three, and mostly behind the even sizes beside it, by up to 78%.
inline bool fits(const Items& items, const Machine& machine, int cluster_size, int num_clusters) {
  if (cluster_size * num_clusters > std::max(items.tiles, 1)) return false;
  const int64_t clusters = int64_t{items.count} * num_clusters;
  if (cluster_size == 1) return num_clusters == 1 || clusters <= machine.num_sms;
  return cluster_size % 2 == 0 && cluster_size <= kMaxClusterSize &&
         clusters <= machine.max_clusters[cluster_size];
}

inline LayoutChoice choose_layout(const Items& items, const Machine& machine) {
  LayoutChoice best = teams(items, machine, 1, 1);
  const auto consider = [&](const LayoutChoice& choice) {
    if (choice.us < best.us) best = choice;
  };
  // All that there is room for, or fewer where merging so many partials would take longer.
  const auto consider_teams = [&](int cluster_size, int room) {
    const int most = std::min(items.tiles / cluster_size, room / std::max(items.count, 1));
    for (int count = most; count > 1; count /= 2) {
      if (fits(items, machine, cluster_size, count)) {
        consider(teams(items, machine, cluster_size, count));
      }
    }
  };
  for (int size = 2; size <= kMaxClusterSize; size += 2) {
    if (fits(items, machine, size, 1)) consider(teams(items, machine, size, 1));
  }
  consider_teams(1, machine.num_sms);
  // Several clusters, where one an item would leave more than half of the SMs idle. Where the other half keeps the
  // memory busy, more of them have cost more than they bring: b1 28/4 D128 s131072 took 67.2 us by 8*2 and 67.4
  // by 4*4, and in other runs, whose floor was 1 us higher, 69.6 by 6*5 and 71.6 by 4*7. Of more items two
  // clusters each alone: b8 64/1 D128 s16384 took 36.7 by 8, 40.3 by 2*8.
  const int half = machine.num_sms / 2;
  const bool half_is_enough = half * items.unit_bytes_per_us() >= 0.9 * machine.bytes_per_us;
  if (items.count < half / kMaxClusterSize) {
    for (const int size : {2, 4, 8}) {
      const int room = (half_is_enough ? half : machine.num_sms) / size;
      consider_teams(size, std::min(machine.max_clusters[size], room));
    }
  } else if (!half_is_enough) {
    for (const int size : {2, 4}) {
      if (fits(items, machine, size, 2)) consider(teams(items, machine, size, 2));
    }
  }
  consider(stream_k(items, machine));
  const double tile_us = items.tile_bytes * machine.num_sms / machine.bytes_per_us;
  best.layout.slack_tiles =
      static_cast<int>(std::max(kStreamKFixupUs - fixup_us(best), 0.0) / tile_us);
  return best;
}

}  // namespace leanattn
