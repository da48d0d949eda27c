// From checked arguments to a launch: has the layout planned, allocates, and hands over to the CPU
// implementation or to the launcher.
#include "decode.h"

#include <vector>

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include "append.h"
#include "append_value_checks.h"
#include "cpu/decode_cpu.h"
#include "decode_params.h"
#include "new_tensor.h"
#include "plan/plan_decode.h"
#include "plan/plan_error.h"
#include "plan/workspace.h"
#include "tensor_params.h"
#include "torch_parallel_for.h"
#include "value_checks.h"
#ifdef LEANATTN_WITH_CUDA
#include "cuda/append.h"
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

// What an append in front of a decode leaves for it: how many tokens each sequence has then, and q
// rotated.
struct Appended {
  std::optional<Tensor> memory;
  AppendParams append;
};

Appended make_appended(const DecodeArguments& a, const AppendParams& append, DecodeParams& p) {
  Appended appended{std::nullopt, append};
  const bool has_copy = needs_padding(a);  // of q, by run_padded: it is rotated where it lies
  const int64_t row = int64_t{append.num_heads_q} * append.head_dim;  // of q; 0 without RoPE
  const int64_t q_numbers = has_copy ? 0 : append.num_tokens * row;
  const int64_t q_bytes = ceil_div<int64_t>(q_numbers * a.q.element_size(), 16) * 16;
  const int64_t bytes = q_bytes + append.batch * int64_t{sizeof(int32_t)};
  appended.memory = empty_beside(a.q, {bytes}, ScalarType::Byte);
  char* const memory = static_cast<char*>(appended.memory->mutable_data_ptr());
  appended.append.attended_lengths = reinterpret_cast<int32_t*>(memory + q_bytes);
  p.problem.cache_seqlens = appended.append.attended_lengths;
  p.problem.cache_seqlens_stride = 1;
  if (row == 0) return appended;
  if (!has_copy) {
    p.q = memory;
    p.q_batch_stride = append.cu_seqlens ? 0 : append.seqlen_new * row;
    p.q_seq_stride = row;
    p.q_head_stride = append.head_dim;
    p.q_dim_stride = 1;
  }
  appended.append.q_out = {const_cast<void*>(p.q), p.q_batch_stride, p.q_seq_stride,
                           p.q_head_stride, p.q_dim_stride};
  if (has_copy) appended.append.q = appended.append.q_out;
  return appended;
}

void check_values(const Checker& check, const DecodeArguments& a, const DecodeParams& p,
                  const AppendParams* append, const ReadValues& read) {
  if (append) check_append_values(check, *append, read);
  check_decode_values(check, p, a.max_seqlen_q, append, read);
}

void run_cpu(const Checker& check, const DecodeArguments& a, DecodeParams& p,
             const AppendParams* append) {
  plan_decode_on_cpu(p, static_cast<int>(torch::stable::get_num_threads()));
  const Workspace workspace = make_workspace(check, a, p);
  if (value_checks_wanted()) check_values(check, a, p, append, read_from_host);
  std::optional<Appended> appended;
  if (append) {
    appended = make_appended(a, *append, p);
    run_append_cpu(appended->append);
  }
  decode_cpu(p, torch_parallel_for(1));
}

#ifdef LEANATTN_WITH_CUDA
void run_cuda(const Checker& check, const DecodeArguments& a, DecodeParams& p,
              const AppendParams* append) {
  const int device = a.q.get_device_index();
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_cuda_stream(device);
  plan_decode(p, CudaDevice(device));
  if (!a.counters && may_leave_partials(p)) {
    p.counters = own_counters(num_counters(p), device, stream);
  }
  const Workspace workspace = make_workspace(check, a, p);
  if (value_checks_wanted() && !is_capturing(stream)) {
    check_values(check, a, p, append, [&](const int32_t* values, int64_t stride, int n) {
      return copy_to_host(values, stride, n, stream);
    });
  }
  std::optional<Appended> appended;
  if (append) {
    if (launch_append_decode(p, *append, num_counters(p), workspace.has_counters, device, stream)) {
      return;
    }
    appended = make_appended(a, *append, p);
    launch_append(appended->append, stream);
  }
  launch_decode(p, num_counters(p), workspace.has_counters, device, stream);
}
#endif

void run_as_they_are(const Checker& check, const DecodeArguments& a, const Tensor& out,
                     const OptionalTensor& lse, const AppendParams* append) {
  DecodeParams params = make_params(a, out, lse);
  try {
    if (a.q.is_cpu()) return run_cpu(check, a, params, append);
#ifdef LEANATTN_WITH_CUDA
    run_cuda(check, a, params, append);
#endif
  } catch (const PlanError& error) {
    check.require(false, error.argument(), error.text());
  }
}

// With q and out in rows of whole 16 bytes.
void run_padded(const Checker& check, DecodeArguments a, Tensor out, const OptionalTensor& lse,
                const AppendParams* append) {
  const auto padding = [](int64_t head_dim) { return (8 - head_dim % 8) % 8; };
  const int64_t last = out.dim() - 1;
  const int64_t head_dim_v = out.size(last);
  const std::vector<int64_t> behind{0, padding(a.q.size(last))};
  a.q = torch::stable::contiguous(torch::stable::pad(a.q, behind));
  std::vector<int64_t> shape(out.sizes().begin(), out.sizes().end());
  shape.back() += padding(head_dim_v);
  Tensor whole_rows = empty_beside(a.q, shape, out.scalar_type());
  run_as_they_are(check, a, whole_rows, lse, append);
  torch::stable::copy_(out, torch::stable::narrow(whole_rows, last, 0, head_dim_v));
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

}  // namespace

void run_decode(const Checker& check, const DecodeArguments& a, const Tensor& out,
                const OptionalTensor& lse, const AppendParams* append) {
  if (out.numel() == 0) return;
  if (needs_padding(a)) return run_padded(check, a, out, lse, append);
  run_as_they_are(check, a, out, lse, append);
}

Tensor make_out(const DecodeArguments& a) {
  return empty_like_query(a, a.v_cache.size(3), true, a.q.scalar_type());
}

Tensor make_lse(const DecodeArguments& a) {
  return empty_like_query(a, 0, false, ScalarType::Float);
}

Tensor decode(LEANATTN_DECODE_ARGUMENTS) {
  const Checker check("decode");
  const DecodeArguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  const Tensor out = make_out(arguments);
  run_decode(check, arguments, out, std::nullopt);
  return out;
}

std::tuple<Tensor, Tensor> decode_with_lse(LEANATTN_DECODE_ARGUMENTS) {
  const Checker check("decode_with_lse");
  const DecodeArguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  const Tensor out = make_out(arguments);
  const Tensor lse = make_lse(arguments);
  run_decode(check, arguments, out, lse);
  return {out, lse};
}

void decode_out(LEANATTN_DECODE_ARGUMENTS, Tensor out) {
  const Checker check("decode_out");
  const DecodeArguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  check_out(check, arguments, out, std::nullopt);
  run_decode(check, arguments, out, std::nullopt);
}

void decode_with_lse_out(LEANATTN_DECODE_ARGUMENTS, Tensor out, Tensor lse) {
  const Checker check("decode_with_lse_out");
  const DecodeArguments arguments = LEANATTN_PACK_ARGUMENTS;
  check_arguments(check, arguments);
  check_out(check, arguments, out, lse);
  run_decode(check, arguments, out, lse);
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
  CudaDevice(device).item_shape(params, 1);  // throws where none has room
#endif
}

}  // namespace leanattn
