// From checked arguments to a launch: has the layout planned, allocates, and hands over to the CPU
// implementation or to the launcher.
#include "decode.h"

#include <vector>

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/decode_cpu.h"
#include "decode_check.h"
#include "decode_params.h"
#include "new_tensor.h"
#include "plan/plan_decode.h"
#include "plan/plan_error.h"
#include "plan/workspace.h"
#include "tensor_params.h"
#include "torch_parallel_for.h"
#include "value_checks.h"
#ifdef LEANATTN_WITH_CUDA
#include "cuda/counters.h"
#include "cuda/device_guard.h"
#include "cuda/launch.h"
#include "cuda_stream.h"
#endif

namespace leanattn {
namespace {

#define LEANATTN_PACK_ARGUMENTS                                                                 \
  DecodeArguments {                                                                             \
    q, k_cache, v_cache, cache_seqlens, block_table, cu_seqlens_q, max_seqlen_q, softmax_scale, \
        causal, window_left, window_right, softcap, alibi_slopes, sinks, k_scale, v_scale,      \
        batch_invariant, counters, {                                                            \
      cp_world_size, cp_rank, cp_interleave                                                     \
    }                                                                                           \
  }

// --- Workspace -----------------------------------------------------------------------------------

// What plan_workspace says, in one allocation; none where it says nothing. Counters are in it where
// p has none yet and the caller gives none.
struct Workspace {
  std::optional<Tensor> memory;
  bool has_counters;
};

Workspace make_workspace(const Checker& check, const DecodeArguments& a, DecodeParams& p) {
  p.counter_per_item = has_counter_per_item(p);
  if (a.counters) {
    const int64_t needed = may_leave_partials(p) ? num_counters(p) : 0;
    check.require(a.counters->numel() >= needed, "counters", "must have at least ", needed,
                  " elements for this call, got ", a.counters->numel());
    p.counters = static_cast<int32_t*>(a.counters->mutable_data_ptr());
  }
  const WorkspacePlan plan = plan_workspace(p, !p.counters, a.q.is_cuda());
  Workspace workspace{std::nullopt, plan.counters > 0};
  if (plan.size() == 0) return workspace;
  workspace.memory = empty_beside(a.q, {plan.size()}, ScalarType::Byte);
  char* next = static_cast<char*>(workspace.memory->mutable_data_ptr());
  const auto take = [&](int64_t bytes) -> void* {
    char* part = bytes > 0 ? next : nullptr;
    next += bytes;
    return part;
  };
  if (!p.counters) p.counters = static_cast<int32_t*>(take(plan.counters));
  p.partial_stats = static_cast<float*>(take(plan.partial_stats));
  p.partial_o = static_cast<float*>(take(plan.partial_o));
  p.fold_states = static_cast<SoftmaxState<4>*>(take(plan.fold_states));
  return workspace;
}

// --- Running -------------------------------------------------------------------------------------

void run_cpu(const Checker& check, const DecodeArguments& a, DecodeParams& p) {
  plan_decode_on_cpu(p, static_cast<int>(torch::stable::get_num_threads()));
  const Workspace workspace = make_workspace(check, a, p);
  check_values(check, p, a.max_seqlen_q);
  decode_cpu(p, torch_parallel_for(1));
}

#ifdef LEANATTN_WITH_CUDA
void run_cuda(const Checker& check, const DecodeArguments& a, DecodeParams& p) {
  const int device = a.q.get_device_index();
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_cuda_stream(device);
  plan_decode(p, CudaDevice(device));
  if (!a.counters && may_leave_partials(p)) {
    p.counters = own_counters(num_counters(p), device, stream);
  }
  const Workspace workspace = make_workspace(check, a, p);
  if (value_checks_wanted()) check_values_on_device(check, p, a.max_seqlen_q, stream);
  launch_decode(p, num_counters(p), workspace.has_counters, device, stream);
}
#endif

void run_as_they_are(const Checker& check, const DecodeArguments& a, const Tensor& out,
                     const OptionalTensor& lse) {
  DecodeParams params = make_params(a, out, lse);
  try {
    if (a.q.is_cpu()) return run_cpu(check, a, params);
#ifdef LEANATTN_WITH_CUDA
    run_cuda(check, a, params);
#endif
  } catch (const PlanError& error) {
    check.require(false, error.argument(), error.text());
  }
}

// With q and out in rows of whole 16 bytes.
void run_padded(const Checker& check, DecodeArguments a, Tensor out, const OptionalTensor& lse) {
  const auto padding = [](int64_t head_dim) { return (8 - head_dim % 8) % 8; };
  const int64_t last = out.dim() - 1;
  const int64_t head_dim_v = out.size(last);
  const std::vector<int64_t> behind{0, padding(a.q.size(last))};
  a.q = torch::stable::contiguous(torch::stable::pad(a.q, behind));
  std::vector<int64_t> shape(out.sizes().begin(), out.sizes().end());
  shape.back() += padding(head_dim_v);
  Tensor whole_rows = empty_beside(a.q, shape, out.scalar_type());
  run_as_they_are(check, a, whole_rows, lse);
  torch::stable::copy_(out, torch::stable::narrow(whole_rows, last, 0, head_dim_v));
}

void run(const Checker& check, const DecodeArguments& a, const Tensor& out,
         const OptionalTensor& lse) {
  if (out.numel() == 0) return;
  if (needs_padding(a)) return run_padded(check, a, out, lse);
  run_as_they_are(check, a, out, lse);
}

Tensor empty_like_query(const DecodeArguments& a, int64_t last, bool with_last, ScalarType type) {
  std::vector<int64_t> shape(a.q.sizes().begin(), a.q.sizes().end());
  if (with_last) {
    shape.back() = last;
  } else {
    shape.pop_back();
  }
  return empty_beside(a.q, shape, type);
}

Tensor make_out(const DecodeArguments& a) {
  return empty_like_query(a, a.v_cache.size(3), true, a.q.scalar_type());
}

Tensor make_lse(const DecodeArguments& a) {
  return empty_like_query(a, 0, false, ScalarType::Float);
}

}  // namespace

Tensor decode(LEANATTN_DECODE_ARGUMENTS) {
  const Checker check("decode");
  const DecodeArguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  const Tensor out = make_out(arguments);
  run(check, arguments, out, std::nullopt);
  return out;
}

std::tuple<Tensor, Tensor> decode_with_lse(LEANATTN_DECODE_ARGUMENTS) {
  const Checker check("decode_with_lse");
  const DecodeArguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  const Tensor out = make_out(arguments);
  const Tensor lse = make_lse(arguments);
  run(check, arguments, out, lse);
  return {out, lse};
}

void decode_out(LEANATTN_DECODE_ARGUMENTS, Tensor out) {
  const Checker check("decode_out");
  const DecodeArguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  check_out(check, arguments, out, std::nullopt);
  run(check, arguments, out, std::nullopt);
}

void decode_with_lse_out(LEANATTN_DECODE_ARGUMENTS, Tensor out, Tensor lse) {
  const Checker check("decode_with_lse_out");
  const DecodeArguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  check_out(check, arguments, out, lse);
  run(check, arguments, out, lse);
}

void decode_check(LEANATTN_DECODE_ARGUMENTS, OptionalTensor out) {
  const Checker check("decode");
  const DecodeArguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  if (out) check_out(check, arguments, *out, std::nullopt);
#ifdef LEANATTN_WITH_CUDA
  if (!arguments.q.is_cuda()) return;
  const int device = arguments.q.get_device_index();
  const DeviceGuard guard(device);
  DecodeParams params{};  // all that the choice of a kernel depends on
  params.cache_type = cache_type_of(arguments.k_cache);
  params.head_dim = static_cast<int>(arguments.k_cache.size(3));
  params.head_dim_v = static_cast<int>(arguments.v_cache.size(3));
  params.batch_invariant = arguments.batch_invariant;
  CudaDevice(device).rows_per_item(params, 1);  // throws where none has room
#endif
}

}  // namespace leanattn
