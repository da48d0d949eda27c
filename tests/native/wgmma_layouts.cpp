// What CuTe knows of wgmma, as a Python module for the tests: the descriptors of operands in shared
// memory, where their elements lie there, and which elements a thread's registers hold.
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

// CuTe asks CUDA for an address's place in shared memory. Here memory is an array, and a place is
// counted from its begin.
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
const char* shared_memory = nullptr;
inline std::size_t __cvta_generic_to_shared(const void* pointer) {
  return static_cast<const char*>(pointer) - shared_memory;
}

#include <cute/tensor.hpp>

#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace cute;
using SM90::GMMA::Major;

namespace {

// Of a product's operand: [rows, 16] of A or [columns, 16] of B.
struct Operand {
  uint64_t descriptor;
  std::vector<std::vector<int>> addresses;  // of every element, bytes
};

// All operands of `extent` x 16 in a block of shared memory, [extents][steps of 16].
template <Major major, int extent, class Smem>
std::vector<std::vector<Operand>> operands_of(Smem layout) {
  alignas(1024) static half_t memory[cosize_v<Smem>];
  shared_memory = reinterpret_cast<const char*>(memory);
  const auto block = make_tensor(make_smem_ptr(memory), layout);
  const auto tiles = flat_divide(block, Shape<Int<extent>, _16>{});
  std::vector<std::vector<Operand>> operands(size<2>(tiles));
  for (int i = 0; i < size<2>(tiles); ++i) {
    for (int step = 0; step < size<3>(tiles); ++step) {
      const auto tile = tiles(_, _, i, step);
      Operand operand{SM90::GMMA::make_gmma_desc<major>(tile).desc_, {}};
      for (int row = 0; row < extent; ++row) {
        auto& addresses = operand.addresses.emplace_back();
        for (int k = 0; k < 16; ++k) {
          addresses.push_back(__cvta_generic_to_shared(&tile(row, k)));
        }
      }
      operands[i].push_back(std::move(operand));
    }
  }
  return operands;
}

// K or q, [rows, depth]: of the product's sum, 16 of depth.
template <int extent, int rows, int depth>
auto keys() {
  return operands_of<Major::K, extent>(
      tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<half_t>{}, Shape<Int<rows>, Int<depth>>{}));
}

// V, [tokens, dim]: of the product's sum, 16 tokens.
template <int extent, int tokens, int dim>
auto values() {
  return operands_of<Major::MN, extent>(tile_to_shape(
      SM90::GMMA::Layout_MN_SW128_Atom<half_t>{}, Shape<Int<dim>, Int<tokens>>{}, Step<_2, _1>{}));
}

// [128 threads][elements]: row + 64 * column of what a thread holds.
template <class Layout>
std::vector<std::vector<int>> elements_of(Layout layout) {
  std::vector<std::vector<int>> elements(size<0>(layout));
  for (int thread = 0; thread < size<0>(layout); ++thread) {
    for (int i = 0; i < size<1>(layout); ++i) elements[thread].push_back(layout(thread, i));
  }
  return elements;
}

template <int columns>
using Traits = MMA_Traits<
    std::conditional_t<columns == 64, SM90::GMMA::MMA_64x64x16_F32F16F16_RS<Major::K, Major::MN>,
                       SM90::GMMA::MMA_64x256x16_F32F16F16_RS<Major::K, Major::MN>>>;

}  // namespace

PYBIND11_MODULE(wgmma_layouts, m) {
  py::class_<Operand>(m, "Operand")
      .def_readonly("descriptor", &Operand::descriptor)
      .def_readonly("addresses", &Operand::addresses);
  m.def("keys", keys<64, 128, 128>);
  m.def("values_64", values<64, 128, 64>);
  m.def("values_256", values<256, 64, 512>);
  m.def("a_elements", [] { return elements_of(typename Traits<64>::ALayout{}); });
  m.def("d_elements_64", [] { return elements_of(typename Traits<64>::CLayout{}); });
  m.def("d_elements_256", [] { return elements_of(typename Traits<256>::CLayout{}); });
}
