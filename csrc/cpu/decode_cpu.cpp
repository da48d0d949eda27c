#include "decode_cpu.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Float8_e5m2.h>
#include <torch/headeronly/util/Half.h>

#include "core/tree_fold.h"
#include "plan/schedule_host.h"
#include "tile_math.h"

namespace leanattn {
namespace {

// A score or sink in double, while a step of fp32 there is small beside 1; else in fp32, as a maximum is,
// which could be far from the double.
double exact_unless_large(double exact, float rounded) {
  return std::fabs(exact) > 1e6 ? rounded : exact;
}

// The states of an item's rows; see softmax_state.h, whose algebra this is for a run-time Dv, and in
// double: a long sequence's tiles added up in fp32 would be off by more than fp32 results may be.
struct RowStates {
  std::vector<double> max;  // [rows]; numbers of fp32, for partials are stored so
  std::vector<double> sum;  // [rows]
  std::vector<double> o;    // [rows, Dv]
  int head_dim_v;

  RowStates(int rows, int head_dim_v)
      : max(rows, kNegativeInfinity),
        sum(rows, 0.0),
        o(static_cast<size_t>(rows) * head_dim_v, 0.0),
        head_dim_v(head_dim_v) {}

  double* o_row(int row) { return o.data() + static_cast<size_t>(row) * head_dim_v; }

  // Takes the row's maximum up to new_max.
  void rescale(int row, double new_max) {
    if (new_max == max[row]) return;
    const double factor = rescale_factor(max[row], new_max);
    sum[row] *= factor;
    double* o = o_row(row);
    for (int d = 0; d < head_dim_v; ++d) o[d] *= factor;
    max[row] = new_max;
  }

  // For the fixed tree, whose nodes are the same whether they go through the workspace or not.
  void merge(const RowStates (&others)[1]) {
    for (int row = 0; row < static_cast<int>(max.size()); ++row) {
      merge(row, others[0].max[row], others[0].sum[row],
            others[0].o.data() + static_cast<size_t>(row) * head_dim_v);
    }
    round_to_fp32();
  }

  void round_to_fp32() {
    for (double& x : sum) x = static_cast<float>(x);
    for (double& x : o) x = static_cast<float>(x);
  }

  template <class Real>
  void merge(int row, Real other_max, Real other_sum, const Real* other_o) {
    rescale(row, std::max<double>(max[row], other_max));
    const double factor = rescale_factor<double>(other_max, max[row]);
    sum[row] += factor * other_sum;
    double* o = o_row(row);
    for (int d = 0; d < head_dim_v; ++d) o[d] += factor * other_o[d];
  }

  // A sink is one more logit in the denominator.
  void merge_sink(int row, float sink) {
    const float rounded = sink_log2(sink);
    rescale(row, std::max<double>(max[row], rounded));
    sum[row] += rescale_factor(exact_unless_large(sink / std::log(2.0), rounded), max[row]);
  }
};

template <class Element, class Cache>
class CpuDecode {
 public:
  CpuDecode(const DecodeParams& params, const ParallelFor& parallel_for)
      : params_(params),
        problem_(params.problem),
        parallel_for_(parallel_for),
        line_(params.problem, params.layout.num_units) {}

  void run() {
    const int units = line_.shares().num_units;
    // The item, if any, that begins in a unit's share and goes on in the next.
    std::vector<std::optional<Segment>> cut_items(units);
    parallel_for_(units, [&](int64_t unit) {
      SegmentWalker walker = line_.walk(static_cast<int>(unit));
      Segment segment;
      while (walker.next(segment)) {
        int num_partials = 0;
        const auto finish = [&](const RowStates& states, bool is_whole) {
          if (is_whole) return write(segment, states);
          store_partial(segment, static_cast<int>(unit), num_partials++, states);
        };
        if (params_.batch_invariant) {
          fold_tiles(segment, finish);
        } else {
          finish(compute(segment, segment.tile_begin, segment.tile_end), segment.is_whole());
        }
        if (!segment.is_whole() && participants(line_.shares(), segment).first == unit) {
          cut_items[unit] = segment;
        }
      }
    });
    parallel_for_(units, [&](int64_t unit) {
      if (!cut_items[unit]) return;
      const Segment& segment = *cut_items[unit];
      write(segment, params_.batch_invariant ? fold_partials(segment) : merge_partials(segment));
    });
    parallel_for_(problem_.batch, [&](int64_t seq) { write_empty_items(static_cast<int>(seq)); });
    if (problem_.cu_seqlens_q) {
      write_uncovered_rows(0, first_query_row(problem_));
      write_uncovered_rows(line_.query_end(), problem_.total_q);
    }
  }

 private:
  int rows_of(const Segment& segment) const {
    return item_rows(problem_, segment.sequence, segment.row_block);
  }

  // --- Main loop: some tiles of a segment from their keys to their states ---

  RowStates compute(const Segment& segment, int tile_begin, int tile_end) const {
    const int rows = rows_of(segment);
    const int head_dim = params_.head_dim;
    const int head_dim_v = params_.head_dim_v;
    const int tile = 1 << problem_.tile_tokens_log2;
    std::vector<float> q(static_cast<size_t>(rows) * head_dim);
    std::vector<float> k(static_cast<size_t>(tile) * head_dim);
    std::vector<float> v(static_cast<size_t>(tile) * head_dim_v);
    std::vector<double> scores(tile);
    std::vector<float> probabilities(tile);
    RowStates states(rows, head_dim_v);
    load_queries(segment, rows, q.data());
    for (int t = tile_begin; t < tile_end; ++t) {
      const KeyRange keys{
          std::max(segment.keys.any.begin, t * tile),
          std::min<int>(segment.keys.any.end,
                        std::min<int64_t>(int64_t{t + 1} * tile, problem_.capacity))};
      load_keys(segment, keys, params_.k, params_.k_batch_stride, params_.k_seq_stride,
                params_.k_head_stride, params_.k_dim_stride, head_dim, k.data());
      load_keys(segment, keys, params_.v, params_.v_batch_stride, params_.v_seq_stride,
                params_.v_head_stride, params_.v_dim_stride, head_dim_v, v.data());
      for (int row = 0; row < rows; ++row) {
        const QueryRow r = query_row(params_, segment, row);
        const KeyRange seen = keys_seen_from(problem_, segment.sequence, r.position);
        const int begin = std::max(seen.begin, keys.begin);
        const int end = std::min(seen.end, keys.end);
        if (begin >= end) continue;  // keys that this row does not see are not even multiplied by 0
        const size_t skip = begin - keys.begin;
        multiply_keys(&q[static_cast<size_t>(row) * head_dim], &k[skip * head_dim], end - begin,
                      head_dim, scores.data());
        softmax(states, row, r, segment, begin, end, scores.data(), probabilities.data());
        multiply_values(probabilities.data(), &v[skip * head_dim_v], end - begin, head_dim_v,
                        states.o_row(row));
      }
    }
    return states;
  }

  // One row's online softmax over keys [begin, end): dot products become probabilities. Scores stay in
  // double until the maximum is off them, for then only small differences count.
  void softmax(RowStates& states, int row, const QueryRow& r, const Segment& segment, int begin,
               int end, double* scores, float* probabilities) const {
    const float slope = params_.alibi_slopes
                            ? params_.alibi_slopes[segment.seq * params_.alibi_batch_stride +
                                                   r.head * params_.alibi_head_stride]
                            : 0.0f;
    const double k_scale = scale_of(params_.k_scale, segment.seq, segment.head);
    float new_max = static_cast<float>(states.max[row]);
    for (int key = begin; key < end; ++key) {
      double& score = scores[key - begin];
      const int token = problem_.shard.is_whole() ? key : problem_.shard.token_of(key);
      score = score_log2(params_, score * k_scale, slope, std::abs(r.position - token));
      score = exact_unless_large(score, static_cast<float>(score));
      new_max = std::fmax(new_max, static_cast<float>(score));
    }
    states.rescale(row, new_max);
    const double base = exponent_base(new_max);
    double sum = 0.0;
    for (int i = 0; i < end - begin; ++i) {
      // exp2 in fp32, and to first order what fp32 has cut off its argument.
      const double exponent = scores[i] - base;
      const float rounded = static_cast<float>(exponent);
      const float rest = static_cast<float>(exponent - rounded);
      const float power = fast_exp2(rounded);
      probabilities[i] = std::isfinite(rounded) ? power + power * kLn2 * rest : power;
      sum += probabilities[i];
    }
    states.sum[row] += sum;
  }

  void load_queries(const Segment& segment, int rows, float* q) const {
    for (int row = 0; row < rows; ++row) {
      const QueryRow r = query_row(params_, segment, row);
      load_row(static_cast<const Element*>(params_.q) +
                   q_offset(params_, segment.seq, segment.sequence, r.query, r.head),
               params_.q_dim_stride, params_.head_dim,
               q + static_cast<size_t>(row) * params_.head_dim);
    }
  }

  void load_keys(const Segment& segment, KeyRange keys, const void* cache, int64_t batch_stride,
                 int64_t seq_stride, int64_t head_stride, int64_t dim_stride, int head_dim,
                 float* to) const {
    const Cache* from = static_cast<const Cache*>(cache) + segment.head * head_stride;
    for (int key = keys.begin; key < keys.end; ++key) {
      const CacheRow at = cache_row(params_, segment.seq, key);
      load_row(from + at.page * batch_stride + at.row * seq_stride, dim_stride, head_dim,
               to + static_cast<size_t>(key - keys.begin) * head_dim);
    }
  }

  template <class T>
  static void load_row(const T* from, int64_t stride, int n, float* to) {
    if (stride == 1) {
      for (int i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
    } else {
      for (int i = 0; i < n; ++i) to[i] = static_cast<float>(from[i * stride]);
    }
  }

  // --- Fixup ---

  void store_partial(const Segment& segment, int unit, int node, const RowStates& states) const {
    const int64_t slot = first_row_of(participants(line_.shares(), segment), unit, node);
    for (int row = 0; row < rows_of(segment); ++row) {
      params_.partial_stats[(slot + row) * 2] = static_cast<float>(states.max[row]);
      params_.partial_stats[(slot + row) * 2 + 1] = static_cast<float>(states.sum[row]);
    }
    std::copy(states.o.begin(), states.o.end(), params_.partial_o + slot * params_.head_dim_v);
  }

  // Of a partial, among the rows of all partials.
  int64_t first_row_of(const Participants& units, int unit, int node) const {
    return partial_index(params_, units.slot(unit), node) * problem_.rows_per_item;
  }

  void merge_partial(RowStates& states, int64_t slot) const {
    for (int row = 0; row < static_cast<int>(states.max.size()); ++row) {
      const float* stats = params_.partial_stats + (slot + row) * 2;
      states.merge(row, stats[0], stats[1], params_.partial_o + (slot + row) * params_.head_dim_v);
    }
  }

  RowStates merge_partials(const Segment& segment) const {
    RowStates states(rows_of(segment), params_.head_dim_v);
    const Participants units = participants(line_.shares(), segment);
    for (int unit = units.first; unit <= units.last; ++unit) {
      merge_partial(states, first_row_of(units, unit, 0));
    }
    return states;
  }

  // --- Batch-invariant: the same by a fixed tree, see tree_fold.h ---

  // The states that wait for their right sibling, by level.
  struct FoldStack {
    std::map<int, RowStates> states;

    RowStates load(int level) { return states.at(level); }
    void store(int level, RowStates state) { states.insert_or_assign(level, std::move(state)); }
  };

  // Calls finish(states, is_whole) for every node of the tree that the segment's tiles come to.
  template <class Finish>
  void fold_tiles(const Segment& segment, const Finish& finish) const {
    FoldStack stack;
    const auto emit = [&](const TreeNode& node, const RowStates& states) {
      finish(states, node.covers(segment.item));
    };
    for (int tile = segment.tile_begin; tile < segment.tile_end; ++tile) {
      RowStates states = compute(segment, tile, tile + 1);
      states.round_to_fp32();
      fold_node(segment.item, segment.tile_begin, {0, tile}, std::move(states), stack, emit);
    }
    fold_rest<RowStates>(segment.item, segment.tile_begin, segment.tile_end, stack, emit);
  }

  RowStates fold_partials(const Segment& segment) const {
    RowStates result(0, 0);
    FoldStack stack;
    const auto emit = [&](const TreeNode&, const RowStates& states) { result = states; };
    const Participants units = participants(line_.shares(), segment);
    for (int unit = units.first; unit <= units.last; ++unit) {
      const TileRange own = tiles_of_unit(line_.shares(), segment, unit);
      int64_t at = own.begin;
      for (int index = 0; at < own.end; ++index) {
        const TreeNode node = next_node(segment.item, own.begin, own.end, at);
        RowStates states(rows_of(segment), params_.head_dim_v);
        merge_partial(states, first_row_of(units, unit, index));
        fold_node(segment.item, segment.item.begin, node, std::move(states), stack, emit);
        at = node.end();
      }
    }
    return result;
  }

  // --- Output ---

  void write(const Segment& segment, RowStates states) const {
    const float v_scale = scale_of(params_.v_scale, segment.seq, segment.head);
    for (int row = 0; row < rows_of(segment); ++row) {
      const QueryRow r = query_row(params_, segment, row);
      const bool has_keys = states.sum[row] != 0.0;
      float lse;
      if (params_.sinks) {
        const float sink = params_.sinks[r.head * params_.sinks_stride];
        states.merge_sink(row, sink);
        lse = lse_of(states.max[row], states.sum[row], sink);
      } else {
        lse = lse_of(states.max[row], states.sum[row]);
      }
      // Without keys 0, be the sink and the scale NaN.
      const double factor = has_keys ? inverse_of(states.sum[row]) * v_scale : 0.0;
      write_row(segment.seq, segment.sequence.query_begin + r.query, r.head, states.o_row(row),
                factor, lse);
    }
  }

  void write_row(int seq, int q_row, int head, const double* o, double factor, float lse) const {
    const int64_t offset = out_offset(params_, seq, q_row, head);
    if (params_.float32_out) {
      write_elements(static_cast<float*>(params_.out) + offset, o, factor);
    } else {
      write_elements(static_cast<Element*>(params_.out) + offset, o, factor);
    }
    if (params_.lse) params_.lse[lse_offset(params_, seq, q_row, head)] = lse;
  }

  template <class Out>
  void write_elements(Out* out, const double* o, double factor) const {
    for (int d = 0; d < params_.head_dim_v; ++d) {
      out[d * params_.out_dim_stride] =
          static_cast<Out>(static_cast<float>(o ? o[d] * factor : 0.0));
    }
  }

  void write_empty_items(int seq) const {
    const Sequence sequence = line_.sequence(seq);
    const int blocks = end_of_empty_items(problem_, sequence);
    for (int block = 0; block < blocks; ++block) {
      if (is_empty_item(problem_, sequence, block)) write_empty_item(seq, sequence, block);
    }
  }

  void write_empty_item(int seq, const Sequence& sequence, int block) const {
    const int first = block * problem_.rows_per_item;
    const int rows = item_rows(problem_, sequence, block);
    for (int row = first; row < first + rows; ++row) {
      for (int head_kv = 0; head_kv < problem_.num_heads_kv; ++head_kv) {
        const int head = head_kv * problem_.group_size + row % problem_.group_size;
        write_row(seq, sequence.query_begin + row / problem_.group_size, head, nullptr, 0.0,
                  params_.sinks ? params_.sinks[head * params_.sinks_stride] : kNegativeInfinity);
      }
    }
  }

  void write_uncovered_rows(int begin, int end) const {
    for (int row = begin; row < end; ++row) {
      for (int head = 0; head < params_.num_heads_q; ++head) {
        write_row(0, row, head, nullptr, 0.0, kNegativeInfinity);
      }
    }
  }

  const DecodeParams& params_;
  const Problem& problem_;
  const ParallelFor& parallel_for_;
  HostLine line_;
};

using torch::headeronly::BFloat16;
using torch::headeronly::Float8_e4m3fn;
using torch::headeronly::Float8_e5m2;
using torch::headeronly::Half;

template <class Element>
void decode(const DecodeParams& params, const ParallelFor& parallel_for) {
  switch (params.cache_type) {
    case CacheType::kFloat8E4M3:
      return CpuDecode<Element, Float8_e4m3fn>(params, parallel_for).run();
    case CacheType::kFloat8E5M2:
      return CpuDecode<Element, Float8_e5m2>(params, parallel_for).run();
    default:
      return CpuDecode<Element, Element>(params, parallel_for).run();
  }
}

}  // namespace

void decode_cpu(const DecodeParams& params, const ParallelFor& parallel_for) {
  switch (params.element_type) {
    case ElementType::kFloat32:
      return CpuDecode<float, float>(params, parallel_for).run();
    case ElementType::kFloat16:
      return decode<Half>(params, parallel_for);
    case ElementType::kBFloat16:
      return decode<BFloat16>(params, parallel_for);
  }
}

}  // namespace leanattn
