// plan/ as a Python module for the tests: a device of the test's own takes the place of the GPU, and
// no tensor is there.
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "plan/knobs.cpp"
#include "plan/plan_decode.cpp"

namespace py = pybind11;
using namespace leanattn;

namespace {

// A GPU with kernels for some numbers of rows, the last of which is the most that it has room for.
struct FakeDevice final : Device {
  int of_capability;
  std::vector<int> row_counts;
  int num_sms;
  std::vector<int> clusters;
  mutable std::vector<int> asked_rows;  // what machine() was asked with

  FakeDevice(int capability, std::vector<int> rows, int sms, std::vector<int> max_clusters)
      : of_capability(capability), row_counts(rows), num_sms(sms), clusters(max_clusters) {}

  int capability() const override { return of_capability; }
  ItemShape item_shape(const DecodeParams& params, int64_t rows) const override {
    const int tile_tokens_log2 = tile_tokens_log2_for(params.head_dim);
    for (const int count : row_counts) {
      if (rows <= count) return {count, tile_tokens_log2};
    }
    return {row_counts.back(), tile_tokens_log2};
  }
  Machine machine(const DecodeParams& params) const override {
    asked_rows.push_back(params.problem.rows_per_item);
    Machine machine{num_sms, 4.8e6, {}};
    std::copy(clusters.begin(), clusters.end(), machine.max_clusters.begin());
    return machine;
  }
};

// A decode of 16-bit contiguous caches [batch, capacity, num_heads_kv, head_dim]. Where only the device
// would know lengths or offsets there is a pointer, which nothing here may follow.
DecodeParams make_params(int batch, int num_heads_kv, int group_size, int head_dim, int capacity,
                         int seqlen_q, bool with_lengths, int total_q, bool batch_invariant) {
  DecodeParams p{};
  p.element_type = ElementType::kBFloat16;
  p.cache_type = CacheType::kBFloat16;
  p.head_dim = p.head_dim_v = head_dim;
  p.k_columns = p.v_columns = head_dim;
  p.num_heads_q = num_heads_kv * group_size;
  Problem& problem = p.problem;
  const auto* device_memory = reinterpret_cast<const int32_t*>(uintptr_t{16});
  problem.cache_seqlens = with_lengths ? device_memory : nullptr;
  problem.cu_seqlens_q = total_q > 0 ? device_memory : nullptr;
  problem.batch = batch;
  problem.num_heads_kv = num_heads_kv;
  problem.group_size = group_size;
  problem.seqlen_q = seqlen_q;
  problem.total_q = total_q;
  problem.capacity = capacity;
  problem.tile_tokens_log2 = tile_tokens_log2_for(head_dim);
  problem.mask = {-1, 0};
  p.k_head_stride = p.v_head_stride = head_dim;
  p.batch_invariant = batch_invariant;
  p.max_nodes = 1;
  return p;
}

}  // namespace

PYBIND11_MODULE(planner, m) {
  py::class_<FakeDevice>(m, "Device")
      .def(py::init<int, std::vector<int>, int, std::vector<int>>(), py::arg("capability"),
           py::arg("row_counts"), py::arg("num_sms"), py::arg("max_clusters"))
      .def_readonly("asked_rows", &FakeDevice::asked_rows);
  py::class_<DecodeParams>(m, "Params")
      .def(py::init(&make_params), py::kw_only(), py::arg("batch"), py::arg("num_heads_kv"),
           py::arg("group_size"), py::arg("head_dim") = 128, py::arg("capacity"),
           py::arg("seqlen_q") = 1, py::arg("with_lengths") = false, py::arg("total_q") = 0,
           py::arg("batch_invariant") = false)
      .def_property_readonly("rows_per_item",
                             [](const DecodeParams& p) { return int{p.problem.rows_per_item}; })
      .def_property_readonly("row_blocks",
                             [](const DecodeParams& p) { return int{p.problem.row_blocks}; })
      .def_property_readonly("num_heads_kv",
                             [](const DecodeParams& p) { return int{p.problem.num_heads_kv}; })
      .def_property_readonly("num_units",
                             [](const DecodeParams& p) { return int{p.layout.num_units}; })
      .def_property_readonly("team_size",
                             [](const DecodeParams& p) { return int{p.layout.team_size}; })
      .def_property_readonly("items_per_team",
                             [](const DecodeParams& p) { return p.layout.items_per_team; })
      .def_property_readonly("num_tiles",
                             [](const DecodeParams& p) { return p.uniform.shares.num_tiles; })
      .def_readonly("head_dim", &DecodeParams::head_dim)
      .def_readonly("head_pairs", &DecodeParams::head_pairs)
      .def_readonly("is_uniform", &DecodeParams::is_uniform)
      .def_readonly("cluster_size", &DecodeParams::cluster_size);
  m.def("plan_decode",
        [](DecodeParams p, const FakeDevice& device) { return plan_decode(p, device), p; });
  m.def("plan_decode_on_cpu",
        [](DecodeParams p, int num_threads) { return plan_decode_on_cpu(p, num_threads), p; });
  static py::exception<PlanError> plan_error(m, "PlanError");
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const PlanError& error) {
      py::set_error(plan_error, (std::string(error.argument()) + ' ' + error.text()).c_str());
    }
  });
}
