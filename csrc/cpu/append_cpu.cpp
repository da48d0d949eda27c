#include "append_cpu.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Float8_e5m2.h>
#include <torch/headeronly/util/Half.h>

namespace leanattn {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Float8_e4m3fn;
using torch::headeronly::Float8_e5m2;
using torch::headeronly::Half;

template <class Cache>
constexpr float kLargest = 0.0f;  // of fp8 types, which saturate
template <>
constexpr float kLargest<Float8_e4m3fn> = 448.0f;
template <>
constexpr float kLargest<Float8_e5m2> = 57344.0f;

// x as it stands in the cache. Equal types are copied bit for bit.
template <class Cache, class Value>
Cache convert(Value x, float scale) {
  if constexpr (std::is_same_v<Cache, Value>) {
    return x;
  } else if constexpr (kLargest<Cache> > 0) {
    // std::clamp passes NaN on.
    const float scaled = static_cast<float>(x) / scale;
    return static_cast<Cache>(std::clamp(scaled, -kLargest<Cache>, kLargest<Cache>));
  } else {
    return static_cast<Cache>(static_cast<float>(x));
  }
}

template <class Element, class Cache>
class CpuAppend {
 public:
  CpuAppend(const AppendParams& params, const ParallelFor& parallel_for)
      : p_(params), parallel_for_(parallel_for) {}

  void run() const {
    const std::vector<NewToken> tokens = find_tokens();
    parallel_for_(static_cast<int64_t>(tokens.size()), [&](int64_t i) { append(tokens[i]); });
  }

 private:
  // All tokens that belong to a sequence.
  std::vector<NewToken> find_tokens() const {
    std::vector<NewToken> tokens;
    tokens.reserve(p_.num_tokens);
    if (!p_.cu_seqlens) {
      for (int i = 0; i < p_.num_tokens; ++i) tokens.push_back(uniform_token(p_, i));
      return tokens;
    }
    int begin = clamp_to(p_.cu_seqlens[0], 0, p_.num_tokens);
    for (int seq = 0; seq < p_.batch; ++seq) {
      const int end =
          clamp_to(p_.cu_seqlens[(seq + 1) * p_.cu_seqlens_stride], begin, p_.num_tokens);
      for (int row = begin; row < end; ++row) tokens.push_back({seq, row - begin, row});
      begin = end;
    }
    return tokens;
  }

  void append(const NewToken& token) const {
    if (p_.attended_lengths && token.index == 0) {
      p_.attended_lengths[token.seq] = attended_length(p_, token);
    }
    const int64_t position = position_of(p_, token);
    for (int head = 0; head < p_.num_heads_q; ++head) {
      const Element* q = row_of(p_.q, token, head);
      Element* to = row_of(p_.q_out, token, head);
      rotate_row(q, p_.q.dim_stride, position, [&](int dim, float x) {
        to[dim * p_.q_out.dim_stride] = static_cast<Element>(x);
      });
      for (int dim = 2 * p_.rope.num_pairs; p_.keeps_q() && dim < p_.head_dim; ++dim) {
        to[dim * p_.q_out.dim_stride] = q[dim * p_.q.dim_stride];
      }
    }
    const CacheSlot slot = find_slot(p_, token.seq, position);
    if (!slot.exists()) return;
    for (int head = 0; head < p_.num_heads_kv; ++head) {
      append_row(p_.k, p_.k_cache, scale_of(p_.k_scale, token.seq, head), p_.head_dim, token, slot,
                 head, position, p_.rope.num_pairs);
      append_row(p_.v, p_.v_cache, scale_of(p_.v_scale, token.seq, head), p_.head_dim_v, token,
                 slot, head, position, 0);
    }
  }

  void append_row(const Rows& rows, const Rows& cache, float scale, int head_dim,
                  const NewToken& token, const CacheSlot& slot, int head, int64_t position,
                  int num_pairs) const {
    const Element* from = row_of(rows, token, head);
    Cache* to = static_cast<Cache*>(cache.data) + slot_offset(cache, slot, head);
    if (num_pairs > 0) {
      rotate_row(from, rows.dim_stride, position,
                 [&](int dim, float x) { to[dim * cache.dim_stride] = convert<Cache>(x, scale); });
    }
    for (int dim = 2 * num_pairs; dim < head_dim; ++dim) {
      to[dim * cache.dim_stride] = convert<Cache>(from[dim * rows.dim_stride], scale);
    }
  }

  // Calls store(dim, value) for each rotated dim.
  template <class Store>
  void rotate_row(const Element* row, int64_t stride, int64_t position, Store store) const {
    const Rope& rope = p_.rope;
    const int at = rope_position(rope, position);
    for (int pair = 0; pair < rope.num_pairs; ++pair) {
      const int first = rope.interleaved ? 2 * pair : pair;
      const int second = rope.interleaved ? first + 1 : pair + rope.num_pairs;
      float x = static_cast<float>(row[first * stride]);
      float y = static_cast<float>(row[second * stride]);
      rotate(x, y, table_value(rope.cos, at, pair), table_value(rope.sin, at, pair));
      store(first, x);
      store(second, y);
    }
  }

  float table_value(const RopeTable& table, int position, int pair) const {
    const int64_t offset = position * table.position_stride + pair * table.dim_stride;
    if (p_.rope.tables_are_float32) return static_cast<const float*>(table.data)[offset];
    return static_cast<float>(static_cast<const Element*>(table.data)[offset]);
  }

  static Element* row_of(const Rows& rows, const NewToken& token, int head) {
    return static_cast<Element*>(rows.data) + row_offset(rows, token, head);
  }

  const AppendParams& p_;
  const ParallelFor& parallel_for_;
};

template <class Element>
void append(const AppendParams& params, const ParallelFor& parallel_for) {
  switch (params.cache_type) {
    case CacheType::kFloat32:
      return CpuAppend<Element, float>(params, parallel_for).run();
    case CacheType::kFloat16:
      return CpuAppend<Element, Half>(params, parallel_for).run();
    case CacheType::kBFloat16:
      return CpuAppend<Element, BFloat16>(params, parallel_for).run();
    case CacheType::kFloat8E4M3:
      return CpuAppend<Element, Float8_e4m3fn>(params, parallel_for).run();
    case CacheType::kFloat8E5M2:
      return CpuAppend<Element, Float8_e5m2>(params, parallel_for).run();
  }
}

}  // namespace

void append_cpu(const AppendParams& params, const ParallelFor& parallel_for) {
  switch (params.element_type) {
    case ElementType::kFloat32:
      return append<float>(params, parallel_for);
    case ElementType::kFloat16:
      return append<Half>(params, parallel_for);
    case ElementType::kBFloat16:
      return append<BFloat16>(params, parallel_for);
  }
}

}  // namespace leanattn
