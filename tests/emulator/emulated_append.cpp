// The append kernels on the emulator, as a Python module for the tests.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <optional>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_functions.h"

#include "cuda/append.cu"

namespace py = pybind11;
using namespace leanattn;

namespace {

// An array of any strides, [a, b, heads, dim].
Rows rows_of(py::array& array) {
  const auto stride = [&](int dim) { return array.strides(dim) / array.itemsize(); };
  return {array.mutable_data(), stride(0), stride(1), stride(2), stride(3)};
}

const int32_t* ints(const std::optional<py::array_t<int32_t>>& array) {
  return array ? array->data() : nullptr;
}

// float16 q, k and v as uint16, [B, Sn, H, D] ([1, total, H, D] with cu_seqlens); caches as uint16 or,
// of float8 e4m3, as uint8.
void append(py::array q, py::array k, py::array v, py::array k_cache, py::array v_cache,
            py::array_t<int32_t> cache_seqlens, std::optional<py::array_t<int32_t>> block_table,
            std::optional<py::array_t<int32_t>> cu_seqlens, std::optional<py::array_t<float>> scale,
            std::optional<py::array_t<float>> cos, std::optional<py::array_t<float>> sin,
            bool interleaved) {
  AppendParams p{};
  p.element_type = ElementType::kFloat16;
  p.cache_type = k_cache.itemsize() == 1 ? CacheType::kFloat8E4M3 : CacheType::kFloat16;
  p.batch = static_cast<int>(cache_seqlens.shape(0));
  p.num_tokens = static_cast<int>(k.shape(0) * k.shape(1));
  p.num_heads_q = cos ? static_cast<int>(q.shape(2)) : 0;
  p.num_heads_kv = static_cast<int>(k.shape(2));
  p.head_dim = static_cast<int>(k.shape(3));
  p.head_dim_v = static_cast<int>(v.shape(3));
  p.seqlen_new = static_cast<int>(k.shape(1));
  p.cu_seqlens = ints(cu_seqlens);
  p.cu_seqlens_stride = 1;
  p.cache_seqlens = cache_seqlens.data();
  p.cache_seqlens_stride = 1;
  const int page_size = static_cast<int>(k_cache.shape(1));
  p.capacity = page_size;
  if (block_table) {
    p.block_table = block_table->data();
    p.block_table_batch_stride = block_table->shape(1);
    p.block_table_page_stride = 1;
    p.num_pages = static_cast<int>(k_cache.shape(0));
    p.page_size = page_size;
    p.capacity = page_size * static_cast<int>(block_table->shape(1));
  }
  p.q = rows_of(q);
  p.k = rows_of(k);
  p.v = rows_of(v);
  if (cu_seqlens) p.q.batch_stride = p.k.batch_stride = p.v.batch_stride = 0;
  p.k_cache = rows_of(k_cache);
  p.v_cache = rows_of(v_cache);
  if (scale) p.k_scale = p.v_scale = {scale->data(), 0, 1};  // [Hkv]
  if (cos) {
    const int64_t pairs = cos->shape(1);
    p.rope = {static_cast<int>(pairs),         interleaved,
              static_cast<int>(cos->shape(0)), true,
              {cos->data(), pairs, 1},         {sin->data(), pairs, 1}};
  }
  launch_append(p, nullptr);
}

}  // namespace

PYBIND11_MODULE(emulated_append, m) { m.def("append", &append); }
