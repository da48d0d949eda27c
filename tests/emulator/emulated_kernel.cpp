// The decode kernel on the emulator, as a Python module for the tests: arrays in, out and lse back.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <optional>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulator.h"

#include "cuda_functions.h"

#include "cuda/kernel/decode_kernel.h"
#include "plan/pair_heads.h"
#include "plan/schedule_host.h"

namespace py = pybind11;
using namespace leanattn;

namespace {

using Bits = py::array_t<uint16_t, py::array::c_style>;  // of float16 or bfloat16
using Ints = py::array_t<int32_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

// Of a cache, [B, S, Hkv, D] or paged; any strides but of D. heads: that count as one.
CUtensorMap make_map(const py::array& cache, int heads, int box_rows) {
  const auto extent = [&](int i) { return static_cast<int64_t>(cache.shape(i)); };
  const auto stride = [&](int i) {
    return static_cast<int64_t>(cache.strides(i) / cache.itemsize());
  };
  emulator::TensorMap map{static_cast<const uint8_t*>(cache.data()),
                          static_cast<int>(cache.itemsize()),
                          {extent(3) * heads, extent(1), extent(2) / heads, extent(0)},
                          {1, stride(1), stride(2) * heads, stride(0)},
                          box_rows};
  CUtensorMap memory{};
  std::memcpy(static_cast<void*>(&memory), &map, sizeof(map));
  return memory;
}

template <class Traits>
void launch(const DecodeParams& params, const TensorMaps& maps, int stages, int fold_levels,
            int seed) {
  constexpr int kMostStages = (227 * 1024 - Traits::kRingOffset) / Traits::kStageBytes;  // of sm_90
  static_assert(kMostStages >= Traits::kFewestStages);
  stages = std::min(stages, kMostStages);
  const RoomPlan room{stages, fold_levels};
  const size_t bytes = Traits::kRingOffset +
                       std::max(stages, Traits::kMinStages) * Traits::kStageBytes +
                       fold_levels * Traits::kFoldLevelBytes;
  emulator::run(params.layout.num_units, params.cluster_size, Traits::kThreads, bytes, seed, [&] { decode_kernel<Traits>(params, maps, room); });
}

// q [B, Sq, Hq, D], or [total_q, Hq, D] with cu_seqlens_q; caches [B, S, Hkv, D] or paged, of q's type
// or of uint8, which are float8; scales [B, Hkv]. Returns out and lse, and checks that the counters are
// zero again.
py::tuple decode(const Bits& q, const py::array& k, const py::array& v, bool bf16, bool e5m2,
                 std::optional<Floats> k_scale, std::optional<Floats> v_scale,
                 std::optional<Ints> cache_seqlens, std::optional<Ints> block_table,
                 std::optional<Ints> cu_seqlens_q, int window_left, int window_right, float scale,
                 int rows, int num_units, int items_per_team, int team_size, int cluster_size,
                 int slack_tiles, bool batch_invariant, bool head_pairs, bool tma, int stages,
                 bool wgmma, const std::string& features, int seed) {
  DecodeParams p{};
  const bool ragged = cu_seqlens_q.has_value();
  const int q_dims = static_cast<int>(q.ndim());
  const bool float8 = k.itemsize() == 1;
  p.element_type = bf16 ? ElementType::kBFloat16 : ElementType::kFloat16;
  p.cache_type = e5m2     ? CacheType::kFloat8E5M2
                 : float8 ? CacheType::kFloat8E4M3
                 : bf16   ? CacheType::kBFloat16
                          : CacheType::kFloat16;
  if (k_scale) p.k_scale = {k_scale->data(), k_scale->shape(1), 1};
  if (v_scale) p.v_scale = {v_scale->data(), v_scale->shape(1), 1};
  p.head_dim = static_cast<int>(q.shape(q_dims - 1));
  p.head_dim_v = static_cast<int>(v.shape(3));
  p.k_columns = p.head_dim;
  p.v_columns = p.head_dim_v;
  p.num_heads_q = static_cast<int>(q.shape(q_dims - 2));
  Problem& problem = p.problem;
  if (cache_seqlens) problem.cache_seqlens = cache_seqlens->data();
  problem.cache_seqlens_stride = 1;
  if (ragged) problem.cu_seqlens_q = cu_seqlens_q->data();
  problem.cu_seqlens_q_stride = 1;
  problem.batch = static_cast<int>(block_table ? block_table->shape(0) : k.shape(0));
  problem.num_heads_kv = static_cast<int>(k.shape(2));
  problem.group_size = p.num_heads_q / static_cast<int>(k.shape(2));
  problem.seqlen_q = ragged ? 1 : static_cast<int>(q.shape(1));
  problem.total_q = ragged ? static_cast<int>(q.shape(0)) : 0;
  problem.capacity = static_cast<int>(
      std::min<int64_t>(k.shape(1) * (block_table ? block_table->shape(1) : 1), INT32_MAX));
  problem.tile_tokens_log2 = tile_tokens_log2_for(std::max(p.head_dim, p.head_dim_v));
  problem.mask = {window_left, window_right};

  const int64_t heads = p.num_heads_q;
  p.q = q.data();
  p.q_head_stride = p.head_dim;
  p.q_seq_stride = heads * p.head_dim;
  p.q_batch_stride = ragged ? 0 : problem.seqlen_q * p.q_seq_stride;
  p.q_dim_stride = 1;
  p.k = k.data();
  p.k_head_stride = k.strides(2) / k.itemsize();
  p.k_seq_stride = k.strides(1) / k.itemsize();
  p.k_batch_stride = k.strides(0) / k.itemsize();
  p.v = v.data();
  p.v_head_stride = v.strides(2) / v.itemsize();
  p.v_seq_stride = v.strides(1) / v.itemsize();
  p.v_batch_stride = v.strides(0) / v.itemsize();
  p.values_in_keys = p.v == p.k && p.head_dim_v <= p.head_dim;
  p.batch_invariant = batch_invariant;
  if (head_pairs) {
    if (!can_pair_heads(p, int64_t{problem.seqlen_q} * problem.group_size)) {
      throw std::invalid_argument("no pairs of these heads");
    }
    p = pair_heads(p);
  }
  const bool is_wide = std::max(p.head_dim, p.head_dim_v) > 256;
  const Kind kind = batch_invariant        ? Kind::kTree
                    : !wgmma               ? Kind::kMma
                    : is_wide && rows < 64 ? Kind::kWgmmaKeys
                                           : Kind::kWgmma;
  if (is_wide && wgmma) problem.tile_tokens_log2 = kWideTileTokensLog2;
  problem.rows_per_item = rows;
  problem.row_blocks = row_blocks_of(problem.seqlen_q, problem.group_size, rows);
  const int slots = num_units / team_size;
  // As the cost model has it: several items a team by steps where they are many.
  const int step = items_per_team > 2 ? slots : 1;
  p.layout = {num_units, items_per_team, step, team_size, slots, slack_tiles, slots};
  p.cluster_size = cluster_size;
  p.is_uniform = !cache_seqlens && !ragged;
  if (p.is_uniform) p.uniform = make_uniform_line(problem, num_units);
  if (block_table) {
    p.block_table = block_table->data();
    p.block_table_batch_stride = block_table->shape(1);
    p.block_table_page_stride = 1;
    p.num_pages = static_cast<int>(k.shape(0));
    p.page_size = static_cast<int>(k.shape(1));
  }
  const int64_t query_rows = ragged ? problem.total_q : int64_t{problem.batch} * problem.seqlen_q;
  const int64_t head_dim_v = v.shape(3);
  py::array_t<uint16_t> out({query_rows, heads, head_dim_v});
  py::array_t<float> lse({query_rows, heads});
  std::fill_n(out.mutable_data(), out.size(), 0x7e01);
  p.out = out.mutable_data();
  p.out_head_stride = head_dim_v;
  p.out_seq_stride = heads * head_dim_v;
  p.out_batch_stride = ragged ? 0 : problem.seqlen_q * p.out_seq_stride;
  p.lse = lse.mutable_data();
  p.lse_head_stride = 1;
  p.lse_seq_stride = heads;
  p.lse_batch_stride = ragged ? 0 : problem.seqlen_q * heads;
  p.softmax_scale = scale;

  const int tiles = ceil_div(problem.capacity, 1 << problem.tile_tokens_log2);
  p.max_nodes = batch_invariant ? max_nodes(tiles) : 1;
  const int64_t partial_rows = int64_t{num_units} * 2 * p.max_nodes * rows;
  const int padded = kernel_head_dim(p);
  const int padded_v = padded_head_dim_v(padded);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> partial_o(partial_rows * p.head_dim_v, nan), stats(partial_rows * 2, nan);
  std::vector<SoftmaxState<4>> fold(partial_rows / 4 * padded_v / 4 + 1);
  p.partial_o = partial_o.data();
  p.partial_stats = stats.data();
  p.fold_states = fold.data();
  const int64_t items = int64_t{problem.batch} * problem.num_heads_kv * problem.row_blocks;
  p.counter_per_item = !ragged && items <= num_units;
  std::vector<int32_t> counters(num_units);
  p.counters = counters.data();

  TensorMaps maps{};
  if (tma) {
    int box_log2 = problem.tile_tokens_log2;
    if (block_table) box_log2 = std::min(box_log2, std::countr_zero<unsigned>(k.shape(1)));
    if (box_log2 < kMinBoxRowsLog2) throw std::invalid_argument("no TMA for these pages");
    maps.usable = true;
    maps.tile_box_rows_log2 = box_log2;
    maps.rows_box_rows_log2 = std::min(box_log2, kBoxRowsLog2);
    const auto make_maps = [&](const py::array& cache) {
      const int heads = head_pairs ? 2 : 1;
      return CacheMaps{make_map(cache, heads, 1 << box_log2),
                       make_map(cache, heads, 1 << maps.rows_box_rows_log2)};
    };
    maps.cache[0] = make_maps(k);
    maps.cache[1] = make_maps(v);
  }
  const int fold_levels = batch_invariant ? 1 : 0;
  bool found = false;
  const auto with = [&]<int kHeadDim, int kRows, Kind kKind, class CacheElement = Float16,
                        class Features = AllFeatures>() {
    const bool of_float8 = std::is_same_v<CacheElement, Float8>;
    if (padded != kHeadDim || rows != kRows || kind != kKind || float8 != of_float8) return;
    launch<DecodeTraits<kHeadDim, kRows, kKind, CacheElement, Features>>(p, maps, stages,
                                                                         fold_levels, seed);
    found = true;
  };
  const auto with_few =
      [&]<int kHeadDim, int kRows, class Features, class CacheElement = Float16>() {
        if (bf16 != Features::kBFloat16 || block_table.has_value() != Features::kPaged) return;
        with.template operator()<kHeadDim, kRows, Kind::kMma, CacheElement, Features>();
      };
  if (features != "all") {
    if (features == "lean") {
      if (!has_plain_items(problem)) throw std::invalid_argument("no plain items");
      with_few.template operator()<64, 8, LeanFeatures<false, false>>();
      with_few.template operator()<128, 8, LeanFeatures<false, false>>();
      with_few.template operator()<128, 8, LeanFeatures<false, true>>();
      with_few.template operator()<128, 16, LeanFeatures<true, false>>();
      with_few.template operator()<256, 8, LeanFeatures<false, false>>();
      with_few.template operator()<128, 8, LeanFeatures<true, true>, Float8>();
      if (kind == Kind::kWgmmaKeys) {
        with.template operator()<576, 16, Kind::kWgmmaKeys, Float16, LeanFeatures<true, false>>();
      }
      if (kind == Kind::kWgmma) {
        with.template operator()<576, 64, Kind::kWgmma, Float16, LeanFeatures<true, false>>();
      }
    } else {
      with_few.template operator()<128, 8, MaskedFeatures<false>>();
      with_few.template operator()<64, 16, MaskedFeatures<true>>();
    }
    if (!found) throw std::invalid_argument("not among the kernels compiled for the emulator");
    return py::make_tuple(out, lse);
  }
  with.template operator()<64, 8, Kind::kMma>();
  with.template operator()<64, 16, Kind::kMma>();
  with.template operator()<128, 8, Kind::kMma>();
  with.template operator()<128, 16, Kind::kMma>();
  with.template operator()<128, 32, Kind::kMma>();
  with.template operator()<256, 8, Kind::kMma>();
  with.template operator()<64, 8, Kind::kTree>();
  with.template operator()<64, 16, Kind::kTree>();
  with.template operator()<256, 8, Kind::kTree>();
  with.template operator()<64, 64, Kind::kWgmma>();
  with.template operator()<64, 128, Kind::kWgmma>();
  with.template operator()<128, 32, Kind::kWgmma>();
  with.template operator()<256, 64, Kind::kWgmma>();
  with.template operator()<128, 8, Kind::kMma, Float8>();
  with.template operator()<128, 32, Kind::kMma, Float8>();
  with.template operator()<256, 16, Kind::kMma, Float8>();
  with.template operator()<128, 8, Kind::kTree, Float8>();
  with.template operator()<576, 16, Kind::kMma>();
  with.template operator()<576, 16, Kind::kTree>();
  with.template operator()<576, 16, Kind::kWgmmaKeys>();
  with.template operator()<576, 32, Kind::kWgmmaKeys>();
  with.template operator()<576, 64, Kind::kWgmma>();
  with.template operator()<576, 16, Kind::kMma, Float8>();
  if (!found) throw std::invalid_argument("not among the kernels compiled for the emulator");
  for (const int32_t counter : counters) {
    if (counter != 0) throw std::logic_error("a counter is left at " + std::to_string(counter));
  }
  return py::make_tuple(out, lse);
}

}  // namespace

PYBIND11_MODULE(emulated_kernel, m) {
#if defined(__SANITIZE_THREAD__)
  m.def("forget_order", [] { emulator::orders_memory = false; });
#endif
  m.def("decode", &decode, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("bf16") = false, py::arg("e5m2") = false, py::arg("k_scale") = py::none(),
        py::arg("v_scale") = py::none(), py::arg("cache_seqlens"), py::arg("block_table"),
        py::arg("cu_seqlens_q"), py::arg("window_left"), py::arg("window_right"), py::arg("scale"),
        py::arg("rows"), py::arg("num_units"), py::arg("items_per_team"), py::arg("team_size"),
        py::arg("cluster_size"), py::arg("slack_tiles"), py::arg("batch_invariant"),
        py::arg("head_pairs") = false, py::arg("tma"), py::arg("stages"), py::arg("wgmma"),
        py::arg("features") = "all", py::arg("seed"));
}
