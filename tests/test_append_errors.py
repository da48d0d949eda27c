"""Mistakes in a call of append_kv or rope_append_kv raise before anything is written; with
LEANATTN_CHECK=1 so do wrong lengths, pages and offsets on the device."""

import pytest
import torch
from append_cases import CALLS, FP8, INT32_MAX, INT32_MIN, PAGINGS, bits, check, make_call, run
from cases import int32
from test_errors import Wrong, add, assert_refused, cast, replace

import leanattn


def good(device, **options):
    """B 3, Sn 2, 2 KV heads, D 64, Dv 32, S 24."""
    return make_call(device, torch.float16, dims=(64, 32), **options)


def paged(device):
    return good(device, page_size=8)


def ragged(device):
    return good(device, new_lengths=(1, 2, 3))


def fp8(device):
    return good(device, cache_dtype=torch.float8_e4m3fn, scale="head")


def rope(device):
    return good(device, rotary_dim=32)


MISTAKES = {
    "k-float64": Wrong(cast("k", torch.float64), ("k",), (torch.float64,), good),
    "k-int8": Wrong(cast("k", torch.int8), ("k",), (torch.int8,), good),
    "v-other-dtype": Wrong(cast("v", torch.bfloat16), ("v",), (torch.bfloat16,), good),
    "k-cache-int8": Wrong(cast("k_cache", torch.int8), ("k_cache",), (torch.int8,), good),
    "v-cache-other": Wrong(
        cast("v_cache", torch.bfloat16), ("v_cache",), (torch.bfloat16,), good
    ),
    "lengths-int64": Wrong(
        cast("cache_seqlens", torch.int64), ("cache_seqlens",), (torch.int64,), good
    ),
    "table-int64": Wrong(cast("block_table", torch.int64), ("block_table",), (torch.int64,), paged),
    "offsets-int64": Wrong(
        cast("cu_seqlens", torch.int64), ("cu_seqlens",), (torch.int64,), ragged
    ),
    "k-2d": Wrong(replace(k=(3, 64)), ("k",), ((3, 64),), good),
    "k-5d": Wrong(replace(k=(1, 3, 2, 2, 64)), ("k",), ((1, 3, 2, 2, 64),), good),
    "k-4d-ragged": Wrong(replace(k=(3, 2, 2, 64)), ("k",), ((3, 2, 2, 64),), ragged),
    "k-batch": Wrong(replace(k=(4, 2, 2, 64)), ("k",), (3, (4, 2, 2, 64)), good),
    "k-batch-paged": Wrong(
        replace(k=(4, 2, 2, 64)), ("k", "block_table"), (3, (4, 2, 2, 64)), paged
    ),
    "k-heads": Wrong(replace(k=(3, 2, 3, 64)), ("k",), (3, 2), good),
    "k-dim": Wrong(replace(k=(3, 2, 2, 32)), ("k",), (32, 64), good),
    "v-tokens": Wrong(replace(v=(3, 1, 2, 32)), ("v",), ((3, 1, 2, 32),), good),
    "v-rank": Wrong(replace(v=(3, 2, 32)), ("v",), ((3, 2, 32),), good),
    "v-heads": Wrong(replace(v=(3, 2, 1, 32)), ("v",), (1, 2), good),
    "v-dim": Wrong(replace(v=(3, 2, 2, 64)), ("v",), (64, 32), good),
    "v-ragged-rows": Wrong(replace(v=(5, 2, 32)), ("v",), ((5, 2, 32),), ragged),
    "k-cache-3d": Wrong(replace(k_cache=(24, 2, 64)), ("k_cache",), ((24, 2, 64),), good),
    "v-cache-5d": Wrong(
        replace(v_cache=(1, 3, 24, 2, 32)), ("v_cache",), ((1, 3, 24, 2, 32),), good
    ),
    "v-cache-tokens": Wrong(replace(v_cache=(3, 25, 2, 32)), ("v_cache",), (25, 24), good),
    "v-cache-pages": Wrong(replace(v_cache=(9, 8, 2, 32)), ("v_cache",), (9, 11), paged),
    "caches-no-head": Wrong(
        replace(k_cache=(3, 24, 0, 64), v_cache=(3, 24, 0, 32)), ("k_cache",), (0,), good
    ),
    "pages-of-0": Wrong(
        replace(k_cache=(3, 0, 2, 64), v_cache=(3, 0, 2, 32)), ("k_cache",), ((3, 0, 2, 64),), paged
    ),
    "lengths-batch": Wrong(replace(cache_seqlens=(4,)), ("cache_seqlens",), (4, 3), good),
    "lengths-2d": Wrong(replace(cache_seqlens=(3, 1)), ("cache_seqlens",), ((3, 1),), good),
    "table-1d": Wrong(replace(block_table=(3,)), ("block_table",), ((3,),), paged),
    "offsets-length": Wrong(replace(cu_seqlens=(3,)), ("cu_seqlens",), (3, 4), ragged),
    "scale-without-fp8": Wrong(
        add("k_scale", torch.float32, (1,)), ("k_scale",), (torch.float16,), good
    ),
    "scale-half": Wrong(cast("v_scale", torch.float16), ("v_scale",), (torch.float16,), fp8),
    "scale-heads": Wrong(replace(k_scale=(4,)), ("k_scale",), (4, 2), fp8),
    "scale-batch": Wrong(replace(v_scale=(2, 2)), ("v_scale",), ((2, 2), (3, 2)), fp8),
    "scale-3d": Wrong(replace(v_scale=(1, 3, 2)), ("v_scale",), ((1, 3, 2),), fp8),
    "scale-empty": Wrong(replace(v_scale=(0,)), ("v_scale",), ((0,),), fp8),
    "q-dtype": Wrong(cast("q", torch.bfloat16), ("q",), (torch.bfloat16,), rope),
    "q-tokens": Wrong(replace(q=(3, 1, 4, 64)), ("q",), ((3, 1, 4, 64),), rope),
    "q-rank": Wrong(replace(q=(3, 4, 64)), ("q",), ((3, 4, 64),), rope),
    "q-dim": Wrong(replace(q=(3, 2, 4, 32)), ("q",), (32, 64), rope),
    "q-no-head": Wrong(replace(q=(3, 2, 0, 64)), ("q",), ((3, 2, 0, 64),), rope),
    "cos-float64": Wrong(cast("cos", torch.float64), ("cos",), (torch.float64,), rope),
    "cos-bfloat16": Wrong(cast("cos", torch.bfloat16), ("cos",), (torch.bfloat16,), rope),
    "sin-other-dtype": Wrong(cast("sin", torch.float16), ("sin",), (torch.float16,), rope),
    "cos-1d": Wrong(replace(cos=(16,)), ("cos",), ((16,),), rope),
    "sin-shape": Wrong(replace(sin=(40, 8)), ("sin",), ((40, 8), (40, 16)), rope),
    "rotary-dim": Wrong(
        replace(cos=(40, 33), sin=(40, 33)), ("cos",), (64, (40, 33)), rope
    ),
    "no-position": Wrong(replace(cos=(0, 16), sin=(0, 16)), ("cos",), ((0, 16),), rope),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, device):
    """One wrong argument in an otherwise good call; nothing is written."""
    wrong = MISTAKES[name]
    call = wrong.base(device)
    run({key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in call.items()})
    bad = {**call, **wrong.change(call, device)}
    op = "rope_append_kv" if "q" in bad else "append_kv"
    if "q" in bad:
        bad.setdefault("block_table", None)
    before = {key: x.clone() for key, x in bad.items() if isinstance(x, torch.Tensor)}
    assert_refused(bad, wrong.arguments, wrong.values, op)
    for key, x in before.items():
        if x.element_size() <= 4:
            assert torch.equal(bits(bad[key]), bits(x))


@pytest.mark.parametrize("argument", ["k_cache", "v_cache", "q"])
def test_what_is_written_must_not_overlap_itself(argument, device):
    call = {"block_table": None, **rope(device)}
    call[argument] = call[argument][:, :1].expand(call[argument].shape)
    assert_refused(call, (argument,), (), "rope_append_kv")


def call_with_every_tensor(device):
    return good(device, cache_dtype=FP8[0], scale="batch", rotary_dim=32, page_size=8,
                new_lengths=(1, 2, 3))  # fmt: skip


TENSORS = [
    "q", "k", "v", "k_cache", "v_cache", "cache_seqlens", "block_table", "cos", "sin", "cu_seqlens",
    "k_scale", "v_scale",
]  # fmt: skip


def test_a_call_with_every_tensor_is_good(device):
    call = call_with_every_tensor(device)
    assert set(TENSORS) <= set(call)
    check(call)


@pytest.mark.parametrize("argument", TENSORS)
def test_meta_tensor_among_real_ones(argument, device):
    call = call_with_every_tensor(device)
    call[argument] = call[argument].to("meta")
    assert_refused(call, (argument, "k", "q"), ("meta",), "rope_append_kv")


@pytest.mark.gpu
@pytest.mark.not_emulated
@pytest.mark.parametrize("argument", TENSORS)
def test_cpu_tensor_among_cuda_ones(argument, device):
    call = call_with_every_tensor(device)
    call[argument] = call[argument].cpu()
    assert_refused(call, (argument, "q"), ("cpu",), "rope_append_kv")


@pytest.mark.gpu
def test_fp32_on_cuda(device):
    call = make_call("cpu", torch.float32)
    call = {name: x.to(device) for name, x in call.items()}
    assert_refused(call, ("k",), (torch.float32,), "append_kv")


# --- LEANATTN_CHECK=1 ----------------------------------------------------------------------------


@pytest.fixture
def check_mode(monkeypatch):
    monkeypatch.setenv("LEANATTN_CHECK", "1")


@pytest.mark.parametrize("name", ["plain", "one-token-3d", "ragged", "value-dim"])
@pytest.mark.parametrize("paging", ["contiguous", "pages-of-3"])
def test_check_mode_takes_what_is_right(paging, name, device, check_mode):
    options = {**CALLS[name], **PAGINGS[paging], "rotary_dim": 64}
    call = make_call(device, torch.float16, **options)
    if "block_table" in call:
        call["block_table"][:, -1] = 2147480000  # not needed
        call["cache_seqlens"].clamp_(max=24 - 3 - 4)
    check(call)


@pytest.mark.parametrize("length", [-1, 23, 25, INT32_MAX, INT32_MIN])
def test_check_mode_refuses_lengths(length, device, check_mode):
    call = make_call(device, torch.float16)
    call["cache_seqlens"][1] = length
    assert_refused(call, ("cache_seqlens",), (length, 24), "append_kv")


@pytest.mark.parametrize("page", [-1, 8, 2147480000])
def test_check_mode_refuses_pages(page, device, check_mode):
    call = make_call(device, torch.float16, page_size=8, lengths=(7, 0, 0), num_pages=8)
    call["block_table"].zero_()
    call["block_table"][0, 1] = page
    assert_refused(call, ("block_table",), (page, 7), "append_kv")
    call["cache_seqlens"][0] = 6
    run(call)


@pytest.mark.parametrize("bounds", [(0, 4, 3, 7), (-1, 3, 3, 7), (0, 3, 3, 8)])
def test_check_mode_refuses_offsets(bounds, device, check_mode):
    call = make_call(device, torch.float16, new_lengths=(3, 0, 4))
    call["cu_seqlens"] = int32(bounds, device)
    assert_refused(call, ("cu_seqlens",), (), "append_kv")


def test_check_mode_refuses_positions_beyond_the_tables(device, check_mode):
    call = {"block_table": None, **make_call(device, torch.float16, rotary_dim=64, max_position=18)}
    assert_refused(call, ("cache_seqlens",), (17, 18), "rope_append_kv")
    call["cache_seqlens"][2] = 16
    run(call)


@pytest.mark.gpu
def test_check_mode_is_ignored_while_capturing(device, check_mode):
    call = make_call(device, torch.float16)
    leanattn.warmup(device)
    call["cache_seqlens"].fill_(INT32_MAX)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(call)
    graph.replay()
    assert call["v_cache"].isnan().all()
