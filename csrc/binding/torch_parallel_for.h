// The CPU implementations' ParallelFor on torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/decode_cpu.h"

namespace leanattn {

// At least `grain` iterations a thread: waking one for less costs more than it saves.
inline ParallelFor torch_parallel_for(int64_t grain) {
  return [grain](int64_t n, const std::function<void(int64_t)>& body) {
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  };
}

}  // namespace leanattn
