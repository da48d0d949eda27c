// The widening of float8, as compiled for LEANATTN_EMULATED_ARCH, as a Python module for the tests.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "emulator.h"

#include "cuda_functions.h"

#include "cuda/kernel/cache_fragments.h"

namespace py = pybind11;

// bytes [n], a multiple of 4, to float16.
py::array_t<uint16_t> widen(const py::array_t<uint8_t, py::array::c_style>& bytes, bool e5m2) {
  py::array_t<uint16_t> result(bytes.size());
  for (py::ssize_t i = 0; i < bytes.size(); i += 4) {
    uint32_t four;
    uint32_t pairs[2];
    std::memcpy(&four, bytes.data() + i, 4);
    leanattn::widen(four, e5m2, pairs[0], pairs[1]);
    std::memcpy(result.mutable_data() + i, pairs, 8);
  }
  return result;
}

PYBIND11_MODULE(emulated_float8, m) { m.def("widen", &widen); }
