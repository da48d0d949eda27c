// Schemas and registration, nothing else. The fakes are in leanattn/ops.py.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "binding/append.h"
#include "binding/append_decode.h"
#include "binding/decode.h"
#include "binding/device_ops.h"
#include "binding/merge.h"
#include "binding/schedule_op.h"

// Context parallelism: of several ranks, which has the tokens that are in this cache.
#define LEANATTN_CP_SCHEMA ", int cp_world_size=1, int cp_rank=0, int cp_interleave=1"

#define LEANATTN_DECODE_SCHEMA                                                                  \
  "Tensor q, Tensor k_cache, Tensor v_cache, Tensor? cache_seqlens=None, Tensor? "              \
  "block_table=None, "                                                                          \
  "*, Tensor? cu_seqlens_q=None, SymInt? max_seqlen_q=None, float? softmax_scale=None, "        \
  "bool causal=True, int window_left=-1, int window_right=-1, float softcap=0.0, "              \
  "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? k_scale=None, Tensor? v_scale=None, " \
  "bool batch_invariant=False, Tensor? counters=None" LEANATTN_CP_SCHEMA

#define LEANATTN_APPEND_DECODE_SCHEMA                                                            \
  "Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, " \
  "Tensor? block_table=None, *, Tensor? cos=None, Tensor? sin=None, bool interleaved=False, "    \
  "Tensor? cu_seqlens=None, SymInt? max_seqlen_q=None, float? softmax_scale=None, "              \
  "bool causal=True, int window_left=-1, int window_right=-1, float softcap=0.0, "               \
  "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? k_scale=None, Tensor? v_scale=None, "  \
  "bool batch_invariant=False, Tensor? counters=None"

STABLE_TORCH_LIBRARY(leanattn, m) {
  m.def("decode(" LEANATTN_DECODE_SCHEMA ") -> Tensor");
  m.def("decode_with_lse(" LEANATTN_DECODE_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("decode_out(" LEANATTN_DECODE_SCHEMA ", Tensor(a!) out) -> ()");
  m.def("decode_with_lse_out(" LEANATTN_DECODE_SCHEMA ", Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("decode_check(" LEANATTN_DECODE_SCHEMA ", Tensor? out=None) -> ()");
  m.def(
      "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, "
      "Tensor? block_table=None, *, Tensor? cu_seqlens=None, Tensor? k_scale=None, "
      "Tensor? v_scale=None" LEANATTN_CP_SCHEMA ") -> ()");
  m.def(
      "rope_append_kv(Tensor(c!) q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor cache_seqlens, Tensor? block_table, Tensor cos, Tensor sin, *, "
      "bool interleaved=False, Tensor? cu_seqlens=None, Tensor? k_scale=None, "
      "Tensor? v_scale=None" LEANATTN_CP_SCHEMA ") -> ()");
  m.def("append_decode(" LEANATTN_APPEND_DECODE_SCHEMA ") -> Tensor");
  m.def("append_decode_with_lse(" LEANATTN_APPEND_DECODE_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("append_decode_out(" LEANATTN_APPEND_DECODE_SCHEMA ", Tensor(c!) out) -> ()");
  m.def(
      "merge_states(Tensor outs, Tensor lses, *, ScalarType? dtype=None) -> (Tensor out, Tensor "
      "lse)");
  m.def(
      "schedule(Tensor cache_seqlens, int num_heads_kv, int group_size, int capacity, int "
      "head_dim, "
      "int num_units, int rows_per_item, int seqlen_q=1, Tensor? cu_seqlens_q=None, "
      "bool causal=True, int window_left=-1, int window_right=-1) -> Tensor");
  m.def("build_info() -> str");
  m.def("warmup(int device_index) -> ()");
  m.def("max_units(int device_index) -> int");
  m.def("counter_bytes(int device_index) -> int");
  m.def("read_floor(Tensor a, Tensor b, Tensor(a!) sink) -> ()");
  m.def("read_rows_floor(Tensor k_cache, Tensor v_cache, Tensor(a!) sink) -> ()");
}

#define LEANATTN_IMPLEMENT_DECODE(m)                                        \
  m.impl("decode", TORCH_BOX(&leanattn::decode));                           \
  m.impl("decode_with_lse", TORCH_BOX(&leanattn::decode_with_lse));         \
  m.impl("decode_out", TORCH_BOX(&leanattn::decode_out));                   \
  m.impl("decode_with_lse_out", TORCH_BOX(&leanattn::decode_with_lse_out)); \
  m.impl("decode_check", TORCH_BOX(&leanattn::decode_check))

#define LEANATTN_IMPLEMENT_OTHERS(m)                                              \
  m.impl("append_kv", TORCH_BOX(&leanattn::append_kv));                           \
  m.impl("rope_append_kv", TORCH_BOX(&leanattn::rope_append_kv));                 \
  m.impl("append_decode", TORCH_BOX(&leanattn::append_decode));                   \
  m.impl("append_decode_with_lse", TORCH_BOX(&leanattn::append_decode_with_lse)); \
  m.impl("append_decode_out", TORCH_BOX(&leanattn::append_decode_out));           \
  m.impl("merge_states", TORCH_BOX(&leanattn::merge_states))

STABLE_TORCH_LIBRARY_IMPL(leanattn, CPU, m) {
  LEANATTN_IMPLEMENT_DECODE(m);
  LEANATTN_IMPLEMENT_OTHERS(m);
  m.impl("schedule", TORCH_BOX(&leanattn::schedule));
}

// Without kernels too: the error of a CPU-only build is better than the dispatcher's.
STABLE_TORCH_LIBRARY_IMPL(leanattn, CUDA, m) {
  LEANATTN_IMPLEMENT_DECODE(m);
  LEANATTN_IMPLEMENT_OTHERS(m);
  m.impl("read_floor", TORCH_BOX(&leanattn::read_floor));
  m.impl("read_rows_floor", TORCH_BOX(&leanattn::read_rows_floor));
}

STABLE_TORCH_LIBRARY_IMPL(leanattn, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&leanattn::build_info));
  m.impl("warmup", TORCH_BOX(&leanattn::warmup));
  m.impl("max_units", TORCH_BOX(&leanattn::max_units));
  m.impl("counter_bytes", TORCH_BOX(&leanattn::counter_bytes_on));
}

// `import leanattn._C` runs the registrations above.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
