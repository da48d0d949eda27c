// The producer's way through the unit's share: tiles into the ring, tasks into the queue. The first tile and
// its q are under way before anything else is set up, since all the others wait for them.
#pragma once

#include "loaders_paged.h"
#include "task_queue.h"
#include "timeline.h"

namespace leanattn {

// The producer warp's whole life after it has found its share; by cp.async the helpers' too, which copy
// the other parts of every tile and have no tasks. `loader`: of the call's caches. set_up(): initialises the
// barriers that the first tile does not need, and tells the others.
template <class Traits, class Walk, class Loader, class SetUp>
__device__ __forceinline__ void produce(const DecodeParams& params, const TensorMaps& maps,
                                        Walk walker, Loader loader, Ring<Traits> ring,
                                        TaskQueue<Traits> tasks, bool has_tasks,
                                        const SetUp& set_up) {
  const int stages_per_tile = values_in_keys<Traits>(params) ? 1 : 2;
  // In a ring of one stage K must have been read before V comes.
  bool is_set_up = Traits::kFewestStages == 1 && ring.num_stages() == 1;
  if (is_set_up) set_up();
  Segment segment;
  segment.tile_end = 0;
  int tile = 0;
  LEANATTN_KEEP_ROLLED
  while (true) {
    if (++tile >= segment.tile_end) {
      if (!walker.next(segment)) break;
      tile = segment.tile_begin;
    }
    const bool is_first = tile == segment.tile_begin;
    const int tile_token = tile * Traits::kTile;
    loader.begin_tile(segment, tile_token);
    LEANATTN_KEEP_ROLLED  // the code that copies K is there when V is copied
        for (int stage = 0; stage < stages_per_tile; ++stage) {
      ring.wait_empty();
      loader.load(view_cache<Traits>(params, maps, stage), segment, tile_token, ring);
      ring.advance();
      mark(params, Mark::kFirstKeys, !is_set_up && stage == 0 && threadIdx.x % 32 == 0);
      if (stage == 0 && is_first && has_tasks) tasks.copy_queries(params, segment);
      mark(params, Mark::kFirstQuery, !is_set_up && stage == 0 && threadIdx.x % 32 == 0);
    }
    if (!is_set_up) {
      set_up();
      is_set_up = true;
      mark(params, Mark::kSetUp, threadIdx.x % 32 == 0);
    }
    if (is_first && has_tasks) tasks.push(params, walker.shares(), segment);
  }
  if (!is_set_up) set_up();
  if (has_tasks) tasks.close(walker.shares());
}

}  // namespace leanattn
