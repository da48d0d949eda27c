// wgmma on the emulator, as a Python module for the tests: descriptors, and one product by a warpgroup.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "emulator.h"

#include "cuda_functions.h"

#include "cuda/kernel/wgmma.h"

namespace py = pybind11;
using namespace leanattn;

namespace {

using Bits = py::array_t<uint16_t, py::array::c_style>;  // of float16
using Registers = py::array_t<uint32_t, py::array::c_style>;

// Runs `multiply(d)` by 128 threads, with `memory` in shared memory. Returns d, [128, kColumns / 2].
template <int kColumns, class Multiply>
py::array_t<float> by_a_warpgroup(const Bits& memory, Multiply multiply) {
  py::array_t<float> result({128, kColumns / 2});
  emulator::run(1, 1, 128, memory.nbytes(), 1, [&] {
    if (threadIdx.x == 0) std::memcpy(emulator::cta().smem, memory.data(), memory.nbytes());
    __syncthreads();
    float d[kColumns / 8][4] = {};
    multiply(d);
    std::memcpy(result.mutable_data(threadIdx.x), d, sizeof(d));
  });
  return result;
}

// A and B in shared memory.
py::array_t<float> scores(const Bits& memory, uint64_t a, uint64_t b) {
  return by_a_warpgroup<64>(memory, [&](auto& d) {
    wgmma_begin(d);
    wgmma_scores<__half>(d, a, b, false);
    wgmma_wait(d);
  });
}

// A in registers, [128, 4].
template <int kColumns>
py::array_t<float> values(const Bits& memory, const Registers& a, uint64_t b) {
  return by_a_warpgroup<kColumns>(memory, [&](auto& d) {
    uint32_t p[1][4];
    std::memcpy(p, a.data(threadIdx.x), sizeof(p));
    wgmma_begin(d, p);
    wgmma_values<__half>(d, p[0], b);
    wgmma_wait(d, p);
  });
}

// Of the operand that lies `offset` bytes into shared memory.
uint64_t descriptor(int offset, int block_bytes) {
  uint64_t result;
  emulator::run(1, 1, 128, 1024, 1,
                [&] { result = make_operand(emulator::cta().smem + offset, block_bytes); });
  return result;
}

}  // namespace

PYBIND11_MODULE(emulated_wgmma, m) {
  m.def("descriptor", descriptor, py::arg("offset"), py::arg("block_bytes") = 16);
  m.def("scores", scores);
  m.def("values_64", values<64>);
  m.def("values_256", values<256>);
}
