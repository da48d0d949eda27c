// The two inner products of attention on dense fp32 tiles, compiled for several instruction sets.
#pragma once

namespace leanattn {

// Both sum in double: a logit of 50 with fp32's rounding would be off by more than fp32 results may be,
// and so would a tile's values one after the other.

// The dot product of q [head_dim] with each of `tokens` rows of k [tokens, head_dim].
void multiply_keys(const float* q, const float* k, int tokens, int head_dim, double* dots);

// o [head_dim] += sum over tokens of p[token] * v[token], v [tokens, head_dim].
void multiply_values(const float* p, const float* v, int tokens, int head_dim, double* o);

}  // namespace leanattn
