"""A small stand-in for vLLM's engine, for tests of the attention backend: it keeps sequences, hands
out blocks and slots, and makes each step's metadata, vLLM's own `CommonAttentionMetadata`. What
every query must give is known by fp64, from keys and values that no cache has touched.
"""

import contextlib
import math
import random
import types

import torch
import vllm.config
from reference import assert_close, reference
from vllm import _custom_ops
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import utils

from leanattn.integrations.vllm_attention import LeanAttentionBackend

LAYER = "layers.0.attn"
UNUSED_ENTRY = 2147480000
FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def write_cache(key, value, k_cache, v_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
    """vLLM's `reshape_and_cache_flash` in plain torch: an indexed write, without a wait, so that it
    goes into a graph. What is not to be written leaves slot 0, of vLLM's null block, as it is."""
    written = (slot_mapping >= 0)[:, None, None]
    slots = slot_mapping.clamp(min=0)
    places = slots // k_cache.shape[1], slots % k_cache.shape[1]
    for new, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        rows = new[: len(slot_mapping)]
        if kv_cache_dtype in FLOAT8:
            cache = cache.view(FLOAT8[kv_cache_dtype])
            limit = torch.finfo(cache.dtype).max
            rows = rows.float() / (scale if scale.dim() == 0 else scale[:, None])
            rows = rows.clamp(-limit, limit).to(cache.dtype)
        bits = cache.view(_bits(cache))
        bits[places] = torch.where(written, rows.view(_bits(cache)), bits[places])


def _bits(tensor):
    return {1: torch.uint8, 2: torch.int16}[tensor.element_size()]


def plain_writes(monkeypatch):
    """Where vLLM's compiled operations are not there, as on the CPU: on a GPU by its Triton kernel,
    as far as that goes."""
    if hasattr(torch.ops._C_cache_ops, "reshape_and_cache_flash"):
        return

    def write(key, value, k_cache, v_cache, slot_mapping, kv_cache_dtype, *scales):
        triton = key.is_cuda and kv_cache_dtype != "fp8_e5m2" and scales[0].dim() == 0
        if triton:
            from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
                triton_reshape_and_cache_flash as op,
            )
        else:
            op = write_cache
        op(key, value, k_cache, v_cache, slot_mapping, kv_cache_dtype, *scales)

    monkeypatch.setattr(_custom_ops, "reshape_and_cache_flash", write)


@contextlib.contextmanager
def cache_layout(layout):
    """vLLM's VLLM_KV_CACHE_LAYOUT."""
    utils.set_kv_cache_layout(layout)
    try:
        yield
    finally:
        utils.set_kv_cache_layout(None)


def make_config(mode=CUDAGraphMode.FULL_AND_PIECEWISE, drafts=None, dcp=1, use_mla=False, **model):
    """What the backend reads of vLLM's configuration."""
    names = types.SimpleNamespace
    speculative = names(num_speculative_tokens=drafts, parallel_drafting=False) if drafts else None
    return names(
        model_config=names(rswa_window=None, use_mla=use_mla, is_diffusion=False, **model),
        attention_config=names(
            flash_attn_version=None, use_prefill_query_quantization=False,
        ),
        speculative_config=speculative,
        parallel_config=names(
            decode_context_parallel_size=dcp, prefill_context_parallel_size=1,
            dcp_comm_backend="ag_rs", cp_kv_cache_interleave_size=1,
        ),
        scheduler_config=names(max_num_seqs=16, max_num_batched_tokens=256),
        compilation_config=names(
            cudagraph_mode=mode, max_cudagraph_capture_size=64, static_forward_context={},
        ),
    )  # fmt: skip


def as_current(config):
    return vllm.config.set_current_vllm_config(config)


class Engine:
    """One layer's cache and the sequences in it.

    The cache holds NaN wherever nothing was written, and the block tables' unused entries are far
    outside. with_flash: prefills may go to vLLM's FlashAttention, and the cache holds 0 instead.
    """

    def __init__(
        self, device, dtype=torch.float16, heads=8, kv_heads=2, head_size=64, block_size=16,
        num_blocks=64, layout="NHD", kv_cache_dtype="auto", config=None, scales=None, seed=0,
        max_len=128, with_flash=False, **impl_options,
    ):  # fmt: skip
        self.device, self.dtype = torch.device(device), dtype
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, head_size
        self.block_size, self.max_len = block_size, max_len
        self.random = random.Random(seed)
        self.config = config or make_config()
        self.kv_cache_dtype = kv_cache_dtype
        self.scale = head_size**-0.5
        self.impl_options = impl_options
        with torch.device(self.device), as_current(self.config):
            self.impl = LeanAttentionBackend.get_impl_cls()(
                heads, head_size, self.scale, kv_heads, kv_cache_dtype=kv_cache_dtype,
                **impl_options,
            )  # fmt: skip
        self.impl.process_weights_after_loading(dtype)
        if not with_flash:
            self.impl.flash = None  # NaN beyond a sequence's length goes through it
        k_scale, v_scale = scales if scales is not None else (torch.ones(()), torch.ones(()))
        self.layer = types.SimpleNamespace(
            impl=self.impl, _k_scale=k_scale.to(device), _v_scale=v_scale.to(device),
            _q_scale=torch.ones((), device=device), kv_sharing_target_layer_name=None,
        )  # fmt: skip
        self.config.compilation_config.static_forward_context[LAYER] = self.layer
        spec = types.SimpleNamespace(block_size=block_size)
        self.builder = LeanAttentionBackend.get_builder_cls()(
            spec, [LAYER], self.config, self.device
        )
        self.kv_cache = self._make_cache(num_blocks, layout)
        if with_flash:
            self.kv_cache.zero_()
        self.free = list(range(1, num_blocks))  # block 0 is vLLM's null block
        self.sequences = []

    def _make_cache(self, num_blocks, layout):
        """As vLLM's model runner makes it of the backend's shape and order."""
        shape = LeanAttentionBackend.get_kv_cache_shape(
            num_blocks, self.block_size, self.kv_heads, self.head_size, self.kv_cache_dtype
        )
        with cache_layout(layout):
            order = LeanAttentionBackend.get_kv_cache_stride_order()
        dtype = torch.uint8 if self.kv_cache_dtype in FLOAT8 else self.dtype
        nan = 0x7F if dtype == torch.uint8 else math.nan
        memory = torch.full([shape[i] for i in order], nan, dtype=dtype, device=self.device)
        return memory.permute(*(order.index(i) for i in range(4)))

    # --- Sequences -------------------------------------------------------------------------------

    def add(self, prompt_len, prefix_of=None):
        """A sequence of prompt_len tokens, none of them computed. prefix_of: it begins as that one
        does, and shares its full blocks."""
        sequence = types.SimpleNamespace(
            length=0, blocks=[], keys=self._rows(prompt_len), values=self._rows(prompt_len)
        )
        if prefix_of is not None:
            shared = min(prompt_len - 1, prefix_of.length) // self.block_size
            tokens = shared * self.block_size
            sequence.blocks = prefix_of.blocks[:shared]
            sequence.length = tokens
            for name in ("keys", "values"):
                rows = getattr(prefix_of, name)[:tokens]
                setattr(sequence, name, torch.cat((rows, getattr(sequence, name)[tokens:])))
        self.sequences.append(sequence)
        return sequence

    def preempt(self, sequence):
        """Its blocks go, and all its tokens are to be computed once more."""
        others = {b for s in self.sequences if s is not sequence for b in s.blocks}
        self.free += [b for b in sequence.blocks if b not in others]
        sequence.blocks, sequence.length = [], 0

    def finish(self, sequence):
        self.preempt(sequence)
        self.sequences.remove(sequence)

    def _rows(self, count):
        rows = torch.randn(count, self.kv_heads, self.head_size) + 0.25
        return rows.to(self.device, self.dtype)

    def _grow(self, sequence, count):
        """Room for count more tokens, and tokens for it."""
        end = sequence.length + count
        while len(sequence.blocks) * self.block_size < end:
            sequence.blocks.append(self.free.pop(self.random.randrange(len(self.free))))
        missing = end - len(sequence.keys)
        if missing > 0:
            sequence.keys = torch.cat((sequence.keys, self._rows(missing)))
            sequence.values = torch.cat((sequence.values, self._rows(missing)))

    # --- Steps -----------------------------------------------------------------------------------

    def schedule(self, counts, num_reqs=None, num_tokens=None):
        """The metadata of a step with counts[i] new tokens of sequence i, and its keys and values.
        Padded to num_reqs sequences of length 0 and num_tokens tokens, as for a graph."""
        for sequence, count in zip(self.sequences, counts, strict=True):
            self._grow(sequence, count)
        lens = [s.length + n for s, n in zip(self.sequences, counts)]
        total, num_reqs = sum(counts), num_reqs or len(counts)
        num_tokens = num_tokens or total
        starts = [0]
        for count in counts + [0] * (num_reqs - len(counts)):
            starts.append(starts[-1] + count)
        width = -(-self.max_len // self.block_size)
        table = torch.full((num_reqs, width), UNUSED_ENTRY, dtype=torch.int32)
        slots = torch.full((num_tokens,), -1, dtype=torch.int64)
        row = 0
        for i, (sequence, count) in enumerate(zip(self.sequences, counts)):
            table[i, : len(sequence.blocks)] = torch.tensor(sequence.blocks, dtype=torch.int32)
            for position in range(sequence.length, sequence.length + count):
                block = sequence.blocks[position // self.block_size]
                slots[row] = block * self.block_size + position % self.block_size
                row += 1
        starts = torch.tensor(starts, dtype=torch.int32)
        lens = torch.tensor(lens + [0] * (num_reqs - len(lens)), dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(self.device), query_start_loc_cpu=starts,
            seq_lens=lens.to(self.device), seq_lens_cpu_upper_bound=lens, num_reqs=num_reqs,
            num_actual_tokens=num_tokens, max_query_len=max(counts), max_seq_len=int(lens.max()),
            block_table_tensor=table.to(self.device), slot_mapping=slots.to(self.device),
        )  # fmt: skip
        new = [
            (s.keys[s.length : s.length + n], s.values[s.length : s.length + n])
            for s, n in zip(self.sequences, counts)
        ]
        behind = torch.full((num_tokens - total, *new[0][0].shape[1:]), math.nan)
        behind = behind.to(self.device, self.dtype)
        key, value = (torch.cat((*rows, behind)) for rows in zip(*new))
        return common, key, value

    def run(self, counts, metadata=None, common=None, **padding):
        """One step; every query's output is held against fp64."""
        common, key, value = self.schedule(counts, **padding)
        query = torch.randn(common.num_actual_tokens, self.heads, self.head_size)
        query = query.to(self.device, self.dtype)
        metadata = self.builder.build(0, common)
        output = torch.full_like(query, math.nan)
        self.impl.do_kv_cache_update(self.layer, key, value, self.kv_cache, common.slot_mapping)
        self.impl.forward(self.layer, query, key, value, self.kv_cache, metadata, output=output)
        self.check(query, output, counts)
        self.advance(counts)
        return metadata

    def advance(self, counts):
        for sequence, count in zip(self.sequences, counts):
            sequence.length += count

    def check(self, query, output, counts, causal=True):
        """Of the step that was not advanced yet."""
        row = 0
        for sequence, count in zip(self.sequences, counts):
            rows, row = slice(row, row + count), row + count
            if count:
                case = self.case(sequence, query[rows], sequence.length + count, causal)
                _, lse = reference(**case)
                assert_close(output[None, rows], lse.float(), **case)
        if row < output.shape[0]:
            assert (output[row:] == 0).all(), "padding rows are not 0"

    def case(self, sequence, query, length, causal=True):
        """The arguments of the reference for a sequence's queries, which come last of length."""
        keys, values = sequence.keys[:length], sequence.values[:length]
        case = dict(softmax_scale=self.scale, causal=causal)
        if self.kv_cache_dtype in FLOAT8:
            keys, values = (
                self._rounded(x, scale)
                for x, scale in ((keys, self.layer._k_scale), (values, self.layer._v_scale))
            )
            case |= {"k_scale": self.layer._k_scale, "v_scale": self.layer._v_scale}
        options = self.impl_options
        if options.get("sliding_window"):
            case["window_left"] = options["sliding_window"] - 1
            if not causal:
                case["window_right"] = case["window_left"]
        if options.get("logits_soft_cap"):
            case["softcap"] = options["logits_soft_cap"]
        if options.get("alibi_slopes"):
            case["alibi_slopes"] = torch.tensor(options["alibi_slopes"], device=self.device)
        if options.get("sinks") is not None:
            case["sinks"] = options["sinks"].float()
        return dict(q=query[None], k_cache=keys[None], v_cache=values[None], **case)

    def _rounded(self, rows, scale):
        dtype = FLOAT8[self.kv_cache_dtype]
        rows = rows.float() / (scale if scale.dim() == 0 else scale[:, None])
        limit = torch.finfo(dtype).max
        return rows.clamp(-limit, limit).to(dtype)

    def random_step(self):
        """How many new tokens each sequence gets, after some came, went, or lost their blocks; the
        sequences of few come first, as vLLM orders them."""
        draw = self.random.random
        if len(self.sequences) < 6 and draw() < 0.5:
            sharer = self.sequences and draw() < 0.4
            other = self.random.choice(self.sequences) if sharer else None
            self.add(self.random.randint(1, 60), other)
        for sequence in list(self.sequences):
            if draw() < 0.05:
                self.preempt(sequence)
            elif sequence.length > self.max_len - 24:
                self.finish(sequence)
        if not self.sequences:
            self.add(5)
        counts = {}
        for sequence in self.sequences:
            missing = len(sequence.keys) - sequence.length
            counts[id(sequence)] = self.random.randint(1, min(missing, 24)) if missing > 0 else 1
        self.sequences.sort(key=lambda s: counts[id(s)])
        return [counts[id(s)] for s in self.sequences]
