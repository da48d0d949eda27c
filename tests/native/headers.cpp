// The headers that the kernels include, as a Python module for the tests: schedule, softmax state
// and mask, function by function, with nothing computed here.
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/fast_divisor.h"
#include "core/params.h"
#include "core/tree_fold.h"
#include "plan/cost_model.h"
#include "plan/schedule_host.h"
#include "plan/workspace.h"

namespace py = pybind11;
using namespace leanattn;

namespace {

using Lengths = std::optional<py::array_t<int32_t, 0>>;
using State = SoftmaxState<4>;

// The arrays are not copied: whoever makes a Problem keeps them alive, and their strides count.
Problem make_problem(const Lengths& cache_seqlens, const Lengths& cu_seqlens_q, int batch,
                     int num_heads_kv, int group_size, int seqlen_q, int total_q, int capacity,
                     int tile_tokens_log2, int rows_per_item, int window_left, int window_right) {
  const auto data = [](const Lengths& x) { return x ? x->data() : nullptr; };
  const auto stride = [](const Lengths& x) -> int64_t { return x ? x->strides(0) / 4 : 0; };
  return {data(cache_seqlens),
          stride(cache_seqlens),
          data(cu_seqlens_q),
          stride(cu_seqlens_q),
          batch,
          num_heads_kv,
          group_size,
          seqlen_q,
          total_q,
          capacity,
          tile_tokens_log2,
          rows_per_item,
          row_blocks_of(seqlen_q, group_size, rows_per_item),
          {window_left, window_right}};
}

// A segment and everything that the headers say of it.
struct Row {
  int32_t unit, seq, head, row_block, tile_begin, tile_end, item_begin, item_end, item_line;
  int32_t any_begin, any_end, all_begin, all_end, length, query_begin, num_queries;
  int32_t first_unit, last_unit, slot, counter_of_unit, counter_of_item;
  int64_t partial;
  bool whole;
};

Row row_of(const Problem& problem, const Shares& shares, const Segment& s, int unit) {
  const Participants units = participants(shares, s);
  DecodeParams params{};
  params.problem = problem;
  if (!s.is_whole() && own_slot(shares, s, unit) != units.slot(unit))
    throw std::logic_error("own_slot");
  Row row{};
  row.unit = unit;
  row.seq = s.seq;
  row.head = s.head;
  row.row_block = s.row_block;
  row.tile_begin = s.tile_begin;
  row.tile_end = s.tile_end;
  row.item_begin = s.item.begin;
  row.item_end = s.item.end;
  row.item_line = s.item_line;
  row.any_begin = s.keys.any.begin;
  row.any_end = s.keys.any.end;
  row.all_begin = s.keys.all.begin;
  row.all_end = s.keys.all.end;
  row.length = s.sequence.length;
  row.query_begin = s.sequence.query_begin;
  row.num_queries = s.sequence.num_queries;
  row.first_unit = units.first;
  row.last_unit = units.last;
  row.slot = static_cast<int>(units.slot(unit) % 2);
  row.counter_of_unit = counter_index(params, s, units.first);
  params.counter_per_item = true;
  row.counter_of_item = counter_index(params, s, units.first);
  row.partial = units.slot(unit);
  row.whole = s.is_whole();
  return row;
}

py::array_t<Row> to_numpy(const std::vector<Row>& rows) {
  return py::array_t<Row>(static_cast<py::ssize_t>(rows.size()), rows.data());
}

template <bool kPlain>
void append(std::vector<Row>& rows, Walker<kPlain> walker, const Problem& problem,
            const Shares& shares, int unit) {
  Segment segment;
  while (walker.next(segment)) rows.push_back(row_of(problem, shares, segment, unit));
  for (int again = 0; again < 3; ++again) {
    if (walker.next(segment)) throw std::logic_error("a walk that was done went on");
  }
}

// The same by both walkers, of which the plain one must say what the other says, where it can be had.
// make_walker.operator()<kPlain>() gives them.
template <class MakeWalker>
void append_walk(std::vector<Row>& rows, const MakeWalker& make_walker, const Problem& problem,
                 const Shares& shares, int unit) {
  const size_t before = rows.size();
  append(rows, make_walker.template operator()<false>(), problem, shares, unit);
  if (!has_plain_items(problem)) return;
  std::vector<Row> plain;
  append(plain, make_walker.template operator()<true>(), problem, shares, unit);
  if (plain.size() != rows.size() - before ||
      std::memcmp(plain.data(), rows.data() + before, plain.size() * sizeof(Row)) != 0) {
    throw std::logic_error("the plain walk is another");
  }
}

// The segments of all units, from the places that the host finds.
py::array_t<Row> table(const Problem& problem, const HostLine& line) {
  std::vector<Row> rows;
  for (int unit = 0; unit < line.shares().num_units; ++unit) {
    append(rows, line.walk(unit), problem, line.shares(), unit);
  }
  return to_numpy(rows);
}

py::array_t<Row> walk(const Problem& problem, const HostLine& line, int unit) {
  std::vector<Row> rows;
  append(rows, line.walk(unit), problem, line.shares(), unit);
  return to_numpy(rows);
}

// The segments of a unit, from where the sequence begins that holds its first tile.
py::array_t<Row> walk_from(const Problem& problem, const Shares& shares, int unit, int seq,
                           int query_begin, int line) {
  std::vector<Row> rows;
  const Sequence sequence = load_sequence(problem, seq, query_begin);
  append_walk(
      rows,
      [&]<bool kPlain>() {
        return Walker<kPlain>(problem, shares, unit, {seq, query_begin, line}, sequence);
      },
      problem, shares, unit);
  return to_numpy(rows);
}

// The same from the place that a uniform batch's division finds, by the host's prepared item.
py::array_t<Row> walk_uniform(const Problem& problem, const UniformLine& line, int unit) {
  std::vector<Row> rows;
  append_walk(
      rows,
      [&]<bool kPlain>() {
        const Sequence sequence = load_sequence<kPlain>(problem, 0, 0);
        return Walker<kPlain>(problem, line.shares, unit, line.start(unit), sequence, line);
      },
      problem, line.shares, unit);
  return to_numpy(rows);
}

// The segments of all units of a layout with teams; `uniform`: by the host's prepared item.
py::array_t<Row> walk_teams(const Problem& problem, const Layout& layout, bool uniform) {
  std::vector<Row> rows;
  UniformLine line{};
  if (uniform) line = make_uniform_line(problem, layout.num_units);
  for (int unit = 0; unit < layout.num_units; ++unit) {
    SegmentWalker walker(problem, layout, unit, load_team_sequence(problem, layout, unit), line);
    // A unit alone takes whole items and has no shares; row_of divides by what it is given.
    const Shares shares = layout.team_size == 1 ? make_shares(1, 1, unit) : walker.shares();
    append_walk(
        rows,
        [&]<bool kPlain>() {
          const Sequence sequence = load_team_sequence<kPlain>(problem, layout, unit);
          return Walker<kPlain>(problem, layout, unit, sequence, line);
        },
        problem, shares, unit);
  }
  return to_numpy(rows);
}

// For each unfinished segment of a unit: where it would look for the partials, were it the last.
std::vector<std::vector<int64_t>> partials_to_merge(const HostLine& line, int unit) {
  std::vector<std::vector<int64_t>> partials;
  SegmentWalker walker = line.walk(unit);
  for (Segment segment; walker.next(segment);) {
    if (segment.is_whole()) continue;
    partials.emplace_back();
    const Participants units = participants(line.shares(), segment);
    for (int other = units.first; other <= units.last; ++other) {
      partials.back().push_back(units.slot(other));
    }
  }
  return partials;
}

template <int n>
void merge_states(State& state, const std::vector<State>& others) {
  State array[n];
  for (int i = 0; i < n; ++i) array[i] = others[i];
  state.merge(array);
}

void merge(State& state, const std::vector<State>& others) {
  switch (others.size()) {
    case 1:
      return merge_states<1>(state, others);
    case 2:
      return merge_states<2>(state, others);
    case 3:
      return merge_states<3>(state, others);
    case 8:
      return merge_states<8>(state, others);
    default:
      throw std::invalid_argument("merges 1, 2, 3 or 8 states at once");
  }
}

py::tuple pair(const KeyRange& keys) { return py::make_tuple(keys.begin, keys.end); }

}  // namespace

PYBIND11_MODULE(headers, m) {
  PYBIND11_NUMPY_DTYPE(Row, unit, seq, head, row_block, tile_begin, tile_end, item_begin, item_end,
                       item_line, any_begin, any_end, all_begin, all_end, length, query_begin,
                       num_queries, first_unit, last_unit, slot, counter_of_unit, counter_of_item,
                       partial, whole);

  // mask.h
  m.def("visible_keys", [](int window_left, int window_right, int length, int position) {
    return pair(visible_keys({window_left, window_right}, length, position));
  });
  m.def("contains", [](int begin, int end, int key) { return KeyRange{begin, end}.contains(key); });

  // schedule.h and params.h
  py::class_<Problem>(m, "Problem")
      .def(py::init(&make_problem), py::kw_only(), py::arg("cache_seqlens").noconvert(),
           py::arg("cu_seqlens_q").noconvert(), py::arg("batch"), py::arg("num_heads_kv"),
           py::arg("group_size"), py::arg("seqlen_q"), py::arg("total_q"), py::arg("capacity"),
           py::arg("tile_tokens_log2"), py::arg("rows_per_item"), py::arg("window_left"),
           py::arg("window_right"), py::keep_alive<1, 2>(), py::keep_alive<1, 3>());
  py::class_<Sequence>(m, "Sequence")
      .def_readonly("length", &Sequence::length)
      .def_readonly("query_begin", &Sequence::query_begin)
      .def_readonly("num_queries", &Sequence::num_queries);
  py::class_<Shares>(m, "Shares")
      .def_readonly("num_tiles", &Shares::num_tiles)
      .def_readonly("num_units", &Shares::num_units)
      .def("begin", &Shares::begin)
      .def("end", &Shares::end)
      .def("unit_of", &Shares::unit_of);
  py::class_<HostLine>(m, "HostLine")
      .def(py::init<const Problem&, int>(), py::keep_alive<1, 2>())
      .def_property_readonly("shares", &HostLine::shares)
      .def_property_readonly("query_end", &HostLine::query_end)
      .def("sequence", &HostLine::sequence);
  py::class_<UniformLine>(m, "UniformLine")
      .def(py::init(&make_uniform_line))
      .def_readonly("shares", &UniformLine::shares);
  m.def("divide", [](int n, int divisor) {
    const FastDivisor d(divisor);
    return py::make_tuple(n / d, n % d);
  });
  m.def("tile_tokens_log2_for", &tile_tokens_log2_for);
  m.def("first_query_row", &first_query_row);
  m.def("load_sequence", &load_sequence);
  m.def("num_row_blocks", &num_row_blocks);
  m.def("item_rows", &item_rows);
  m.def("item_keys", [](const Problem& problem, const Sequence& sequence, int row_block) {
    const ItemKeys keys = item_keys(problem, sequence, row_block);
    return py::make_tuple(pair(keys.any), pair(keys.all), keys.alike());
  });
  m.def("end_of_empty_items", &end_of_empty_items);
  m.def("tiles_per_head", &tiles_per_head);
  m.def("max_tiles", &max_tiles);
  m.def("make_shares",
        [](int num_tiles, int max_units) { return make_shares(num_tiles, max_units); });
  m.def("table", &table);
  m.def("walk", &walk);
  m.def("walk_from", &walk_from);
  m.def("walk_uniform", &walk_uniform);
  m.def("partials_to_merge", &partials_to_merge);
  py::class_<Layout>(m, "Layout")
      .def(py::init(
               [](int num_units, int items_per_team, int team_size, int num_teams, bool by_steps) {
                 const int slots = num_units / team_size;
                 const int teams = num_teams ? num_teams : slots;
                 const int step = by_steps ? teams : 1;
                 return Layout{num_units, items_per_team, step, team_size, teams, 0, slots};
               }),
           py::arg("num_units"), py::arg("items_per_team"), py::arg("team_size"),
           py::arg("num_teams") = 0, py::arg("by_steps") = false)
      .def_property_readonly("num_units", [](const Layout& l) { return int{l.num_units}; })
      .def_property_readonly("team_slots", [](const Layout& l) { return int{l.team_slots}; })
      .def_readonly("num_teams", &Layout::num_teams)
      .def_readonly("items_per_team", &Layout::items_per_team)
      .def_property_readonly("team_size", [](const Layout& l) { return int{l.team_size}; })
      .def_readonly("slack_tiles", &Layout::slack_tiles);
  m.def("walk_teams", &walk_teams);

  // workspace.h
  py::class_<WorkspacePlan>(m, "WorkspacePlan")
      .def_readonly("counters", &WorkspacePlan::counters)
      .def_readonly("partial_stats", &WorkspacePlan::partial_stats)
      .def_readonly("partial_o", &WorkspacePlan::partial_o)
      .def_readonly("fold_states", &WorkspacePlan::fold_states)
      .def("size", &WorkspacePlan::size);
  m.def(
      "plan_workspace",
      [](const Problem& problem, const Layout& layout, int head_dim, int head_dim_v,
         bool is_uniform, int cluster_size, bool batch_invariant, bool owns_counters,
         bool on_cuda) {
        DecodeParams params{};
        params.problem = problem;
        params.layout = layout;
        params.head_dim = head_dim;
        params.head_dim_v = head_dim_v;
        params.is_uniform = is_uniform;
        params.cluster_size = cluster_size;
        params.batch_invariant = batch_invariant;
        const int tiles = ceil_div(problem.capacity, 1 << problem.tile_tokens_log2);
        params.max_nodes = batch_invariant ? max_nodes(tiles) : 1;
        return plan_workspace(params, owns_counters, on_cuda);
      },
      py::arg("problem"), py::arg("layout"), py::kw_only(), py::arg("head_dim") = 128,
      py::arg("head_dim_v") = 128, py::arg("is_uniform") = true, py::arg("cluster_size") = 1,
      py::arg("batch_invariant") = false, py::arg("owns_counters") = true,
      py::arg("on_cuda") = true);

  // cost_model.h
  py::class_<Machine>(m, "Machine")
      .def(py::init([](int num_sms, double bytes_per_us, const std::vector<int>& max_clusters) {
        Machine machine{num_sms, bytes_per_us, {}};
        std::copy(max_clusters.begin(), max_clusters.end(), machine.max_clusters.begin());
        return machine;
      }));
  py::class_<Items>(m, "Items")
      .def(py::init<int, int, int, double, double, double>(), py::arg("count"), py::arg("tiles"),
           py::arg("rows"), py::arg("tile_bytes"), py::arg("partial_bytes"),
           py::arg("copy_bytes_per_us") = std::numeric_limits<double>::infinity());
  m.def("page_bytes_per_us", &page_bytes_per_us);
  m.attr("kWideBytesPerUs") = kWideBytesPerUs;
  py::class_<LayoutChoice>(m, "LayoutChoice")
      .def_readonly("layout", &LayoutChoice::layout)
      .def_readonly("cluster_size", &LayoutChoice::cluster_size)
      .def_readonly("us", &LayoutChoice::us);
  m.def("stream_k",
        [](const Items& items, const Machine& machine) { return stream_k(items, machine); });
  m.def("teams", &teams);
  m.def("fits", &fits);
  m.def("choose_layout", &choose_layout);

  // softmax_state.h
  py::class_<State>(m, "State")
      .def(py::init<>())
      .def_readwrite("max", &State::max)
      .def_readwrite("sum", &State::sum)
      .def_property(
          "o", [](const State& s) { return std::vector<float>(s.o, s.o + 4); },
          [](State& s, const std::vector<float>& o) {
            for (int d = 0; d < 4; ++d) s.o[d] = o.at(d);
          })
      .def("merge", &merge)
      .def("merge_sink", &State::merge_sink);
  m.def("lse_of", py::overload_cast<float, float>(&lse_of<float>));
  m.def("inverse_of", &inverse_of<float>);
  m.def("exponent_base", &exponent_base<float>);
  m.def("rescale_factor", &rescale_factor<float>);
}
