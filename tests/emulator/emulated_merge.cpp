// The merge kernels on the emulator, as a Python module for the tests.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cuda_functions.h"

#include "cuda/merge.cu"

namespace py = pybind11;
using namespace leanattn;

namespace {

// outs [n, rows, D] of any strides, float32 or, as uint16, float16; lses [n, rows].
py::tuple merge(py::array outs, py::array_t<float> lses) {
  const auto stride = [](const py::array& array, int dim) {
    return static_cast<int64_t>(array.strides(dim) / array.itemsize());
  };
  MergeParams p{};
  p.element_type = outs.itemsize() == 2 ? ElementType::kFloat16 : ElementType::kFloat32;
  p.num_states = static_cast<int>(outs.shape(0));
  p.num_rows = static_cast<int>(outs.shape(1));
  p.head_dim = static_cast<int>(outs.shape(2));
  p.num_dims = 1;
  p.sizes[0] = p.num_rows;
  p.outs = outs.data();
  p.outs_state_stride = stride(outs, 0);
  p.outs_strides[0] = stride(outs, 1);
  p.lses = lses.data();
  p.lses_state_stride = stride(lses, 0);
  p.lses_strides[0] = stride(lses, 1);
  py::array out(outs.dtype(), std::vector<py::ssize_t>{p.num_rows, p.head_dim});
  py::array_t<float> lse(p.num_rows);
  p.out = out.mutable_data();
  p.lse = lse.mutable_data();
  launch_merge(p, nullptr);
  return py::make_tuple(out, lse);
}

}  // namespace

PYBIND11_MODULE(emulated_merge, m) { m.def("merge", &merge); }
