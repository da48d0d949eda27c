// The compile-time side of the kernel: what one CTA looks like, and its shared memory.
//
// A CTA has eight consumer warps, a producer warp and helper warps. The producer walks the unit's share:
// it keeps a ring of stages filled, each with one tile of K or of V, in turn, tells the consumers which
// segments the tiles are of, and brings the segments' q rows. The consumers split a tile's TOKENS into
// slices, each with a softmax state of its own for all query rows. The first helper fills the rows that see
// no key; and where copies are by cp.async, every 16 bytes an instruction, producer and helpers copy equal
// parts of each tile.
//
// The products run in one of two ways.
//
// By mma, for few rows, and on any GPU for up to 64. A slice is a warp's; only where its registers
// cannot hold all rows or all of Dv (64 accumulators a lane) do warps share one. Both products are
// computed transposed, keys and values as the 16-row operand of the mma and the query rows as its 8
// columns:  S^T = K Q^T  and  O^T = V^T P^T.  Few rows waste less of 8 columns than of 16 rows.
//
// By wgmma, for 17 rows and more, where there is one. Four warps multiply 64 query rows by a slice that
// wgmma reads straight from the ring:  S = Q K^T  and  O = P V.  With two halves of Dv, for the same
// reason, or with 128 rows, the two warpgroups take the same slice.
//
// A wide head with few rows has the best of both: keys and values are wgmma's 64 rows, and the query rows
// its columns (mainloop_keys.h). A slice is every other tile.
//
// Wide heads, D to 576 and Dv to 512, are those of multi-head latent attention: one KV head, whose values
// are its keys' first columns, so that one stage is both. By mma the four warps of a slice share out D,
// too, and add up each other's products (depth_split.h). By wgmma the two warpgroups share out a tile's scores
// and Dv (mainloop_wide_rows.h), and O fills their registers so well that they take some of the other warps'.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/append_params.h"
#include "core/head_pairs.h"
#include "core/host_device.h"

namespace leanattn {

// Where a unit is: in a team, or at a place of the line from which it takes a share of its own.
struct Place {
  bool in_teams;
  Shares shares;      // of the line
  Position start;     // of the sequence in which the share begins, and what it is:
  Sequence sequence;  // in a team, that of its first item
};

// How a launch divides the shared memory behind SharedStorage.
struct RoomPlan {
  int num_stages;   // of the ring
  int fold_levels;  // of waiting states, behind the ring; for Kind::kTree
};

// The CTA's hardware barriers; 0 is __syncthreads.
constexpr int kConsumerBarrier = 1;  // among the consumer warps
constexpr int kSetupBarrier = 2;     // the consumers wait for the producer's set-up
constexpr int kHelperBarrier = 3;    // the helpers do, where they copy
constexpr int kSliceBarrier = 4;     // and more: among the warps that share a slice

enum class Kind {
  kMma,    // products by mma
  kTree,   // the same, and tiles merged in a fixed tree, for batch_invariant: up to kFoldRows rows
  kWgmma,  // products by wgmma, query rows its 64 rows
  kWgmmaKeys,  // the same, keys and values its 64 rows: of wide heads
};

// A number of a float8 cache, whose format DecodeParams::cache_type says.
struct Float8 {
  uint8_t bits;
};

// A 16-bit floating-point number of q, out and the caches, whose format DecodeParams::element_type says.
// One kernel is for both formats: all but the products is the same code.
struct Float16 {
  uint16_t bits;
};

// What a kernel can do. What it cannot is not compiled into it, so that a launch fetches none of its
// code: in a model every launch finds its code cold, and half of a small decode's time went there.
struct AllFeatures {
  static constexpr bool kPlainItems = false;    // no others: schedule.h
  static constexpr bool kScaledScores = false;  // no softcap, no ALiBi
  static constexpr bool kFloat32Out = true;     // beside an out of q's dtype
  static constexpr bool kShards = true;  // caches that have a rank's part of the tokens: shard.h
  static constexpr bool kFixedLoader = false;  // the architecture's fastest, and no other
  static constexpr bool kAppends = false;      // nor new rows, nor RoPE: new_row.h
  // Of those that differ by a run-time parameter, here none is left out:
  static constexpr bool kPaged = true, kContiguous = true;  // caches
  static constexpr bool kFloat16 = true, kBFloat16 = true;  // q and out
  static constexpr bool kE5M2 = true;                       // float8 caches, beside e4m3
};

// The plain decode that servers call all the time.
template <bool kIsBFloat16, bool kIsPaged>
struct LeanFeatures {
  static constexpr bool kPlainItems = true;
  static constexpr bool kScaledScores = true;
  static constexpr bool kFloat32Out = false;
  static constexpr bool kShards = false;
  static constexpr bool kFixedLoader = true;
  static constexpr bool kAppends = false;
  static constexpr bool kPaged = kIsPaged, kContiguous = !kIsPaged;
  static constexpr bool kFloat16 = !kIsBFloat16, kBFloat16 = kIsBFloat16;
  static constexpr bool kE5M2 = false;
};

// The same for all items and all scores, in the dtype that most models have.
template <bool kIsPaged>
struct MaskedFeatures : LeanFeatures<true, kIsPaged> {
  static constexpr bool kPlainItems = false;
  static constexpr bool kScaledScores = false;
};

// The same with one new token a sequence, which it appends on the way.
template <bool kIsBFloat16, bool kIsPaged>
struct AppendFeatures : LeanFeatures<kIsBFloat16, kIsPaged> {
  static constexpr bool kAppends = true;
};

template <int kHeadDim_, int kRows_, Kind kKind, class CacheElement_ = Float16,
          class Features_ = AllFeatures>
struct DecodeTraits {
  using Features = Features_;
  static constexpr bool kPlainItems = Features::kPlainItems;
  static constexpr bool kAppends = Features::kAppends;
  using Params = std::conditional_t<kAppends, AppendDecodeParams, DecodeParams>;
  using CacheElement = CacheElement_;  // of K and V in memory: Float16 or Float8
  static constexpr bool kFloat8 = std::is_same_v<CacheElement, Float8>;
  static constexpr int kHeadDim = kHeadDim_;                     // D, padded: 64, 128, 256 or 576
  static constexpr int kHeadDimV = padded_head_dim_v(kHeadDim);  // Dv, padded: the same, or 512
  static constexpr bool kWide = kHeadDim > 256;
  static constexpr int kRows = kRows_;  // packed query rows, padded: 8..64, or 128 by wgmma
  static constexpr bool kKeysAsRows = kKind == Kind::kWgmmaKeys;
  static constexpr bool kWgmma = kKind == Kind::kWgmma || kKeysAsRows;
  static_assert(!kFloat8 || !kWgmma, "wgmma reads the caches as they are");
  static_assert(!kKeysAsRows || (kWide && kRows <= 32),
                "O^T of more rows has no room in registers");
  static constexpr bool kTree = kKind == Kind::kTree;
  static_assert(!kTree || kRows <= kFoldRows, "batch-invariant items have few rows");
  static constexpr int kTileLog2 =
      kWide && kWgmma ? kWideTileTokensLog2 : tile_tokens_log2_for(kHeadDim);
  static constexpr int kTile = 1 << kTileLog2;  // tokens

  static constexpr int kConsumerWarps = 8;
  static constexpr int kConsumerThreads = kConsumerWarps * 32;
  static constexpr int kProducerWarp = kConsumerWarps;
  static constexpr int kHelperWarp = kConsumerWarps + 1;  // the first
  // Registers are handed over by whole warpgroups.
  static constexpr bool kMovesRegisters = kWgmma && kWide && kRows > 16;
  // Who copy by cp.async, the producer among them. Registers are given to four warps at a time, so that two
  // more cost the others none; a kernel that has TMA for whatever is common does without.
  static constexpr int kCopyWarps = Features::kFixedLoader && !kMovesRegisters ? 2 : 4;
  static constexpr int kThreads = kConsumerThreads + kCopyWarps * 32;
  // 2 * 216 + 72 = 3 * 168, which 12 warps are given.
  static constexpr int kConsumerRegisters = 216;
  static constexpr int kProducerRegisters = 72;

  // A warp's part of the [tokens, rows, Dv] space. wgmma has 16 of 64 rows for each of its warps,
  // though there may be fewer.
  static constexpr int kWarpDim =
      kKeysAsRows ? kHeadDimV : min_of(kHeadDimV, kMovesRegisters ? 256 : 128);
  static constexpr int kWarpRows = kKeysAsRows ? kRows
                                   : kWgmma    ? 16
                                               : min_of(kRows, 2048 / kWarpDim);
  static constexpr int kRowGroups =
      (kWgmma && !kKeysAsRows ? max_of(kRows, 64) : kRows) / kWarpRows;
  static constexpr int kDimGroups = kHeadDimV / kWarpDim;
  static constexpr int kSlices = kKeysAsRows ? 2 : kConsumerWarps / (kRowGroups * kDimGroups);
  static constexpr int kSliceTokens = kKeysAsRows ? kTile : kTile / kSlices;
  static constexpr int kSliceThreads = kConsumerThreads / kSlices;

  // In mma.m16n8k16 steps.
  static constexpr int kTokenSteps = kSliceTokens / 16;
  static constexpr int kRowSteps = kWarpRows / 8;
  static constexpr int kDimSteps = kWarpDim / 16;
  static constexpr int kDepthSteps = kHeadDim / 16;
  static_assert(kTokenSteps >= 1, "a warp's slice holds at least one 16-token step");
  static_assert(!kAppends || kSlices == kConsumerWarps, "a new row is for one warp to lay");

  // Of mma: whether the warps of a slice share out D. A warp's part is whole pairs of depth steps, and
  // may have one pair less than this.
  static constexpr bool kSplitsDepth = kWide && !kWgmma;
  static constexpr int kDepthParts = kSplitsDepth ? kDimGroups : 1;
  static constexpr int kWarpDepthSteps = ceil_div(kDepthSteps / 2, kDepthParts) * 2;

  // wgmma reads 64 rows, though nobody reads what comes of those beyond kRows.
  static constexpr int kQueryRows = kWgmma && !kKeysAsRows ? max_of(kRows, 64) : kRows;

  // Tokens that wgmma takes at once: their scores share the registers with O.
  static constexpr int kStepTokens = min_of(kTile, 64);
  static constexpr int kSteps = kSliceTokens / kStepTokens;
  static_assert(!kWgmma || kSteps * kStepTokens == kSliceTokens, "a slice is whole steps");

  // Whether two KV heads may be one: head_pairs.h. Their products need a sum each.
  static constexpr bool kHasPairShape = kKind == Kind::kMma && kRows <= kMaxPairRows &&
                                        kHeadDim >= 128 && kHeadDim * sizeof(CacheElement) <= 256;
  static constexpr bool kPairsHeads = kHasPairShape && !Features::kFixedLoader;
  // A single accumulator of q.k would make one long chain of dependent mma. The same with every set of
  // features, as the order of a sum is part of its bits.
  static constexpr int kScoreChains = kHasPairShape || kTokenSteps * kRowSteps == 1 ? 2 : 1;

  // Of mma: q stays in registers where it leaves room for the accumulators, else it is read again
  // from shared memory for every tile.
  static constexpr bool kQueryInRegisters =
      2 * kRowSteps * kWarpDepthSteps + 4 * kRowSteps * kDimSteps <= 104;
  static_assert(kQueryInRegisters || !kSplitsDepth);

  // Shared memory holds operands as [column blocks][tokens or rows][128 bytes], with the 16-byte
  // chunks of a row permuted (the 128-byte swizzle of the tensor maps). Of K and V:
  static constexpr int kBlockColumns = 128 / sizeof(CacheElement);
  static constexpr int kChunkColumns = 16 / sizeof(CacheElement);
  static constexpr int kColumnBlocks = ceil_div(kHeadDim, kBlockColumns);
  static constexpr int kStageBytes = kTile * kColumnBlocks * 128;

  // The warps' states meet here, 8 rows of a row group at a time: of every row group, or by wgmma, which
  // needs the room for q, of two at most. A row is longer than it need be: then the accumulators of a warp
  // go to different banks.
  static constexpr int kMergeGroups = kWgmma ? min_of(kRowGroups, 2) : kRowGroups;
  static constexpr int kMergeRows = kMergeGroups * 8;
  static constexpr int kMergePitch = kHeadDimV + (kWgmma && !kKeysAsRows ? 8 : 4);

  // Of wide heads by wgmma, warps meet that have other tokens of the same rows.
  static constexpr bool kMeets = kWide && kWgmma;

  // A CTA of sm_90 has so much memory, of which q of those wide heads leaves room for two.
  static constexpr int kMaxStages = kMeets ? 2 : 227 * 1024 / kStageBytes;
  // The fixup's partials, of four elements a thread: they come into the ring, so many at least at a time.
  static constexpr int kPartialsAtOnce = 4;
  static constexpr int kPartialBytes = kConsumerThreads * (sizeof(float4) + sizeof(float2));
  // With more than one step the keys are still needed when the values are waited for. Else one stage
  // is slow but works: K is released before V needs the room.
  static constexpr int kFewestStages =
      max_of((kWgmma && kSteps > 1) || Features::kFixedLoader ? 2 : 1,
             ceil_div(kPartialsAtOnce* kPartialBytes, kStageBytes));
  // Tiles that the page ids of paged caches are fetched ahead: 4 us or more of reading by one SM.
  static constexpr int kPageSlots = !kWide ? 8 : kWgmma ? 2 : 16;
  static constexpr int kTasks = kRows * kHeadDim <= 2048 ? 4 : kMovesRegisters ? 1 : 2;

  struct Nothing {};

  // A row of q in shared memory: for wgmma swizzled as in the ring, else by itself and so long that eight
  // rows' chunks lie in different banks.
  static constexpr int kQueryPitch = kHeadDim * 2 + (kWgmma ? 0 : 16);

  // Of the new row, and of the rotation of q, as they lie in memory.
  struct NewRow {
    alignas(16) uint8_t k[kHeadDim * 2];
    alignas(16) uint8_t v[kHeadDimV * 2];
    alignas(16) uint8_t cos[kHeadDim / 2 * sizeof(float)];
    alignas(16) uint8_t sin[kHeadDim / 2 * sizeof(float)];
    int32_t page;  // in which it goes, any number
    int position;  // of the sequence: the capacity where there is no room for it
  };
  struct NoNewRow {};

  // What the producer tells the consumers of one segment.
  struct Task {
    alignas(kWgmma ? 1024 : 16) uint8_t q[kQueryRows * kQueryPitch];
    // By which each row's products are to be multiplied.
    [[no_unique_address]] std::conditional_t<kFloat8, float[kRows], Nothing> q_factors;
    [[no_unique_address]] std::conditional_t<kAppends, NewRow, NoNewRow> new_row;
    Segment segment;
    int num_rows;          // 0: no more tasks
    int64_t partial_slot;  // where the segment does not hold its whole item
  };

  // A segment that does not hold its whole item, until the fixup.
  struct CutSegment {
    Segment segment;
    Participants units;
    Shares shares;
    bool is_last_to_arrive;
  };

  // Where those warps meet: P, an operand, and numbers of each row, of two turns.
  struct Meeting {
    alignas(1024) uint8_t p[kQueryRows * 128];  // [rows][64 tokens], swizzled
    float rows[2][kKeysAsRows ? 4 : 2][kRows];  // of each warp of a warpgroup, or of each warpgroup
  };

  // The warps' states where they meet at the end of a segment.
  struct MergeMemory {
    alignas(16) float o[kSlices][kMergeRows][kMergePitch];
    float max[kSlices][kMergeRows];
    float sum[kSlices][kMergeRows];
  };
  // With 64 rows of a wide head it has room in q alone, which is read no more by then.
  static constexpr bool kMergesInQuery = kMovesRegisters && !kKeysAsRows;

  // Products over parts of D, of two tiles in turn: as each lane has them.
  using ScoreParts = float4[2][kConsumerWarps][kTokenSteps * kRowSteps][32];

  struct SharedStorage {
    Task tasks[kTasks];
    [[no_unique_address]] std::conditional_t<kMeets, Meeting[kSlices], Nothing> meetings;
    CutSegment cuts[2];  // by the producer, as is what follows; the consumers have it with a task
    int num_cuts;
    bool in_teams;  // the units do, rather than share out the line
    [[no_unique_address]] std::conditional_t<kSplitsDepth, ScoreParts, Nothing> score_parts;
    [[no_unique_address]] std::conditional_t<kMergesInQuery, Nothing, MergeMemory> merge;
    alignas(8) uint64_t full[kMaxStages];
    uint64_t empty[kMaxStages];
    uint64_t task_full[kTasks];
    uint64_t task_empty[kTasks];
    Place place;              // of large batches
    int scan[kThreads / 32];  // on the way there
    int32_t page_ids[kCopyWarps][kPageSlots][kTile / kCopyWarps];
    // The ring follows, at the next multiple of 1024: [num_stages][kStageBytes].
  };
  static constexpr int kRingOffset = (sizeof(SharedStorage) + 1023) / 1024 * 1024;
  static_assert(!kMeets || kRingOffset + 2 * kStageBytes <= 227 * 1024,
                "a tile comes beside another");

  // The waiting states of one level of a batch-invariant item's tree; see tree_fixup.h.
  static constexpr int kFoldLevelStates = kRows * kHeadDimV / 4;
  static constexpr int kFoldLevelBytes = kFoldLevelStates * sizeof(SoftmaxState<4>);

  // A unit's partial in a cluster, in the ring's first stages, when all have been read.
  struct ClusterPartial {
    alignas(16) float o[kRows][kHeadDimV];
    float2 stats[kRows];  // max, sum
  };
  static constexpr int kMinStages =
      max_of<int>(kFewestStages, (sizeof(ClusterPartial) + kStageBytes - 1) / kStageBytes);
};

// Byte offset of 16-byte chunk `chunk` of row `row` in an operand of `rows` rows.
template <int rows>
__device__ __forceinline__ uint32_t swizzled_offset(int row, int chunk) {
  return (chunk / 8) * (rows * 128) + row * 128 + (((chunk % 8) ^ (row % 8)) * 16);
}

// Byte offset of 16-byte chunk `chunk` of row `row` of a task's q.
template <class Traits>
__device__ __forceinline__ uint32_t query_offset(int row, int chunk) {
  if constexpr (Traits::kWgmma) return swizzled_offset<Traits::kQueryRows>(row, chunk);
  return row * Traits::kQueryPitch + chunk * 16;
}

// What a call is, where the kernel is not compiled for one kind alone.
template <class Traits>
__device__ __forceinline__ bool is_bfloat16(const DecodeParams& params) {
  using Features = typename Traits::Features;
  if constexpr (!Features::kFloat16) return true;
  return Features::kBFloat16 && params.element_type == ElementType::kBFloat16;
}
template <class Traits>
__device__ __forceinline__ bool is_e5m2(const DecodeParams& params) {
  return Traits::Features::kE5M2 && params.cache_type == CacheType::kFloat8E5M2;
}
template <class Traits>
__device__ __forceinline__ bool is_paged(const DecodeParams& params) {
  using Features = typename Traits::Features;
  if constexpr (!Features::kContiguous) return true;
  return Features::kPaged && params.block_table;
}
// Up to 16 rows mma wastes less than wgmma, which always takes 64; but for wide heads.
constexpr int kFewestWgmmaRows = 32;

// Whether a kernel has code for the architecture that is being compiled for: wgmma where that is, and mma
// for as many rows where it is not.
template <class Traits>
LEANATTN_HD constexpr bool has_code() {
#if defined(LEANATTN_EMULATED_ARCH)
  return true;  // tests ask for either
#else
  if (Traits::kAppends && LEANATTN_ARCH < 900) return false;  // that is by bulk copies
  if (Traits::kWgmma) return LEANATTN_HAS_WGMMA;
  const bool has_choice =
      (Traits::kRows >= kFewestWgmmaRows || (Traits::kWide && !Traits::kTree)) && !Traits::kFloat8;
  return !LEANATTN_HAS_WGMMA || !has_choice;
#endif
}

// The call's problem, for what core/ does about shards: it knows no features, and is compiled away by this.
template <class Traits>
__device__ __forceinline__ Problem problem_of(const DecodeParams& params) {
  Problem problem = params.problem;
  if constexpr (Traits::Features::kShards) {
    // Of a condition that stays as it is throughout a kernel the compiler makes two of every loop around it.
    // It does not where it cannot see that it stays.
    asm volatile("" : "+r"(problem.shard.others));
  } else {
    problem.shard = {};
  }
  return problem;
}
// Whether copies are by the engine for bulk tensor copies.
template <class Traits, class TensorMaps>
__device__ __forceinline__ bool uses_tma(const TensorMaps& maps) {
  if constexpr (Traits::Features::kFixedLoader) return LEANATTN_ARCH >= 900;
  return LEANATTN_ARCH >= 900 && maps.usable;
}

}  // namespace leanattn
