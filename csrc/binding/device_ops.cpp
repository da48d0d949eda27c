#include "device_ops.h"

#ifdef LEANATTN_WITH_CUDA
#include "cuda/append.h"
#include "cuda/counters.h"
#include "cuda/device_guard.h"
#include "cuda/launch.h"
#include "cuda/merge.h"
#include "cuda_stream.h"
#include "tensor_params.h"
#endif

namespace leanattn {
namespace {

#ifndef LEANATTN_WITH_CUDA
[[noreturn]] void throw_without_cuda(const char* op) {
  throw std::runtime_error(std::string("leanattn::") + op + ": this build has no CUDA kernels");
}
#endif

}  // namespace

std::string build_info() { return LEANATTN_VERSION ";" LEANATTN_ARCHS; }

#ifdef LEANATTN_WITH_CUDA

void warmup(int64_t device_index) {
  const DeviceGuard guard(static_cast<int>(device_index));
  warm_up(static_cast<int>(device_index));
  warm_up_append();
  warm_up_merge();
  reserve_counters(static_cast<int>(device_index));
}

int64_t max_units(int64_t device_index) {
  return device_limits(static_cast<int>(device_index)).num_sms;
}

int64_t counter_bytes_on(int64_t device_index) {
  return counter_bytes(static_cast<int>(device_index));
}

void read_floor(Tensor a, Tensor b, Tensor sink) {
  const Checker check("read_floor");
  const auto check_input = [&](const Tensor& t, const char* name) {
    check.require(t.is_cuda() && t.is_contiguous(), name,
                  "must be contiguous on CUDA, got strides ", strides_of(t), " on ", device_of(t));
    check.require(t.numel() * t.element_size() % 16 == 0, name,
                  "must be a multiple of 16 bytes, got ", t.numel() * t.element_size());
    const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    check.require(address % 16 == 0, name, "must begin on a 16-byte boundary, got address ",
                  address);
    check.same_device(t, name, a);
  };
  check_input(a, "a");
  check_input(b, "b");
  check.same_device(sink, "sink", a);
  check.dtype(sink, "sink", ScalarType::Int);
  const int device = a.get_device_index();
  const DeviceGuard guard(device);
  launch_read_floor(a.const_data_ptr(), a.numel() * a.element_size(), b.const_data_ptr(),
                    b.numel() * b.element_size(), static_cast<int*>(sink.mutable_data_ptr()),
                    device, current_cuda_stream(device));
}

void read_rows_floor(Tensor k_cache, Tensor v_cache, Tensor sink) {
  const Checker check("read_rows_floor");
  check.require(k_cache.is_cuda(), "k_cache", "must be on CUDA, got ", device_of(k_cache));
  check.require(k_cache.dim() == 4 && k_cache.numel() > 0, "k_cache",
                "must be [B, S, Hkv, D] and not empty, got ", shape_of(k_cache));
  check.require(
      k_cache.scalar_type() == ScalarType::Half || k_cache.scalar_type() == ScalarType::BFloat16,
      "k_cache", "must be float16 or bfloat16");
  check.dtype(v_cache, "v_cache", k_cache.scalar_type());
  check.shape(v_cache, "v_cache", "[B, S, Hkv, D]",
              {k_cache.size(0), k_cache.size(1), k_cache.size(2), k_cache.size(3)});
  check.same_device(v_cache, "v_cache", k_cache);
  check.cuda_layout(k_cache, "k_cache", 16);
  check.cuda_layout(v_cache, "v_cache", 16);
  check.same_device(sink, "sink", k_cache);
  check.dtype(sink, "sink", ScalarType::Int);

  DecodeParams p{};
  p.cache_type = cache_type_of(k_cache);
  p.head_dim = p.head_dim_v = static_cast<int>(k_cache.size(3));
  p.k_columns = p.v_columns = p.head_dim;
  p.problem.batch = static_cast<int>(k_cache.size(0));
  p.problem.capacity = static_cast<int>(k_cache.size(1));
  p.problem.num_heads_kv = FastDivisor(static_cast<int>(k_cache.size(2)));
  p.problem.tile_tokens_log2 = 7;
  p.k = k_cache.const_data_ptr();
  p.v = v_cache.const_data_ptr();
  p.k_batch_stride = k_cache.stride(0), p.v_batch_stride = v_cache.stride(0);
  p.k_seq_stride = k_cache.stride(1), p.v_seq_stride = v_cache.stride(1);
  p.k_head_stride = k_cache.stride(2), p.v_head_stride = v_cache.stride(2);
  const int device = k_cache.get_device_index();
  const DeviceGuard guard(device);
  launch_read_rows_floor(p, static_cast<int*>(sink.mutable_data_ptr()), device,
                         current_cuda_stream(device));
}

#else

void warmup(int64_t) { throw_without_cuda("warmup"); }
int64_t max_units(int64_t) { throw_without_cuda("max_units"); }
int64_t counter_bytes_on(int64_t) { throw_without_cuda("counter_bytes"); }
void read_floor(Tensor, Tensor, Tensor) { throw_without_cuda("read_floor"); }
void read_rows_floor(Tensor, Tensor, Tensor) { throw_without_cuda("read_rows_floor"); }

#endif

}  // namespace leanattn
