#include "tile_math.h"

// One wheel serves every x86-64: the loader picks the copy that the processor can run.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define LEANATTN_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define LEANATTN_CLONES
#endif

namespace leanattn {

LEANATTN_CLONES
void multiply_keys(const float* q, const float* k, int tokens, int head_dim, double* dots) {
  for (int token = 0; token < tokens; ++token) {
    const float* row = k + static_cast<long>(token) * head_dim;
    double dot = 0.0;
#pragma omp simd reduction(+ : dot)
    for (int d = 0; d < head_dim; ++d) dot += static_cast<double>(q[d]) * row[d];
    dots[token] = dot;
  }
}

LEANATTN_CLONES
void multiply_values(const float* p, const float* v, int tokens, int head_dim, double* o) {
  constexpr int kBlock = 8;
  int block = 0;
  for (; block + kBlock <= head_dim; block += kBlock) {
    double sum[kBlock] = {};
    for (int token = 0; token < tokens; ++token) {
      const float* row = v + static_cast<long>(token) * head_dim + block;
#pragma omp simd
      for (int d = 0; d < kBlock; ++d) sum[d] += static_cast<double>(p[token]) * row[d];
    }
    for (int d = 0; d < kBlock; ++d) o[block + d] += sum[d];
  }
  for (; block < head_dim; ++block) {
    double sum = 0.0;
    for (int token = 0; token < tokens; ++token) {
      sum += static_cast<double>(p[token]) * v[static_cast<long>(token) * head_dim + block];
    }
    o[block] += sum;
  }
}

}  // namespace leanattn
