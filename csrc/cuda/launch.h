// The door to the kernels: no torch on this side of it.
#pragma once

#include <vector>

#include <cuda_runtime.h>

#include "core/append_params.h"
#include "plan/device.h"

namespace leanattn {

constexpr int kMaxDevices = 64;

// Throws with the name of the failed call.
void check_cuda(cudaError_t status, const char* call);

// What a launch depends on, of a device; asked for once a device.
struct DeviceLimits {
  int num_sms;
  int shared_memory_bytes;  // a CTA may have
  int capability;           // 90 for 9.0
  double bytes_per_us;      // of its memory, by its clock and width
};

const DeviceLimits& device_limits(int device);

// What a plan asks of a CUDA device.
class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int device) : device_(device) {}
  int capability() const override;
  // Throws std::runtime_error where no kernel has room.
  ItemShape item_shape(const DecodeParams& params, int64_t rows) const override;
  Machine machine(const DecodeParams& params) const override;

 private:
  int device_;
};

// Launches on `stream` of the current device `device`. `zero_counters`: clear params.counters first.
// LEANATTN_LOADER=cp_async keeps the bulk tensor copies from being used. Throws std::runtime_error,
// PlanError for a knob.
void launch_decode(DecodeParams params, int num_counters, bool zero_counters, int device,
                   cudaStream_t stream);

// Both in one launch: appends, and decodes with what it has appended; params' lengths and q are those
// before it. False, and nothing is launched, where there is no kernel for that, which depends on nothing
// that lies on the device: on architectures before sm_90, for more than one new token a sequence or any
// other decode that is not plain, for head dims beyond 128 and float8, for rows and tables that do not
// begin on 16-byte boundaries or whose rotation is not of whole vectors of 8 pairs. LEANATTN_LAUNCHES=2
// keeps it from being used.
bool launch_append_decode(const DecodeParams& params, const AppendParams& append, int num_counters,
                          bool zero_counters, int device, cudaStream_t stream);

// Loads and sets up every kernel, which a capture must not do, and which the first call of each
// would otherwise pay for.
void warm_up(int device);

bool is_capturing(cudaStream_t stream);

// n values from device memory, `stride` apart; waits for the stream.
std::vector<int32_t> copy_to_host(const int32_t* values, int64_t stride, int n,
                                  cudaStream_t stream);

// Reads a [bytes_a] and b [bytes_b] once, as fast as a kernel can: the floor under any decode.
void launch_read_floor(const void* a, int64_t bytes_a, const void* b, int64_t bytes_b, int* sink,
                       int device, cudaStream_t stream);

// Likewise the rows of params.k and params.v, [B, S, Hkv, D] both, in tiles of 128 tokens of a head.
// Throws where there are no bulk tensor copies.
void launch_read_rows_floor(const DecodeParams& params, int* sink, int device, cudaStream_t stream);

}  // namespace leanattn
