"""vLLM's attention backend, driven with vLLM's own metadata over schedules as an engine makes them.

The whole engine is not started: vLLM's CPU platform has an attention of its own and asks for no
other. `make test-vllm` runs these tests; where vLLM is not installed they skip.
"""

import ast
import json
import logging
import math
import re
import runpy
import threading
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

import vllm_engine  # noqa: E402
from reference import assert_close, assert_same_bits, reference  # noqa: E402
from test_docs import run_page  # noqa: E402
from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, MultipleOf  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm_engine import LAYER, Engine, as_current, make_config  # noqa: E402

import leanattn.integrations.vllm as integration  # noqa: E402
from leanattn.integrations import vllm_attention, vllm_context  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "writes")

FULL = CUDAGraphMode.FULL
STEPS = 30


@pytest.fixture
def writes(monkeypatch):
    vllm_engine.plain_writes(monkeypatch)


# --- Steps ---------------------------------------------------------------------------------------

FEATURES = {
    "plain": {},
    "hnd": dict(layout="HND"),
    "block-of-48": dict(block_size=48, layout="HND"),
    "token-blocks": dict(block_size=1, num_blocks=900),
    "bf16": dict(dtype=torch.bfloat16),
    "odd-group": dict(heads=15, kv_heads=3, head_size=40),
    "wide": dict(heads=4, kv_heads=1, head_size=256),
    "window": dict(sliding_window=20),
    "softcap": dict(logits_soft_cap=5.0),
    "alibi": dict(alibi_slopes=[2.0**-i for i in range(1, 9)]),
    "sinks": dict(sinks=torch.linspace(-2, 3, 8, dtype=torch.float16)),
    "gpt-oss": dict(sinks=torch.linspace(-2, 3, 8, dtype=torch.float16), sliding_window=33),
    "fp8": dict(kv_cache_dtype="fp8", scales=(torch.tensor(0.5), torch.tensor(2.0))),
    "fp8-heads": dict(kv_cache_dtype="fp8",
                      scales=(torch.tensor([0.5, 2.0]), torch.tensor([4.0, 0.25]))),
    "e5m2": dict(kv_cache_dtype="fp8_e5m2", layout="HND"),
}  # fmt: skip


def options_on(device, options):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("features", FEATURES)
def test_random_schedules(features, device):
    """Prefills, whole and in chunks, decodes, preemption and shared prefixes, in any mixture."""
    engine = Engine(device, **options_on(device, FEATURES[features]), seed=features)
    forms = set()
    for _ in range(STEPS):
        counts = engine.random_step()
        forms.add(engine.run(counts).query_len is None)
    assert forms == {True, False}


@pytest.mark.parametrize("query_len", [1, 4])
def test_uniform_steps_have_the_form_of_the_lean_kernels(query_len, device, monkeypatch):
    """Decodes and speculative verification: no cu_seqlens_q."""
    config = make_config(drafts=query_len - 1)
    engine = Engine(device, config=config)
    assert engine.builder.reorder_batch_threshold == query_len
    for prompt in (7, 30, 19):
        engine.add(prompt)
    engine.run([7, 30, 19])
    calls = []
    decode_out = vllm_attention._decode_out

    def counted(*args, **options):
        calls.append((args[0].shape, options.get("cu_seqlens_q")))
        decode_out(*args, **options)

    monkeypatch.setattr(vllm_attention, "_decode_out", counted)
    for _ in range(3):
        assert engine.run([query_len] * 3).query_len == query_len
    shape = (3, 8, 64) if query_len == 1 else (3, query_len, 8, 64)
    assert calls == [(shape, None)] * 3


def test_rows_beyond_the_tokens_of_a_piecewise_step(device):
    """A piecewise graph pads the tensors and not the metadata: the rows beyond are not touched."""
    engine = Engine(device)
    engine.add(9)
    engine.run([9])
    common, key, value = engine.schedule([1])
    padded = torch.nn.functional.pad
    query = torch.randn(4, 8, 64, dtype=torch.float16, device=device)
    key, value = (padded(x, (0, 0, 0, 0, 0, 3), value=math.nan) for x in (key, value))
    output = torch.full_like(query, 7)
    engine.impl.do_kv_cache_update(engine.layer, key, value, engine.kv_cache, common.slot_mapping)
    engine.impl.forward(
        engine.layer, query, key, value, engine.kv_cache, engine.builder.build(0, common), output
    )
    engine.check(query[:1], output[:1], [1])
    assert (output[1:] == 7).all()


@pytest.mark.parametrize("query_len", [1, 3])
def test_padded_sequences(query_len, device):
    """Sequences of length 0 behind the real ones, as a graph's padding has them."""
    engine = Engine(device)
    for prompt in (20, 3):
        engine.add(prompt)
    engine.run([20, 3])
    engine.run([query_len] * 2, num_reqs=5, num_tokens=5 * query_len)


@pytest.mark.parametrize("apart", ["first", "second"])
def test_k_and_v_apart(apart, device):
    engine = Engine(device, num_blocks=20)
    dim = 0 if apart == "first" else 1
    shape = [20, 16, 2, 64]
    shape.insert(dim, 2)
    engine.kv_cache = torch.full(shape, math.nan, dtype=torch.float16, device=device)
    engine.add(40)
    engine.run([40])
    engine.run([1])
    assert engine.kv_cache.select(dim, 0).isfinite().any()
    assert engine.kv_cache.select(dim, 1).isfinite().any()


@pytest.mark.parametrize("window", [None, 9])
def test_not_causal(window, device):
    """As cross-attention has it: all of the sequence, or as far after a query as before it."""
    engine = Engine(device, sliding_window=window, attn_type=AttentionType.ENCODER_DECODER)
    for prompt in (20, 33):
        engine.add(prompt)
    common, key, value = engine.schedule([20, 33])
    common.causal = False
    query = torch.randn(53, 8, 64, dtype=torch.float16, device=device)
    output = torch.empty_like(query)
    engine.impl.do_kv_cache_update(engine.layer, key, value, engine.kv_cache, common.slot_mapping)
    engine.impl.forward(
        engine.layer, query, key, value, engine.kv_cache, engine.builder.build(0, common), output
    )
    engine.check(query, output, [20, 33], causal=False)


def test_another_block_table_for_the_same_step(device):
    """As for the second of two groups of layers, whose metadata differ in their tables alone."""
    engines = Engine(device, seed=1), Engine(device, seed=2)
    for engine in engines:
        engine.add(30)
        engine.add(5)
        engine.run([30, 5])
    (common, *_), (other, key, value) = (engine.schedule([1, 1]) for engine in engines)
    built = engines[0].builder.build(0, common)
    assert engines[0].builder.supports_update_block_table
    updated = engines[0].builder.update_block_table(
        built, other.block_table_tensor, other.slot_mapping
    )
    query = torch.randn(2, 8, 64, dtype=torch.float16, device=device)
    output = torch.empty_like(query)
    second = engines[1]
    second.impl.do_kv_cache_update(second.layer, key, value, second.kv_cache, updated.slot_mapping)
    second.impl.forward(second.layer, query, key, value, second.kv_cache, updated, output)
    second.check(query, output, [1, 1])
    assert built.block_table.data_ptr() == common.block_table_tensor.data_ptr()


def test_sinks_become_fp32_once(device):
    """When the weights have come, and once more when others come."""
    sinks = torch.zeros(8, dtype=torch.bfloat16, device=device)
    engine = Engine(device, sinks=sinks)
    sinks.fill_(1.5)
    engine.impl.process_weights_after_loading(torch.bfloat16)
    held = engine.impl._options_of(engine.layer, True)["sinks"]
    assert held.dtype == torch.float32 and (held == 1.5).all()
    assert engine.impl._options_of(engine.layer, True)["sinks"] is held


# --- What vLLM makes of a backend ----------------------------------------------------------------


def wrapped(engine, backend):
    """The engine, with the builder of a backend that vLLM has derived from leanattn's."""
    assert issubclass(backend, vllm_attention.LeanAttentionBackend)
    spec = engine.builder.kv_cache_spec
    engine.builder = backend.get_builder_cls()(spec, [LAYER], engine.config, engine.device)
    return engine


def test_chunked_local_attention(monkeypatch):
    """Llama 4's: every chunk of 32 tokens becomes a sequence of its own."""
    monkeypatch.setattr("vllm.utils.torch_utils.PIN_MEMORY", False)  # it takes a GPU for granted
    from vllm.model_executor.layers.attention import chunked_local_attention as layers

    backend = layers.create_chunked_local_attention_backend(vllm_attention.LeanAttentionBackend, 32)
    engine = wrapped(Engine("cpu"), backend)

    def check(query, output, counts):
        row = 0
        for sequence, count in zip(engine.sequences, counts):
            for position in range(sequence.length, sequence.length + count):
                case = engine.case(sequence, query[row : row + 1], position + 1)
                begin = position // 32 * 32
                case["k_cache"], case["v_cache"] = (
                    case[name][:, begin:] for name in ("k_cache", "v_cache")
                )
                assert_close(output[None, row : row + 1], reference(**case)[1].float(), **case)
                row += 1

    engine.check = check
    for prompt in (70, 20):
        engine.add(prompt)
    for counts in ([50, 20], [20, 1], [1, 1], [3, 30], [1, 1]):
        engine.run(counts)


def test_fast_prefill_of_layers_that_share_a_cache():
    """Of a prompt only the queries are given whose logits are wanted."""
    backend = vllm_engine.utils.create_fast_prefill_custom_backend(
        "FastPrefill", vllm_attention.LeanAttentionBackend
    )
    engine = wrapped(Engine("cpu"), backend)
    for prompt in (20, 33):
        engine.add(prompt)
    common, key, value = engine.schedule([20, 33])
    common.logits_indices_padded = torch.tensor([19, 52, 52, 52])
    common.num_logits_indices = 2
    engine.impl.do_kv_cache_update(engine.layer, key, value, engine.kv_cache, common.slot_mapping)
    built = engine.builder.build(0, common)
    assert built.query_len == 1 and built.num_logits_indices == 2
    query = torch.randn(4, 8, 64, dtype=torch.float16)
    output = torch.zeros_like(query)
    engine.impl.forward(engine.layer, query, None, None, engine.kv_cache, built, output)
    engine.advance([19, 32])
    engine.check(query[:2], output[:2], [1, 1])


def test_cross_attention():
    """Queries of the decoder, over all that the encoder gave; the first step writes it."""
    from vllm.model_executor.layers.attention import cross_attention as layers

    backend = layers.create_cross_attention_backend(vllm_attention.LeanAttentionBackend)
    engine = wrapped(Engine("cpu", attn_type=AttentionType.ENCODER_DECODER), backend)
    engine.impl.__class__ = backend.get_impl_cls()
    encoded = [20, 33]
    for length in encoded:
        engine.add(length)
    common, key, value = engine.schedule(encoded)
    common.encoder_seq_lens, common.encoder_seq_lens_cpu = common.seq_lens, common.seq_lens.numpy()
    for step, counts in enumerate(([4, 2], [1, 1], [1, 1])):
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        upper = starts.diff() + step
        decoder = common.replace(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens_cpu_upper_bound=upper,
            num_actual_tokens=sum(counts), max_query_len=max(counts),
        )  # fmt: skip
        built = engine.builder.build(0, decoder)
        assert built.causal is False
        query = torch.randn(sum(counts), 8, 64, dtype=torch.float16)
        output = torch.empty_like(query)
        given = (None, None) if step else (key, value)
        engine.impl.forward(engine.layer, query, *given, engine.kv_cache, built, output)
        row = 0
        for sequence, count, length in zip(engine.sequences, counts, encoded):
            rows, row = slice(row, row + count), row + count
            case = engine.case(sequence, query[rows], length, causal=False)
            assert_close(output[None, rows], reference(**case)[1].float(), **case)


# --- Prefills by vLLM's FlashAttention -----------------------------------------------------------


class OtherAttention:
    """In place of vLLM's FlashAttention, where that cannot run: the same call by fp64."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []

    def forward(self, layer, query, key, value, kv_cache, metadata, output):
        m = metadata
        self.calls.append(m.query_start_loc.diff().tolist())
        assert m.max_query_len >= max(self.calls[-1]) and m.num_actual_tokens <= query.shape[0]
        k_cache, v_cache = self.engine.impl._split(kv_cache)
        for i, length in enumerate(m.seq_lens.tolist()):
            begin, end = m.query_start_loc[i : i + 2].tolist()
            blocks = m.block_table[i, : -(-length // self.engine.block_size)].long()
            k, v = (cache[blocks].flatten(0, 1)[None, :length] for cache in (k_cache, v_cache))
            out, _ = reference(query[None, begin:end], k, v, softmax_scale=self.engine.scale)
            output[begin:end] = out[0].to(output.dtype)


def test_prefills_beside_decodes(device):
    """Decodes and short verifications go to leanattn, the sequences behind them to vLLM."""
    engine = Engine(device, config=make_config(drafts=2))
    engine.impl.flash = OtherAttention(engine)
    for prompt in (9, 30, 22, 41):
        engine.add(prompt)
    assert engine.run([9, 30, 22, 17]).num_seqs == 0
    assert engine.run([1, 3, 2, 24]).num_seqs == 3
    engine.add(25)
    built = engine.run([3, 3, 3, 3, 25])
    assert (built.num_seqs, built.query_len) == (4, 3)
    assert engine.run([1] * 5).prefill is None
    assert engine.impl.flash.calls == [[9, 30, 22, 17], [24], [25]]


@pytest.mark.parametrize("why", ["graph", "batch-invariant", "block of 24", "fp8"])
def test_prefills_that_stay(why, device, monkeypatch):
    """In graphs, in vLLM's batch-invariant mode and where FlashAttention would not do."""
    if why == "batch-invariant":
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    options = {
        "block of 24": dict(block_size=24), "fp8": dict(kv_cache_dtype="fp8", with_flash=True),
    }.get(why, {})  # fmt: skip
    engine = Engine(device, **options)
    if why == "fp8":
        assert engine.impl.flash is None
    else:
        engine.impl.flash = OtherAttention(engine)
    engine.add(20)
    engine.add(6)
    common, _, _ = engine.schedule([20, 6])
    builder = engine.builder
    built = (
        builder.build_for_cudagraph_capture(common) if why == "graph" else builder.build(0, common)
    )
    assert built.prefill is None and built.num_seqs == 2 and built.query_len is None


@pytest.mark.gpu
@pytest.mark.not_emulated
def test_prefills_by_flash_attention(device):
    """vLLM's own, over a random schedule."""
    engine = Engine(device, with_flash=True)
    if engine.impl.flash is None:
        pytest.skip("needs vLLM's FlashAttention")
    engine.check = lambda *step: check_loosely(engine, *step)
    split = [engine.run(engine.random_step()).prefill is not None for _ in range(STEPS)]
    assert any(split) and not all(split)


# --- CUDA graphs ---------------------------------------------------------------------------------


class Graph:
    """A step's kernels, captured once, over tensors that stay where they are: vLLM's full graph. On
    the CPU the same calls are made again, with what was decided when it was captured."""

    def __init__(self, engine, counts, num_reqs, num_tokens):
        self.engine, self.num_reqs, self.num_tokens = engine, num_reqs, num_tokens
        common, key, value = engine.schedule(counts, num_reqs=num_reqs, num_tokens=num_tokens)
        self.common = common
        self.key, self.value = key, value
        self.query = torch.randn(num_tokens, engine.heads, engine.head_size)
        self.query = self.query.to(engine.device, engine.dtype)
        self.output = torch.empty_like(self.query)
        common.slot_mapping.fill_(-1)  # as in vLLM's dummy runs
        self.metadata = engine.builder.build_for_cudagraph_capture(common)
        if engine.device.type == "cuda":
            self._step()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()
            self._step = self.graph.replay

    def _step(self):
        engine = self.engine
        engine.impl.do_kv_cache_update(
            engine.layer, self.key, self.value, engine.kv_cache, self.common.slot_mapping
        )
        engine.impl.forward(
            engine.layer, self.query, self.key, self.value, engine.kv_cache, self.metadata,
            self.output,
        )  # fmt: skip

    def replay(self, counts):
        """As `Engine.run`; every tensor has a step's content written into it first."""
        engine = self.engine
        common, key, value = engine.schedule(
            counts, num_reqs=self.num_reqs, num_tokens=self.num_tokens
        )
        for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping"):
            getattr(self.common, name).copy_(getattr(common, name))
        self.key.copy_(key)
        self.value.copy_(value)
        self.query.normal_()
        self.output.fill_(math.nan)
        engine.builder.build(0, common)  # what vLLM builds for a replay, and nobody reads
        self._step()
        engine.check(self.query, self.output, counts)
        engine.advance(counts)


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("features", ["plain", "gpt-oss", "e5m2"])
def test_a_graph_of_uniform_steps(features, query_len, device):
    """Replayed with other lengths and tables, and with fewer sequences than it has."""
    config = make_config(drafts=query_len - 1)
    engine = Engine(device, config=config, **options_on(device, FEATURES[features]))
    for prompt in (30, 7, 21, 16, 40):
        engine.add(prompt)
    engine.run([30, 7, 21, 16, 40])
    graph = Graph(engine, [query_len] * 5, 6, 6 * query_len)
    assert graph.metadata.query_len is None  # the sixth has none: not uniform
    graph = Graph(engine, [query_len] * 5, 5, 5 * query_len)
    assert graph.metadata.query_len == query_len
    for step in range(12):
        if step == 3:
            engine.finish(engine.sequences[1])
        if step == 6:
            engine.preempt(engine.sequences[0])
            first = engine.sequences.pop(0)
            engine.sequences.append(first)
            engine.run([query_len] * 3 + [len(first.keys)])
        graph.replay([query_len] * len(engine.sequences))


@pytest.mark.parametrize("captured", ["uniform", "mixed"])
@pytest.mark.parametrize("features", ["plain", "window", "fp8-heads"])
def test_a_graph_of_any_step(features, captured, device):
    """cudagraph_mode FULL keeps one graph a size: whatever batch it saw when it was captured, any
    other may be replayed."""
    config = make_config(FULL)
    engine = Engine(device, config=config, **options_on(device, FEATURES[features]))
    for prompt in (30, 7, 21, 16):
        engine.add(prompt)
    engine.run([30, 7, 21, 16])
    if captured == "uniform":
        graph = Graph(engine, [1] * 4, 4, 4)
        steps = [1, 1, 1, 1], [1, 1, 1, 1]
        fewer = [1, 1, 2], [2, 1, 1], [1, 0, 3], [1, 1, 1]
    else:
        graph = Graph(engine, [1, 1, 2, 20], 6, 64)
        steps = [1, 1, 1, 1], [1, 1, 1, 30], [5, 1, 9, 2], [16, 16, 16, 16], [1, 1, 1, 1]
        fewer = [2, 1, 1], [1, 1, 1]
    assert graph.metadata.query_len is None
    for counts in steps:
        graph.replay(counts)
    engine.finish(engine.sequences[0])
    for counts in fewer:
        graph.replay(counts)


def test_which_graphs_are_captured_uniform():
    """Those of vLLM's separate routine, whose replays are uniform without exception."""
    for mode, query_len in (
        (CUDAGraphMode.FULL_AND_PIECEWISE, 1), (CUDAGraphMode.FULL_DECODE_ONLY, 1), (FULL, None),
    ):  # fmt: skip
        engine = Engine("cpu", config=make_config(mode))
        engine.add(1)
        engine.add(1)
        common, _, _ = engine.schedule([1, 1])
        assert engine.builder.build_for_cudagraph_capture(common).query_len == query_len, mode
        assert engine.builder.build(0, common).query_len == 1
    support = engine.builder.get_cudagraph_support(engine.config, None)
    assert support == AttentionCGSupport.ALWAYS


@pytest.mark.gpu
@pytest.mark.not_emulated
@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL_AND_PIECEWISE, FULL])
def test_no_host_synchronisation(mode, device):
    """Neither the builder nor a layer waits for the GPU, nor keeps memory from step to step."""
    engine = Engine(device, config=make_config(mode, drafts=1))
    for prompt in (30, 7, 21):
        engine.add(prompt)
    engine.run([30, 7, 21])
    for counts in ([1, 1, 1], [2, 2, 2], [1, 1, 9]) * 3:
        common, key, value = engine.schedule(counts)
        query = torch.randn(sum(counts), 8, 64, dtype=torch.float16, device=device)
        output = torch.empty_like(query)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            built = engine.builder.build(0, common)
            engine.impl.forward(engine.layer, query, key, value, engine.kv_cache, built, output)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        del built
        assert torch.cuda.memory_allocated() == held


# --- Batch invariance ----------------------------------------------------------------------------


def test_batch_invariant_mode(device, monkeypatch):
    """VLLM_BATCH_INVARIANT: a sequence's bits depend neither on its company nor on how its prompt
    was cut into chunks, and the keys are still split."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setenv("LEANATTN_NUM_UNITS", "7")
    engine = Engine(device, max_len=400)
    assert engine.impl._options["batch_invariant"]
    sequence = engine.add(300)
    query = torch.randn(300, 8, 64, dtype=torch.float16, device=device)
    results = []
    for company, chunks in ((0, [300]), (3, [100, 199, 1]), (5, [64] * 4 + [44])):
        for other in engine.sequences[1:]:
            engine.finish(other)
        engine.preempt(sequence)
        for i in range(company):
            engine.add(9 + i)
        output = torch.empty_like(query)
        for chunk in chunks:
            begin = sequence.length
            common, key, value = engine.schedule([chunk] + [1] * company)
            others = torch.randn(company, 8, 64, dtype=torch.float16, device=device)
            rows = torch.cat((query[begin : begin + chunk], others))
            out = torch.empty_like(rows)
            built = engine.builder.build(0, common)
            engine.impl.do_kv_cache_update(
                engine.layer, key, value, engine.kv_cache, common.slot_mapping
            )
            engine.impl.forward(engine.layer, rows, key, value, engine.kv_cache, built, out)
            output[begin : begin + chunk] = out[:chunk]
            engine.advance([chunk] + [1] * company)
        results.append(output)
    for other in results[1:]:
        assert_same_bits(other, results[0])


# --- The cache -----------------------------------------------------------------------------------


def test_slots_of_minus_one_are_not_written(device):
    """As in vLLM's dummy runs, whose lengths are above 0 and whose tables are stale."""
    engine = Engine(device)
    engine.add(20)
    common, key, value = engine.schedule([20])
    common.slot_mapping[5:] = -1
    engine.impl.do_kv_cache_update(engine.layer, key, value, engine.kv_cache, common.slot_mapping)
    assert int(engine.kv_cache.isfinite().all(-1).sum()) == 5 * engine.kv_heads


def test_layers_that_share_a_cache_write_nothing(device):
    engine = Engine(device, kv_sharing_target_layer_name="layers.3.attn")
    engine.add(20)
    common, key, value = engine.schedule([20])
    engine.impl.do_kv_cache_update(engine.layer, key, value, engine.kv_cache, common.slot_mapping)
    assert not engine.kv_cache.isfinite().any()


def test_a_profiling_run_gives_zeros(device):
    engine = Engine(device)
    query = torch.randn(5, 8, 64, dtype=torch.float16, device=device)
    output = torch.full_like(query, 3)
    assert engine.impl.forward(engine.layer, query, None, None, None, None, output) is output
    assert (output == 0).all()


# --- What vLLM asks the backend ------------------------------------------------------------------


def reasons(backend=vllm_attention.LeanAttentionBackend, **given):
    configuration = dict(
        head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=16, use_mla=False,
        has_sink=False, use_sparse=False, use_mm_prefix=False, use_per_head_quant_scales=False,
        device_capability=DeviceCapability(9, 0), attn_type=AttentionType.DECODER,
    )  # fmt: skip
    return backend.validate_configuration(**configuration | given)


@pytest.mark.parametrize(
    "given",
    [
        {}, dict(block_size=None), dict(block_size=1), dict(block_size=784), dict(head_size=8),
        dict(head_size=256), dict(dtype=torch.float16), dict(kv_cache_dtype="fp8"),
        dict(kv_cache_dtype="fp8_e5m2"), dict(has_sink=True), dict(has_sliding_window=True),
        dict(use_non_causal=True), dict(use_batch_invariant=True), dict(use_kv_connector=True),
        dict(use_per_head_quant_scales=True), dict(attn_type=AttentionType.ENCODER_DECODER),
        dict(device_capability=DeviceCapability(8, 0)),
    ],
    ids=str,
)  # fmt: skip
def test_supported(given):
    assert reasons(**given) == []


@pytest.mark.parametrize(
    "given, reason",
    [
        (dict(head_size=100), "head_size"), (dict(head_size=512), "head_size"),
        (dict(dtype=torch.float32), "dtype"),
        (dict(kv_cache_dtype="fp8_per_token_head"), "kv_cache_dtype"),
        (dict(kv_cache_dtype="nvfp4"), "kv_cache_dtype"),
        (dict(kv_cache_dtype="fp8", head_size=72), "multiple of 16, got 72"),
        (dict(use_mm_prefix=True), "multimodal"), (dict(use_sparse=True), "sparse"),
        (dict(use_mla=True), "MLA"), (dict(use_pcp=True), "PCP"),
        (dict(attn_type=AttentionType.ENCODER_ONLY), "attention type"),
        (dict(device_capability=DeviceCapability(7, 5)), "capability"),
    ],
    ids=str,
)  # fmt: skip
def test_refused(given, reason):
    (said,) = reasons(**given)
    assert reason in said


def test_blocks_that_vllm_chooses():
    """Any size is taken, but a window's own size is not to be 1."""
    from vllm.model_executor.layers.attention.attention import _largest_kernel_block_within

    backend = vllm_attention.LeanAttentionBackend
    assert _largest_kernel_block_within(backend, 1024, None, 16) == 16
    assert any(isinstance(s, MultipleOf) for s in backend.get_supported_kernel_block_sizes())
    assert all(backend.supports_block_size(size) for size in (1, 16, 48, 784))
    for layout in ("NHD", "HND"):
        with vllm_engine.cache_layout(layout):
            assert backend.indexes_kv_by_block_stride()


@pytest.mark.parametrize("what", ["output_scale", "output_block_scale"])
def test_quantised_output_is_refused(what):
    engine = Engine("cpu")
    with pytest.raises(NotImplementedError, match="leanattn: a quantised output"):
        engine.impl.forward(
            engine.layer, None, None, None, None, None, torch.empty(1), **{what: torch.ones(1)}
        )
    assert not engine.impl.supports_quant_query_input


def test_other_masks_are_refused():
    engine = Engine("cpu")
    engine.add(3)
    common, _, _ = engine.schedule([3])
    common.causal = torch.ones(1, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="causal for some sequences"):
        engine.builder.build(0, common)
    config = make_config()
    config.model_config.rswa_window = 64
    with pytest.raises(ValueError, match="reference sliding windows.* 64 tokens"):
        Engine("cpu", config=config)


# --- Registration --------------------------------------------------------------------------------


@pytest.fixture
def registered():
    custom = AttentionBackendEnum.CUSTOM
    custom.clear_override()
    yield custom
    custom.clear_override()


def test_register(registered):
    """Twice, as vLLM may; both kinds of models are served by the one name."""
    integration.register()
    integration.register()
    with as_current(make_config()):
        backend = registered.get_class()
    assert backend.get_name() == registered.name and not backend.is_mla()
    with as_current(make_config(use_mla=True)):
        latent = registered.get_class()
    assert latent.get_name() == registered.name and latent.is_mla()
    for cls in (backend, latent):  # by which vLLM goes on
        module, name = cls.full_cls_name()
        assert getattr(__import__(module, fromlist=[name]), name) is cls
    assert not registered.get_class().is_mla()  # outside of any config


def test_vllm_finds_the_entry_point():
    points = metadata.entry_points(group="vllm.general_plugins")
    if "leanattn" not in points.names:
        pytest.skip("leanattn is not installed, only importable")
    assert points["leanattn"].load() is integration.register


def test_another_plugin_keeps_its_name(registered, caplog):
    from vllm.v1.attention.backends.registry import register_backend

    register_backend(registered, "somebody.Else")
    integration.register()
    assert registered.get_path() == "somebody.Else"
    assert "somebody.Else already" in caplog.text


@pytest.mark.parametrize("version", ["0.25.1", "0.99.0"])
def test_versions_whose_interface_does_not_match(version, registered, monkeypatch, caplog):
    """One sentence, and of a kind that vLLM shows."""
    monkeypatch.setattr(integration, "_version", lambda: version)
    monkeypatch.setattr(vllm_attention, "_FIELDS", {"num_reqs", "nonsense"})
    integration.register()
    said = "the version" if version < "0.26" else "CommonAttentionMetadata has no nonsense"
    said = "too old" if version < "0.26" else said
    with pytest.raises(RuntimeError, match=rf"vLLM {version} it cannot be used \({said}\)"):
        registered.get_class()


def test_a_newer_version_that_looks_alike(registered, monkeypatch, caplog):
    monkeypatch.setattr(integration, "_version", lambda: "0.99.0")
    integration.register()
    with caplog.at_level(logging.WARNING):
        assert registered.get_class() is vllm_attention.LeanAttentionBackend
    assert "vLLM 0.99.0 has not been tried" in caplog.text


def test_the_version_is_one_that_was_tried():
    assert metadata.version("vllm").split("+")[0] in integration.TRIED


# --- Decode context parallelism ------------------------------------------------------------------


class Rank:
    """A rank's view of vLLM's group, the ranks being threads."""

    def __init__(self, shared, rank):
        self.shared, self.rank_in_group = shared, rank
        self.world_size = len(shared.slots)

    def _exchange(self, tensor):
        self.shared.slots[self.rank_in_group] = tensor
        self.shared.barrier.wait()
        tensors = list(self.shared.slots)
        self.shared.barrier.wait()
        return tensors

    def all_gather(self, tensor, dim):
        return torch.cat(self._exchange(tensor), dim)

    def reduce_scatter(self, tensor, dim):
        return sum(self._exchange(tensor)).chunk(self.world_size, dim)[self.rank_in_group]


def correct_out(out, lses, rank, ctx=None, is_lse_base_on_e=True):
    """vLLM's Triton kernel of the same name, in plain torch: [T, H, D] and [N, T, H]."""
    assert is_lse_base_on_e and lses.shape[1:] == out.shape[:2]
    lse = lses.logsumexp(0)
    weight = torch.nan_to_num((lses[rank] - lse).exp())
    return (out * weight[..., None]).to(out.dtype), lse


@pytest.mark.parametrize("features", ["plain", "sinks", "softcap", "fp8"])
@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL_AND_PIECEWISE, FULL])
def test_decode_context_parallelism(mode, features, monkeypatch):
    """Two ranks, each with every second token of the cache and half of the heads of the queries,
    against one that has it all. Prefill in chunks, mixed steps, decodes, and a captured step."""
    from vllm.v1.attention.ops import common as vllm_common

    monkeypatch.setattr(vllm_common, "correct_attn_out", correct_out)
    ranks = 2
    shared = types.SimpleNamespace(
        slots=[None] * ranks, barrier=threading.Barrier(ranks, timeout=60)
    )
    whole = Engine("cpu", kv_heads=1, **FEATURES[features])
    engines = [
        make_rank(Rank(shared, rank), mode, features, whole, monkeypatch) for rank in range(ranks)
    ]
    for prompt in (30, 7, 21):
        whole.add(prompt)
    steps = [[7, 30, 21], [1, 4, 9], [2, 2, 2], [1, 1, 1], [1, 1, 1], [3, 1, 1], [1, 1, 1]]
    whole.sequences.sort(key=lambda s: len(s.keys))
    for number, counts in enumerate(steps):
        common, key, value = whole.schedule(counts)
        query = torch.randn(sum(counts), 8, 64, dtype=torch.float16)
        output = torch.full_like(query, math.nan)
        errors = []

        def step(rank, engine):
            try:
                heads = slice(4 * rank, 4 * rank + 4)
                output[:, heads] = rank_step(
                    engine, rank, ranks, common, query[:, heads], key, value, number >= 3
                )
            except BaseException as error:  # noqa: BLE001  goes on in the test's own thread
                shared.barrier.abort()
                errors.append(error)

        threads = [threading.Thread(target=step, args=pair) for pair in enumerate(engines)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        check_loosely(whole, query, output, counts)
        whole.advance(counts)
    assert not engines[0].builder.supports_update_block_table


def make_rank(group, mode, features, whole, monkeypatch):
    """A rank's engine: the one KV head, which ranks share, and half of the query heads."""
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "get_dcp_group", lambda: group)
    options = dict(FEATURES[features])
    if "sinks" in options:
        options["sinks"] = options["sinks"].chunk(2)[group.rank_in_group]
    engine = Engine("cpu", heads=4, kv_heads=1, config=make_config(mode, dcp=2), **options)
    assert engine.impl.need_to_return_lse_for_decode and engine.builder.context.group is group
    return engine


def rank_step(engine, rank, ranks, common, query, key, value, graph):
    """A step of one rank: the tokens that are its own lie in its cache one after another. graph:
    as a replay, by what a capture with other lengths decided."""
    block_size = engine.block_size
    slots = torch.full_like(common.slot_mapping, -1)
    row = 0
    for i, length in enumerate(common.seq_lens.tolist()):
        begin, end = common.query_start_loc[i : i + 2].tolist()
        for position in range(length - (end - begin), length):
            if position % ranks == rank:
                place = position // ranks
                block = int(common.block_table_tensor[i, place // block_size])
                slots[row] = block * block_size + place % block_size
            row += 1
    common = common.replace(slot_mapping=slots)
    engine.impl.do_kv_cache_update(engine.layer, key, value, engine.kv_cache, slots)
    output = torch.empty_like(query)
    if graph:
        captured = common.replace(seq_lens=common.seq_lens.clone().fill_(1))
        metadata = engine.builder.build_for_cudagraph_capture(captured)
        engine.builder.build(0, common)  # refreshes what the graph reads
    else:
        metadata = engine.builder.build(0, common)
    engine.impl.forward(engine.layer, query, key, value, engine.kv_cache, metadata, output)
    return output


def check_loosely(engine, query, output, counts):
    """Against fp64, with room for three roundings instead of one. A step's own tokens never were in
    a cache, so none of them is rounded to fp8."""
    row = 0
    for sequence, count in zip(engine.sequences, counts):
        case = engine.case(sequence, query[row : row + count], sequence.length + count)
        for name in ("k", "v"):
            scale = case.pop(f"{name}_scale", 1.0)
            rows = case[f"{name}_cache"].float() * scale
            own = sequence.keys if name == "k" else sequence.values
            rows[:, sequence.length :] = own[sequence.length : sequence.length + count]
            case[f"{name}_cache"] = rows
        expected, _ = reference(**case)
        actual = output[None, row : row + count].double()
        torch.testing.assert_close(actual, expected, rtol=4e-3, atol=4e-3)
        row += count


@pytest.mark.parametrize("what", [dict(sliding_window=9), dict(alibi_slopes=[0.5] * 8)], ids=str)
def test_context_parallelism_of_positions_is_refused(what, monkeypatch):
    from vllm.distributed import parallel_state

    group = types.SimpleNamespace(world_size=2, rank_in_group=0)
    monkeypatch.setattr(parallel_state, "get_dcp_group", lambda: group)
    with pytest.raises(NotImplementedError, match="sliding windows and ALiBi"):
        Engine("cpu", config=make_config(dcp=2), **what)


def test_no_group_no_context():
    config = make_config()
    assert vllm_context.ContextParallel.of_group(config, torch.device("cpu")) is None


# --- Latent models -------------------------------------------------------------------------------


def make_latent(device, rank, rope, heads, kv_cache_dtype="auto", drafts=None):
    """Builder and implementation of a latent model, with what vLLM's own base classes ask for."""
    from leanattn.integrations.vllm_mla import LeanMLABackend

    text = types.SimpleNamespace(
        q_lora_rank=None, kv_lora_rank=rank, qk_nope_head_dim=32, qk_rope_head_dim=rope,
        v_head_dim=32,
    )  # fmt: skip
    config = make_config(
        drafts=drafts, use_mla=True, hf_text_config=text, dtype=torch.float16, max_model_len=256,
        get_num_attention_heads=lambda parallel: heads, get_head_size=lambda: rank + rope,
    )  # fmt: skip
    config.cache_config = types.SimpleNamespace(cache_dtype=kv_cache_dtype, block_size=16)
    prefill = types.SimpleNamespace(clone=lambda: None)
    layer = types.SimpleNamespace(
        prefill_backend=prefill, _k_scale=torch.tensor(0.5, device=device),
        _v_scale=torch.tensor(9.0, device=device),
    )  # fmt: skip
    config.compilation_config.static_forward_context[LAYER] = layer
    with as_current(config):
        impl = LeanMLABackend.get_impl_cls()(
            heads, rank + rope, 0.07, 1, None, None, kv_cache_dtype, None, AttentionType.DECODER,
            None, q_lora_rank=None, kv_lora_rank=rank, qk_nope_head_dim=32, qk_rope_head_dim=rope,
            qk_head_dim=32 + rope, v_head_dim=32, kv_b_proj=None,
        )  # fmt: skip
        builder = LeanMLABackend.get_builder_cls()(
            types.SimpleNamespace(block_size=16), [LAYER], config, torch.device(device)
        )
    return impl, builder, layer


@pytest.mark.parametrize("rank, rope, heads", [(512, 64, 16), (256, 64, 3)])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 2, 2], [1, 3, 2]], ids=str)
@pytest.mark.parametrize("wants_lse", [False, True])
def test_latent_decodes(rank, rope, heads, kv_cache_dtype, counts, wants_lse, device):
    """q in two parts or whole, and the log-sum-exp where vLLM asks for it."""
    impl, builder, layer = make_latent(device, rank, rope, heads, kv_cache_dtype, drafts=2)
    impl.need_to_return_lse_for_decode = wants_lse
    engine = Engine(device, heads=heads, kv_heads=1, head_size=8)  # for its tables alone
    for length in (40, 17, 5):
        engine.add(length)
    engine.schedule([40, 17, 5])
    engine.advance([40, 17, 5])
    common, _, _ = engine.schedule(counts)
    built = builder.build(0, common)
    assert built.num_decodes == 3 and built.prefill is None
    assert built.decode.query_len == (counts[0] if len(set(counts)) == 1 else None)

    shape = (64, 16, rank + rope)
    latents = torch.randn(shape, device=device).to(torch.float16)
    options = {}
    if kv_cache_dtype == "fp8":
        latents = latents.to(torch.float8_e4m3fn)
        options = dict(k_scale=layer._k_scale, v_scale=layer._k_scale)
    query = torch.randn(sum(counts), heads, rank + rope, device=device).to(torch.float16)
    given = query if wants_lse else (query[..., :rank], query[..., rank:])
    out, lse = impl.forward_mqa(given, latents, built, layer)
    assert (lse is not None) == wants_lse and out.shape == (sum(counts), heads, rank)
    row = 0
    for sequence, count in zip(engine.sequences, counts):
        length, rows, row = sequence.length + count, slice(row, row + count), row + count
        keys = latents[sequence.blocks].flatten(0, 1)[None, :length, None]
        case = dict(q=query[None, rows], k_cache=keys, v_cache=keys[..., :rank],
                    softmax_scale=0.07, **options)  # fmt: skip
        expected_lse = reference(**case)[1].float() if lse is None else lse[None, rows]
        assert_close(out[None, rows], expected_lse, **case)


def test_latent_models_that_are_refused():
    from leanattn.integrations.vllm_mla import LeanMLABackend

    latent = dict(backend=LeanMLABackend, use_mla=True)
    assert reasons(head_size=576, **latent) == []
    assert reasons(head_size=320, use_batch_invariant=True, **latent) == []
    assert "MLA" in reasons(backend=LeanMLABackend, head_size=576)[0]
    for given, reason in (
        (dict(kv_cache_dtype="fp8_e5m2"), "kv_cache_dtype"),
        (dict(kv_cache_dtype="fp8_ds_mla"), "kv_cache_dtype"), (dict(use_sparse=True), "sparse"),
        (dict(device_capability=DeviceCapability(8, 9)), "capability"),
    ):  # fmt: skip
        (said,) = reasons(**{"head_size": 576, **latent, **given})
        assert reason in said


# --- The example ---------------------------------------------------------------------------------


class Model:
    """In place of vLLM's LLM, whose engine wants a GPU: the same model by transformers."""

    def __init__(self, model, attention_config, **options):
        unknown = {"attention_config", *options} - engine_arguments()
        assert not unknown, f"vLLM's engine has no {unknown}"
        backend = AttentionBackendEnum[attention_config["backend"]]
        name = {"CUSTOM": "leanattn", "FLASH_ATTN": "eager"}[backend.name]
        transformers = pytest.importorskip("transformers")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, attn_implementation=name, dtype=torch.float32
        )

    def generate(self, prompts, sampling, use_tqdm):
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            tokens = self.model.generate(
                ids, max_new_tokens=sampling.max_tokens, do_sample=False, eos_token_id=None
            )
            answer = types.SimpleNamespace(token_ids=tokens[0, ids.shape[1] :].tolist())
            answers.append(types.SimpleNamespace(outputs=[answer]))
        return answers


def engine_arguments():
    """What vLLM's LLM takes beside the model, read from its source: importing it needs a hundred
    packages more."""
    import vllm

    tree = ast.parse((Path(vllm.__file__).parent / "engine" / "arg_utils.py").read_text())
    (arguments,) = (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
    )
    return {n.target.id for n in arguments.body if isinstance(n, ast.AnnAssign)}


def test_the_page(monkeypatch):
    """Its lines of Python, and what it gives to vLLM's command."""
    import vllm
    from vllm.config.attention import AttentionConfig

    monkeypatch.setitem(vllm.__dict__, "LLM", lambda model, **options: options)
    page = Path(__file__).parent.parent / "docs" / "vllm.md"
    given = run_page(page.name, name="a model")["llm"]
    assert set(given) <= engine_arguments()
    custom = AttentionBackendEnum.CUSTOM
    assert AttentionConfig(**given["attention_config"]).backend is custom
    (said,) = re.findall(r"--attention-config '(.*)'", page.read_text())
    assert AttentionConfig(**json.loads(said)).backend_per_kind == {"sliding_window": custom}
    assert f"**{integration.TRIED[-1]}**" in page.read_text()


def test_the_example(monkeypatch, capsys):
    """It runs, and what it tells is of both backends."""
    import vllm

    import leanattn.integrations.transformers  # noqa: F401  registers "leanattn" there

    monkeypatch.setitem(vllm.__dict__, "LLM", Model)
    monkeypatch.setitem(vllm.__dict__, "SamplingParams", types.SimpleNamespace)
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "vllm_generate.py"))
    ours, theirs = example["main"](["--tokens", "4"])
    assert ours == theirs and len(ours) == 16 and len(set(map(tuple, ours))) > 4
    printed = capsys.readouterr().out
    assert all(backend in printed for backend in example["BACKENDS"])
    assert "16 of 16 answers are the same" in printed
