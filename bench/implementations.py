"""What is measured: leanattn in its variants, and its peers, each behind the same two steps.

`prepare(case)` makes whatever may be made ahead of a step of decoding (plans, masks, buffers) and
returns a `Prepared`; its `call(inputs)` is one step and is what is timed. Whoever cannot take a
shape raises `Refused` with the reason, or whatever its library raises.
"""

import contextlib
import importlib
import math
import os
import warnings
from dataclasses import dataclass
from typing import Callable, Optional

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import leanattn
from bench import carried
from bench.data import query_offsets


class Refused(Exception):
    """This implementation does not take this shape."""


@dataclass
class Prepared:
    """`call(inputs)` gives out, `[B, Sq, Hq, Dv]` or of as many elements in that order. `plan()`,
    if any, is what a user calls whenever the lengths have changed, and is not part of `call`."""

    call: Callable
    plan: Optional[Callable] = None
    takes_strided_q: bool = True  # else q must lie in one piece of memory


@dataclass
class Implementation:
    name: str
    prepare: Callable
    context: Callable = contextlib.nullcontext  # around prepare and every call
    is_default: bool = True

    @property
    def is_ours(self):
        return self.name.startswith("leanattn")


OURS = "leanattn"


def _takes(shape, *features):
    """Of `Shape.features`, what the caller passes on; what else the shape has is refused."""
    others = shape.features.difference(features)
    if others:
        raise Refused(f"called here without {', '.join(sorted(others))}")


# --- leanattn -------------------------------------------------------------------------------------


def _leanattn(with_lengths=True, with_counters=False, **options):
    """As servers call it: with lengths, also where every cache is full, and without counters."""

    def prepare(case):
        decode = torch.ops.leanattn.decode
        if not with_lengths and not case.shape.is_full:
            raise Refused("the lengths of this shape must be given")
        lengths = case.cache_seqlens if with_lengths else None
        # Enough for any layout that may be forced.
        counters = leanattn.counters(case.device, 1 << 16) if with_counters else None
        given = {"counters": counters, **_leanattn_mask(case), **options}

        def call(inputs):
            q = inputs.q if case.cu_seqlens_q is None else inputs.q.flatten(0, 1)
            return decode(q, inputs.k_cache, inputs.v_cache, lengths, case.block_table, **given)

        return Prepared(call)

    return prepare


def _leanattn_mask(case):
    """Arguments of decode that are not its defaults."""
    shape, given = case.shape, {}
    if shape.has_query_offsets:
        given.update(cu_seqlens_q=case.cu_seqlens_q, max_seqlen_q=shape.seqlen_q)
    if shape.window:
        given["window_left"] = shape.window - 1
    if shape.softcap:
        given["softcap"] = shape.softcap
    if shape.has_sinks:
        given["sinks"] = case.sinks
    if shape.has_alibi:
        given["alibi_slopes"] = case.alibi_slopes
    return given


@contextlib.contextmanager
def environment(**variables):
    """Environment variables, which leanattn reads at every call."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _cp_async():
    return environment(LEANATTN_LOADER="cp_async")


# --- torch SDPA -----------------------------------------------------------------------------------


def _sdpa(folded=False, is_flash=False):
    """SDPA on a contiguous cache, as far as its longest sequence goes, which the host knows; of a
    window, where all have one place, its keys alone. `folded`: the query heads of a group as rows
    of one head, which is the same attention where there is one query; else `enable_gqa`."""

    def prepare(case):
        shape = case.shape
        if shape.page_size:
            raise Refused("SDPA takes no block table")
        if shape.is_float8:
            raise Refused("SDPA takes no float8 caches under wider queries")
        if folded and (shape.group_size == 1 or shape.seqlen_q > 1):
            raise Refused("there is no group, or several queries, to fold into rows")
        _takes(shape, "a window")
        if shape.window and (shape.is_ragged or shape.seqlen_q > 1):
            raise Refused("called here with windows that all lie in one place")
        begin = max(0, shape.longest - shape.window) if shape.window else 0
        seen = slice(begin, shape.longest)
        mask = _sdpa_mask(case, folded, is_flash)
        grouped = shape.group_size > 1 and not folded
        rows = (shape.batch, shape.heads_kv, shape.group_size, shape.head_dim)

        def call(inputs):
            q = inputs.q.view(rows) if folded else inputs.q.transpose(1, 2)
            k, v = (c[:, seen].transpose(1, 2) for c in (inputs.k_cache, inputs.v_cache))
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
            return out if folded else out.transpose(1, 2)

        return Prepared(call)

    return prepare


def _sdpa_mask(case, folded, is_flash):
    """None where every key is seen; for Flash, which takes no mask, its own bottom-right causal
    one; else an additive mask `[B or 1, 1, Sq, S]` in q's dtype, which spares SDPA's conversion of
    a bool mask at every call."""
    shape = case.shape
    if shape.seqlen_q == 1 and not shape.is_ragged:
        return None
    if is_flash and not shape.is_ragged:
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(shape.seqlen_q, shape.longest)
    # A row of the mask must be a multiple of 16 bytes for the backends to take it.
    columns = -(-shape.longest // 8) * 8
    lengths = torch.tensor(shape.lengths if shape.is_ragged else shape.lengths[:1])
    positions = lengths[:, None] - shape.seqlen_q + torch.arange(shape.seqlen_q)  # [B or 1, Sq]
    seen = torch.arange(columns) <= positions[:, :, None]  # [B or 1, Sq, columns]
    mask = torch.zeros(seen.shape, dtype=case.dtype).masked_fill(~seen, -math.inf)
    return mask[:, None, :, : shape.longest].to(case.device)


def _backend(backend):
    return lambda: sdpa_kernel(backend)


# --- FlashInfer -----------------------------------------------------------------------------------


@dataclass
class Pages:
    """A cache as pages: the case's own, or a contiguous `[B, S, Hkv, D]` cut into such, as far as
    its longest sequence goes."""

    page_size: int
    contiguous_tokens: Optional[int]  # of each sequence; None: the case's own pages
    indptr: torch.Tensor  # [B + 1] int32: where each sequence's entries of `indices` begin
    indices: torch.Tensor  # [pages] int32
    last_page_len: torch.Tensor  # [B] int32
    lengths: torch.Tensor  # [B] int32
    table: torch.Tensor  # [B, max_pages] int32

    def view(self, cache):
        """`[num_pages, page_size, Hkv, D]`"""
        if self.contiguous_tokens is None:
            return cache
        rows = cache[:, : self.contiguous_tokens]
        return rows.view(-1, self.page_size, *cache.shape[2:])


def as_pages(case, sizes=(64, 32, 16)):
    """`sizes`: those to choose from for a contiguous cache."""
    shape = case.shape
    if shape.is_float8:
        raise Refused("called here for caches of q's dtype")
    page_size = shape.page_size
    if page_size is None:
        page_size = next((size for size in sizes if shape.longest % size == 0), None)
        if page_size is None or shape.layout != "bshd":
            raise Refused("takes pages only, and this contiguous cache cannot be cut into such")
    counts = [-(-length // page_size) for length in shape.lengths]
    if case.block_table is not None:
        table = case.block_table.cpu()
    else:
        table = torch.arange(shape.batch * (shape.longest // page_size), dtype=torch.int32)
        table = table.view(shape.batch, -1)
    indices = torch.cat([row[:count] for row, count in zip(table, counts)])
    indptr = torch.tensor([0, *counts]).cumsum(0).int()
    last = [length - (count - 1) * page_size for length, count in zip(shape.lengths, counts)]
    tensors = (indptr, indices, torch.tensor(last, dtype=torch.int32),
               torch.tensor(shape.lengths, dtype=torch.int32), table)  # fmt: skip
    contiguous_tokens = None if shape.page_size else shape.longest
    return Pages(page_size, contiguous_tokens, *(tensor.to(case.device) for tensor in tensors))


_workspaces = {}


def _workspace(owner, device, mebibytes):
    """Of zeros at first; kept, because every shape needs the same."""
    key = (owner, str(device))
    if key not in _workspaces:
        _workspaces[key] = torch.zeros(mebibytes << 20, dtype=torch.uint8, device=device)
    return _workspaces[key]


def _heads(shape):
    return shape.heads_q, shape.heads_kv, shape.head_dim


def _flashinfer(case):
    if case.shape.latent_dim:
        raise Refused("called here for K and V apart")
    carried.find_flashinfer()
    return importlib.import_module("flashinfer")


def _flashinfer_decode(case):
    """The tensor-core decode, or for several queries the prefill that it is made of."""
    flashinfer = _flashinfer(case)
    shape, pages = case.shape, as_pages(case)
    _takes(shape, "a window", "softcap")
    workspace = _workspace("flashinfer", case.device, 512)
    options = dict(q_data_type=case.dtype, kv_data_type=case.dtype)
    if shape.window:
        options["window_left"] = shape.window - 1
    if shape.softcap:
        options["logits_soft_cap"] = shape.softcap
    if shape.seqlen_q == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )

        def plan():
            wrapper.plan(pages.indptr, pages.indices, pages.last_page_len, *_heads(shape),
                         pages.page_size, **options)  # fmt: skip
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        qo_indptr = query_offsets(shape).to(case.device)

        def plan():
            wrapper.plan(qo_indptr, pages.indptr, pages.indices, pages.last_page_len,
                         *_heads(shape), pages.page_size, causal=True, **options)  # fmt: skip

    plan()

    def call(inputs):
        return wrapper.run(
            inputs.q.flatten(0, 1), (pages.view(inputs.k_cache), pages.view(inputs.v_cache))
        )

    return Prepared(call, plan)


def _flashinfer_batch_attention(case):
    flashinfer = _flashinfer(case)
    shape, pages = case.shape, as_pages(case)
    wrapper = flashinfer.BatchAttention(kv_layout="NHD", device=str(case.device))
    _takes(shape)
    qo_indptr = query_offsets(shape).to(case.device)

    def plan():
        wrapper.plan(qo_indptr, pages.indptr, pages.indices, pages.lengths, shape.heads_q,
                     shape.heads_kv, shape.head_dim, shape.head_dim, pages.page_size,
                     causal=shape.seqlen_q > 1, q_data_type=case.dtype,
                     kv_data_type=case.dtype)  # fmt: skip

    plan()

    def call(inputs):
        out, _ = wrapper.run(
            inputs.q.flatten(0, 1), (pages.view(inputs.k_cache), pages.view(inputs.v_cache))
        )
        return out

    return Prepared(call, plan)


def _flashinfer_xqa(case):
    """TensorRT-LLM's kernel in FlashInfer: one query, pages of 16 to 128, no plan. It may launch
    dependently, so that calls that follow each other overlap; here it does not."""
    xqa = _flashinfer(case).xqa
    shape, pages = case.shape, as_pages(case)
    _takes(shape)
    if shape.seqlen_q > 1:
        raise Refused("XQA is called here for one query a sequence")
    if pages.page_size not in (16, 32, 64, 128):
        raise Refused("XQA takes pages of 16, 32, 64 or 128")
    workspace = _workspace("xqa", case.device, 512)
    semaphores = _workspace("xqa semaphores", case.device, 8).view(torch.uint32)
    lengths = pages.lengths.view(torch.uint32)[:, None]
    # The kernel scales by 1 / sqrt(head_dim) itself.

    def call(inputs):
        out = torch.empty_like(inputs.q)
        xqa(inputs.q, pages.view(inputs.k_cache), pages.view(inputs.v_cache), pages.table, lengths,
            out, workspace, semaphores, shape.heads_kv, pages.page_size,
            enable_pdl=False)  # fmt: skip
        return out

    return Prepared(call, takes_strided_q=False)


# --- FlashAttention -------------------------------------------------------------------------------


def _flash_attention_2(case):
    function = importlib.import_module("flash_attn").flash_attn_with_kvcache
    shape = case.shape
    _takes(shape, "a window", "softcap", "ALiBi")
    options = dict(cache_seqlens=case.cache_seqlens, block_table=case.block_table, causal=True,
                   window_size=_window(shape), softcap=shape.softcap,
                   alibi_slopes=case.alibi_slopes)  # fmt: skip

    def call(inputs):
        return function(inputs.q, inputs.k_cache, inputs.v_cache, **options)

    return Prepared(call)


def _window(shape):
    """(left, right) as FlashAttention counts."""
    return (shape.window - 1, 0) if shape.window else (-1, -1)


def _flash_attention_3(case):
    """flash_attn_interface, or vLLM's build of the same where that was brought along."""
    library = carried.fa3()
    return _vllm_fa3(library, case) if library else _flash_attn_interface(case)


def _flash_attn_interface(case):
    module = importlib.import_module("flash_attn_interface")
    shape = case.shape
    _takes(shape, "a window", "softcap")
    prepared = Prepared(None)
    state = {"metadata": None}
    common = dict(causal=shape.seqlen_q > 1, window_size=_window(shape))

    def call(inputs):
        return module.flash_attn_with_kvcache(
            inputs.q, inputs.k_cache, inputs.v_cache, cache_seqlens=case.cache_seqlens,
            page_table=case.block_table, softcap=shape.softcap,
            scheduler_metadata=state["metadata"], **common,
        )  # fmt: skip

    def plan():
        state["metadata"] = module.get_scheduler_metadata(
            shape.batch, shape.seqlen_q, _tokens_at_most(case), *_heads(shape), case.cache_seqlens,
            case.dtype, page_size=shape.page_size, has_softcap=shape.softcap > 0, **common,
        )  # fmt: skip

    prepared.call = call
    if case.cache_seqlens is not None:
        prepared.plan = plan
        plan()
    return prepared


def _tokens_at_most(case):
    """Of a sequence, by the shape of the cache or of the block table, for that is what is called
    with."""
    if case.block_table is None:
        return case.shape.capacity
    return case.block_table.shape[1] * case.shape.page_size


def _vllm_fa3(library, case):
    """As vLLM calls it: lengths always, and a metadata tensor that all layers of a step share,
    without which each call would run one kernel more."""
    shape = case.shape
    _takes(shape, "a window", "softcap", "sinks")
    if shape.is_float8:
        raise Refused("called here for caches of q's dtype")
    head_dim, tokens = shape.head_dim, _tokens_at_most(case)
    lengths = case.cache_seqlens
    if lengths is None:
        lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=case.device)
    sinks = case.sinks.to(case.dtype) if shape.has_sinks else None
    is_causal = True  # vLLM's choice; which of its tiles is taken depends on it
    splits, packs_gqa, sm_margin = 0, None, 0  # chosen by the library
    state = {}

    def plan():
        state["metadata"] = library.get_scheduler_metadata(
            shape.batch, shape.seqlen_q, tokens, *_heads(shape), shape.head_dim_v, case.dtype,
            lengths, None, None, None, None, None,  # cu_seqlens of q, k, new k; seqused_q; left pad
            shape.page_size, 0, is_causal, *_window(shape), shape.softcap > 0, splits, packs_gqa,
            sm_margin,
        )  # fmt: skip

    def call(inputs):
        return library.fwd(
            inputs.q, inputs.k_cache, inputs.v_cache, None, None, None, None,  # new k, v; q_v; out
            None, None, None, None, lengths,  # cu_seqlens of q, k, new k; seqused of q and k
            None, tokens if shape.page_size else None, case.block_table, None, None,
            None, None, None, None, None, None,  # rotary; scales of q, k, v
            head_dim**-0.5, is_causal, *_window(shape), shape.softcap, True, state["metadata"],
            splits, packs_gqa, sm_margin, sinks, 1, 0, None,  # context parallel: 1 of 1
        )[0]  # fmt: skip

    plan()
    return Prepared(call, plan)


# --- FlashMLA -------------------------------------------------------------------------------------


def _flashmla(case):
    """As vLLM calls it: a step's metadata is made once, by a first call; all layers share it."""
    library = carried.flashmla()
    if library is None:
        raise Refused(f"no {carried.FLASHMLA} in PEERS_DIR")
    shape, page_size = case.shape, 64
    _takes(shape)
    if (shape.head_dim, shape.latent_dim, shape.page_size or page_size) != (576, 512, page_size):
        raise Refused(f"takes latent caches of 576 and 512 in pages of {page_size}")
    pages = as_pages(case, (page_size,))
    metadata = [None, None]

    def run(inputs):
        return library.dense_decode_fwd(
            inputs.q, pages.view(inputs.k_cache), shape.latent_dim, pages.lengths, pages.table,
            shape.head_dim**-0.5, shape.seqlen_q > 1, *metadata, None,
        )  # fmt: skip

    def plan():
        metadata[:] = None, None
        metadata[:] = run(case.sets[0])[2:4]

    plan()
    return Prepared(lambda inputs: run(inputs)[0], plan)


# --- All of them ----------------------------------------------------------------------------------

IMPLEMENTATIONS = [
    Implementation(OURS, _leanattn()),
    Implementation("leanattn-counters", _leanattn(with_counters=True)),
    Implementation("leanattn-no_lengths", _leanattn(with_lengths=False), is_default=False),
    Implementation("leanattn-cp_async", _leanattn(), _cp_async, is_default=False),
    Implementation("leanattn-batch_invariant", _leanattn(batch_invariant=True), is_default=False),
    Implementation("cudnn", _sdpa(), _backend(SDPBackend.CUDNN_ATTENTION)),
    Implementation("cudnn-folded", _sdpa(folded=True), _backend(SDPBackend.CUDNN_ATTENTION)),
    Implementation("flash", _sdpa(is_flash=True), _backend(SDPBackend.FLASH_ATTENTION)),
    Implementation(
        "flash-folded", _sdpa(folded=True, is_flash=True), _backend(SDPBackend.FLASH_ATTENTION)
    ),
    Implementation("efficient", _sdpa(), _backend(SDPBackend.EFFICIENT_ATTENTION)),
    Implementation(
        "efficient-folded", _sdpa(folded=True), _backend(SDPBackend.EFFICIENT_ATTENTION)
    ),
    Implementation("math", _sdpa(), _backend(SDPBackend.MATH), is_default=False),
    Implementation("flashinfer", _flashinfer_decode),
    Implementation("flashinfer-batch_attention", _flashinfer_batch_attention),
    Implementation("flashinfer-xqa", _flashinfer_xqa),
    Implementation("fa2", _flash_attention_2),
    Implementation("fa3", _flash_attention_3),
    Implementation("flashmla", _flashmla, is_default=False),
]
NAMES = [implementation.name for implementation in IMPLEMENTATIONS]


def try_call(implementation, case):
    """(Prepared, out) after one call on the first input set, or (None, reason)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # SDPA tells in warnings why a backend refuses
        try:
            with implementation.context():
                prepared = implementation.prepare(case)
                out = prepared.call(case.sets[0])
            if case.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # whatever a library raises is its reason
            return None, reason_of(error, caught)
    return prepared, out.reshape(*case.sets[0].q.shape[:3], case.shape.head_dim_v)


def reason_of(error, caught=()):
    """One line."""
    if isinstance(error, ModuleNotFoundError):
        return f"not importable here: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "not enough GPU memory"
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [str(warning.message).split(" (Triggered")[0] for warning in caught]
    if "No available kernel" in text and told:
        lines = [" ".join(line for line in told if "runtime disabled" not in line)]
    return lines[0][:300]
