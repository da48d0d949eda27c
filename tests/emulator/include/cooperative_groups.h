// Clusters, emulated.
#pragma once

#include "emulator.h"

namespace cooperative_groups {

struct cluster_group {
  int barrier_arrive() const {
    emulator::Cluster& cluster = *emulator::cta().cluster;
    emulator::release(&cluster);
    const emulator::Quiet quiet;
    const int generation = cluster.generation;
    ++cluster.arrived;
    cluster.check();
    return generation;
  }
  void barrier_wait(int generation) const {
    emulator::Cluster& cluster = *emulator::cta().cluster;
    emulator::yield_until("the cluster",
                          [&cluster, generation] { return cluster.generation != generation; });
    emulator::acquire(&cluster);
  }
  template <class T>
  T* map_shared_rank(T* mine, int rank) const {
    const auto offset = reinterpret_cast<uint8_t*>(mine) - emulator::cta().smem;
    return reinterpret_cast<T*>(emulator::cta().cluster->ctas.at(rank)->smem + offset);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
