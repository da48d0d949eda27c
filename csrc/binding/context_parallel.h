// The arguments cp_world_size, cp_rank and cp_interleave, of decode and of the append ops: one sequence
// over several GPUs. What they mean stands in core/shard.h.
#pragma once

#include <cstdint>

#include "check.h"
#include "core/shard.h"

namespace leanattn {

// In the order of the schemas.
struct ContextParallel {
  int64_t world_size, rank, interleave;
};

constexpr ContextParallel kOneRank{1, 0, 1};

inline void check_context_parallel(const Checker& check, const ContextParallel& cp) {
  check.require(cp.world_size >= 1 && cp.world_size <= kMaxInt, "cp_world_size",
                "must be from 1 to 2^31 - 1, got ", cp.world_size);
  check.require(cp.rank >= 0 && cp.rank < cp.world_size, "cp_rank",
                "must be from 0 to cp_world_size - 1, ", cp.world_size - 1, ", got ", cp.rank);
  const int64_t longest = kMaxInt / cp.world_size;  // tokens are counted in int
  check.require(cp.interleave >= 1 && cp.interleave <= longest, "cp_interleave",
                "must be from 1 to (2^31 - 1) / cp_world_size, ", longest, ", got ", cp.interleave);
}

// After the check.
inline Shard make_shard(const ContextParallel& cp, int capacity) {
  return make_shard(static_cast<int>(cp.world_size), static_cast<int>(cp.rank),
                    static_cast<int>(cp.interleave), capacity);
}

}  // namespace leanattn
