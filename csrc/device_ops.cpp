#include "device_ops.h"

#ifdef LEANATTN_WITH_CUDA
#include "cuda/append.h"
#include "cuda/device_guard.h"
#include "cuda/launch.h"
#include "cuda/merge.h"
#include "cuda_stream.h"
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
}

int64_t max_units(int64_t device_index) {
  return device_limits(static_cast<int>(device_index)).num_sms;
}

void read_floor(Tensor a, Tensor b, Tensor sink) {
  const Checker check("read_floor");
  const auto check_input = [&](const Tensor& t, const char* name) {
    check.require(t.is_cuda() && t.is_contiguous(), name, "must be contiguous on CUDA, got strides ",
                  list_string(t.strides()), " on ", device_string(t));
    check.require(t.numel() * t.element_size() % 16 == 0, name, "must be a multiple of 16 bytes, got ",
                  t.numel() * t.element_size());
    check.same_device(t, name, a);
  };
  check_input(a, "a");
  check_input(b, "b");
  check.same_device(sink, "sink", a);
  check.dtype(sink, "sink", ScalarType::Int);
  const int device = a.get_device_index();
  const DeviceGuard guard(device);
  launch_read_floor(a.const_data_ptr(), a.numel() * a.element_size(), b.const_data_ptr(),
                    b.numel() * b.element_size(), static_cast<int*>(sink.mutable_data_ptr()), device,
                    current_cuda_stream(device));
}

#else

void warmup(int64_t) { throw_without_cuda("warmup"); }
int64_t max_units(int64_t) { throw_without_cuda("max_units"); }
void read_floor(Tensor, Tensor, Tensor) { throw_without_cuda("read_floor"); }

#endif

}  // namespace leanattn
