"""append_kv and rope_append_kv: each new row lands in its place, rotated or not, nowhere else."""

import itertools
import math

import pytest
import torch
from append_cases import (
    BAD_LENGTHS,
    CALLS,
    FP8,
    INT32_MAX,
    INT32_MIN,
    OPS,
    PAGINGS,
    ROPES,
    bits,
    check,
    expected,
    make_call,
    run,
    with_rope,
)
from cases import int32, sharp_dtype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_errors import assert_refused

import leanattn

# --- Where rows go -------------------------------------------------------------------------------


COMBINATIONS = [*itertools.product(PAGINGS, ["no-rope"])]
COMBINATIONS += itertools.product(["contiguous", "pages-of-3"], list(ROPES)[1:])


@pytest.mark.parametrize("paging, rope", COMBINATIONS)
@pytest.mark.parametrize("name", CALLS)
def test_named_call(name, paging, rope, device):
    """Every shape in contiguous and paged caches, rotated in every way."""
    options = with_rope(ROPES[rope], {**CALLS[name], **PAGINGS[paging]})
    check(make_call(device, torch.float16, **options))


@pytest.mark.parametrize("rope", ["no-rope", "neox", "gptj-partial"])
@pytest.mark.parametrize("cache_dtype", ["same", torch.float16, torch.bfloat16, *FP8])
def test_dtypes(cache_dtype, rope, device, dtype):
    """Any cache takes new rows of any dtype; equal dtypes are copied bit for bit."""
    cache_dtype = dtype if cache_dtype == "same" else cache_dtype
    for table_dtype in (torch.float32, dtype):
        options = with_rope(ROPES[rope], dict(table_dtype=table_dtype))
        check(make_call(device, dtype, cache_dtype=cache_dtype, **options))


def test_fp32_cache(device):
    """On the CPU alone."""
    call = make_call(device, torch.float16, cache_dtype=torch.float32)
    if device == "cpu":
        check(call)
    else:
        assert_refused(call, ("k_cache",), (torch.float32,), "append_kv")


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf, 65504.0, -0.0, 6e-8])
def test_specials_are_copied(value, device, dtype):
    call = make_call(device, dtype)
    call["k"][1, 0, 1, 5] = call["v"][1, 1, 0, 63] = value
    check(call)


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("scale", [None, "one", "scalar", "head", "batch"])
@pytest.mark.parametrize("cache_dtype", FP8)
@pytest.mark.parametrize("shape", [dict(), dict(new_lengths=(3, 0, 4)), dict(dims=(36, 20))])
def test_fp8_scales(shape, cache_dtype, scale, where, device):
    """Value over scale, saturated, NaN kept; a scale for K alone, for V alone."""
    call = make_call(device, torch.float16, cache_dtype=cache_dtype, scale=scale, **shape)
    call["k"] *= 100
    call["v"] *= 3
    special = [math.nan, math.inf, -math.inf, 448.0, 464.0, 480.0, -1e4, 6e4, 1e-4, 0.0]
    for row in (call["k"].flatten(0, -2)[0], call["v"].flatten(0, -2)[-1]):
        row[: len(special)] = torch.tensor(special, device=device).half()
    if scale is not None:
        del call[{"k": "v_scale", "v": "k_scale"}[where]]
    wanted_k, wanted_v, _, _ = expected(**call)
    run(call)
    for actual, wanted in ((call["k_cache"], wanted_k), (call["v_cache"], wanted_v)):
        actual, wanted = actual.float(), wanted.float()
        assert torch.equal(actual.isnan(), wanted.isnan()) and not actual.isinf().any()
        actual, wanted = actual.nan_to_num(0), wanted.nan_to_num(0)
        # A quotient within fp32's error of the middle between two numbers may go to either.
        differs = actual != wanted
        assert differs.float().mean() < 1e-3
        assert (actual - wanted)[differs].abs().le(wanted[differs].abs() * 0.26).all()


def test_strided_scales(device):
    call = make_call(device, sharp_dtype(device), cache_dtype=FP8[0], scale="batch")
    both = torch.stack([call["k_scale"].T.contiguous(), call["v_scale"].T.contiguous()], -1)
    call["k_scale"], call["v_scale"] = both[..., 0].T, both[..., 1].T
    check(call)


def test_every_position(device):
    """Each position of a sequence, one token at a time: the caches fill up in order."""
    for page_size in (None, 1, 3, 8):
        call = make_call(device, torch.float16, page_size=page_size, seqlen_new=1)
        for length in range(26):
            call["cache_seqlens"].fill_(length)
            call["k"].normal_()
            call["v"].normal_()
            check(call)
        seen = ~call["v_cache"].float().isnan().flatten(1).any(1)
        assert seen.all() if page_size is None else seen.sum() == call["block_table"].numel()


# --- What lies on the device ---------------------------------------------------------------------


@pytest.mark.parametrize("rope", ["no-rope", "neox"])
@pytest.mark.parametrize("paging", ["contiguous", "pages-of-3"])
@pytest.mark.parametrize("lengths", BAD_LENGTHS)
def test_lengths_are_clamped(lengths, paging, rope, device):
    options = {**PAGINGS[paging], "lengths": lengths}
    check(make_call(device, torch.float16, **with_rope(ROPES[rope], options)))
    ragged = {**options, "new_lengths": (3, 1, 2)}
    check(make_call(device, torch.float16, **with_rope(ROPES[rope], ragged)))


@pytest.mark.parametrize("page", [-1, INT32_MIN, INT32_MAX, 2147480000, "num_pages"])
def test_a_page_that_there_is_not_is_skipped(page, device):
    """Neither a fault nor somebody else's page: the rows are not written, q is still rotated."""
    for rope in ("no-rope", "neox"):
        options = dict(page_size=4, lengths=(5, 0, 11), seqlen_new=6)
        call = make_call(device, torch.float16, **with_rope(ROPES[rope], options))
        page = len(call["k_cache"]) if page == "num_pages" else page
        call["block_table"][0, 2] = call["block_table"][1, :] = page
        check(call)


def test_only_the_entries_of_written_pages_are_used(device):
    """Unused entries hold anything."""
    call = make_call(device, torch.float16, page_size=4, lengths=(5, 0, 11), seqlen_new=2)
    used = torch.zeros_like(call["block_table"], dtype=torch.bool)
    for sequence, (first, last) in enumerate(((5, 6), (0, 1), (11, 12))):
        used[sequence, first // 4 : last // 4 + 1] = True
    call["block_table"][~used] = 2147480000
    check(call)
    assert (~call["v_cache"].isnan()).sum() == 3 * 2 * 2 * 64


@pytest.mark.parametrize(
    "bounds",
    [
        (0, 0, 0, 0), (2, 3, 5, 7), (0, 5, 3, 7), (0, 7, 7, 7), (3, 2, 1, 0), (-4, -2, 3, 90),
        (0, 3, INT32_MAX, 7), (INT32_MIN, 2, INT32_MIN, 5), (7, 7, 7, 7), (9, 9, 9, 9),
        (5, 0, 6, 6),
    ],
)  # fmt: skip
def test_offsets_are_clamped(bounds, device):
    """To [previous entry, total], like decode's; what no sequence has is left alone."""
    for rope in ("no-rope", "gptj"):
        options = with_rope(ROPES[rope], dict(new_lengths=(3, 0, 4)))
        call = make_call(device, torch.float16, **options)
        call["cu_seqlens"] = int32(bounds, device)
        check(call)


@pytest.mark.parametrize("kind", ["sorted", "shuffled", "late"])
def test_offsets_of_many_sequences(kind, device):
    """More sequences than threads, in order and not."""
    batch = 1500
    new_lengths = [int(i % 97 == 0) for i in range(batch)]
    call = make_call(device, torch.float16, batch=batch, new_lengths=new_lengths, capacity=3,
                     lengths=[0] * batch, heads=(1, 1), dims=(8, 8))  # fmt: skip
    if kind == "shuffled":
        order = torch.randperm(batch + 1, device=device)
        call["cu_seqlens"] = call["cu_seqlens"][order]
    if kind == "late":
        call["cu_seqlens"][:-1] = 0
    check(call)


def test_positions_beyond_cos_and_sin_take_the_last(device):
    call = make_call(device, torch.float16, rotary_dim=64, max_position=7)
    check(call)
    check(make_call(device, torch.float16, rotary_dim=64, max_position=1))


# --- Strides -------------------------------------------------------------------------------------


def sliced(x, dim_before=8, dim_after=8):
    """The same values as a slice of something larger, its neighbours NaN; and the larger one."""
    shape = (*x.shape[:-1], dim_before + x.shape[-1] + dim_after)
    big = torch.full(shape, math.nan, device=x.device).to(x.dtype)
    view = big[..., dim_before : dim_before + x.shape[-1]]
    view.copy_(x)
    return view, big


@pytest.mark.parametrize("rope", ["no-rope", "neox", "gptj-partial"])
@pytest.mark.parametrize("shift", [8, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("name", ["plain", "one-token-3d", "ragged"])
@pytest.mark.parametrize("paging", ["contiguous", "pages-of-3"])
def test_slices(paging, name, shift, rope, device):
    """Every tensor is a part of a larger one, and nothing beside it is touched."""
    options = with_rope(ROPES[rope], {**CALLS[name], **PAGINGS[paging]})
    call = make_call(device, torch.float16, **options)
    around = {}
    for tensor in ("q", "k", "v", "k_cache", "v_cache", "cos", "sin"):
        if tensor in call:
            call[tensor], around[tensor] = sliced(call[tensor], shift, 16 - shift)
    check(call)
    for tensor, big in around.items():
        call[tensor].fill_(math.nan)
        assert big.isnan().all(), tensor


@pytest.mark.parametrize("cache_dtype", [torch.float16, *FP8])
def test_packed_pages(cache_dtype, device):
    """[num_pages, Hkv, page_size, 2 D] storage, K and V its two halves."""
    call = make_call(device, torch.float16, cache_dtype=cache_dtype, page_size=8)
    pages, page_size, heads, dim = call["k_cache"].shape
    storage = torch.full((pages, heads, page_size, 2 * dim), math.nan, device=device)
    storage = storage.to(cache_dtype)
    call["k_cache"], call["v_cache"] = storage.transpose(1, 2).split(dim, -1)
    check(call)
    assert (~storage.float().isnan()).sum() == 2 * 3 * 2 * 2 * 64


def test_packed_qkv(device):
    """q, k and v are slices of one projection; q is rotated inside of it."""
    qkv = torch.randn(3, 2, 4 + 2 + 2, 64, device=device).half()
    call = make_call(device, torch.float16, rotary_dim=32)
    call["q"], call["k"], call["v"] = qkv.split([4, 2, 2], dim=2)
    before = qkv.clone()
    check(call)
    assert torch.equal(qkv[:, :, 4:], before[:, :, 4:])
    assert not torch.equal(qkv[:, :, :4], before[:, :, :4])


def test_heads_first_caches_and_rows(device):
    """BHSD storage as transposed views."""
    call = make_call(device, torch.float16, rotary_dim=64)
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        call[name] = call[name].transpose(1, 2).contiguous().transpose(1, 2)
    check(call)


@pytest.mark.parametrize("rope", ["no-rope", "neox", "gptj"])
def test_a_last_dimension_with_a_stride(rope, device):
    call = make_call(device, torch.float16, **with_rope(ROPES[rope], {}))
    for name in ("q", "k", "v", "k_cache", "v_cache", "cos", "sin"):
        if name in call:
            call[name] = torch.stack([call[name], call[name]], -1)[..., 1]
    check(call)


def test_expanded_rows(device):
    """Stride 0 in what is read: one new row for every head and sequence."""
    call = make_call(device, torch.float16)
    call["k"] = call["k"][:1, :, :1].expand(3, 2, 2, 64)
    call["v"] = call["v"][..., :1].expand(3, 2, 2, 64)
    check(call)


def test_small_tensors_with_strides(device):
    call = make_call(device, torch.float16, page_size=3, new_lengths=(1, 2, 3))
    for name in ("cache_seqlens", "cu_seqlens"):
        call[name] = torch.stack([call[name], call[name] * 0 + 99], -1)[:, 0]
    wide = torch.full((2 * 3, 2 * 8), 99, dtype=torch.int32, device=device)[::2, ::2]
    call["block_table"] = wide.copy_(call["block_table"])
    check(call)


def test_strides_of_single_rows_mean_nothing(device):
    call = make_call(device, torch.float16, batch=1, seqlen_new=1, heads=(1, 1))
    for name in ("k", "v", "k_cache", "v_cache"):
        x = call[name]
        strides = [2**40 + 1 if size == 1 else x.stride(i) for i, size in enumerate(x.shape)]
        call[name] = x.as_strided(x.shape, strides)
    check(call)


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31_elements(device):
    """64-bit offsets: the last page and the last token of a cache of 5 GiB."""
    shape = (2**21 + 2**18, 1, 8, 128)
    if torch.cuda.mem_get_info()[0] < 3 * 2 * math.prod(shape):
        pytest.skip("needs 15 GB of GPU memory")
    cache = torch.zeros(shape, dtype=torch.float16, device=device)
    other = torch.zeros((shape[0], 1, 8, 8), dtype=torch.float16, device=device)
    k = torch.ones(1, 8, 128, dtype=torch.float16, device=device)
    v = torch.ones(1, 8, 8, dtype=torch.float16, device=device)
    last = shape[0] - 1
    OPS.append_kv(k, v, cache, other, int32([0], device), int32([[last]], device))
    OPS.append_kv(k, v, cache.view(1, shape[0], 8, 128), other.view(1, shape[0], 8, 8),
                  int32([last - 1], device))  # fmt: skip
    assert (cache[-2:] == 1).all() and (other[-2:] == 1).all()
    assert cache.count_nonzero() == 2 * 8 * 128 and other.count_nonzero() == 2 * 8 * 8


# --- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(batch=0, lengths=()), dict(seqlen_new=0), dict(capacity=0),
        dict(new_lengths=(0, 0, 0)),
        dict(batch=0, lengths=(), new_lengths=()), dict(page_size=4, num_pages=0),
        dict(page_size=4, capacity=0), dict(rotary_dim=64, capacity=0), dict(rotary_dim=0),
        dict(page_size=4, num_pages=0, rotary_dim=64), dict(batch=0, lengths=(), rotary_dim=64),
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)  # fmt: skip
def test_zero_sizes(options, device):
    check(make_call(device, torch.float16, **options))


def test_rows_without_a_sequence_and_no_sequences(device):
    """B = 0 and yet ragged rows: nobody's."""
    call = make_call(device, torch.float16, batch=0, lengths=(), new_lengths=(), rotary_dim=64)
    for name, heads in (("q", 4), ("k", 2), ("v", 2)):
        call[name] = torch.randn(5, heads, 64, device=device).half()
    check(call)


@st.composite
def random_options(draw):
    batch = draw(st.integers(0, 4))
    capacity = draw(st.integers(0, 40))
    any_length = st.one_of(st.integers(0, capacity), st.integers(INT32_MIN, INT32_MAX))
    dims = st.sampled_from([1, 2, 6, 8, 16, 24, 40, 64, 128])
    options = dict(
        batch=batch,
        capacity=capacity,
        lengths=draw(st.lists(any_length, min_size=batch, max_size=batch)),
        heads=(draw(st.integers(1, 5)), draw(st.integers(1, 4))),
        dims=(draw(dims), draw(dims)),
        page_size=draw(st.sampled_from([None, None, 1, 3, 8, 16])),
        cache_dtype=draw(st.sampled_from([torch.float16, torch.bfloat16, None])),
        seed=draw(st.integers(0, 1000)),
    )
    if draw(st.booleans()):
        options["new_lengths"] = draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch))
    else:
        options["seqlen_new"] = draw(st.sampled_from([None, 0, 1, 2, 9]))
    if draw(st.booleans()):
        options["rotary_dim"] = 2 * draw(st.integers(0, options["dims"][0] // 2))
        options["interleaved"] = draw(st.booleans())
        options["max_position"] = draw(st.integers(1, 60))
    return options, draw(st.booleans())


@settings(
    max_examples=80, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(drawn=random_options())
def test_random_combinations(device, drawn):
    options, wrong_offsets = drawn
    call = make_call(device, torch.float16, **options)
    if wrong_offsets and "cu_seqlens" in call:
        call["cu_seqlens"] = call["cu_seqlens"].flip(0) - 2
    check(call)


# --- With decode ---------------------------------------------------------------------------------


def test_append_then_decode_sees_the_new_tokens(device):
    """The documented order: append at the old lengths, decode with the new ones."""
    call = make_call(device, sharp_dtype(device), seqlen_new=1)
    for name in ("k_cache", "v_cache"):
        call[name].normal_()
    run(call)
    q = torch.randn(3, 1, 4, 64, device=device).to(call["k"].dtype)
    lengths = call["cache_seqlens"] + 1
    out = leanattn.decode(q, call["k_cache"], call["v_cache"], lengths)
    without = leanattn.decode(q, call["k_cache"], call["v_cache"], call["cache_seqlens"])
    assert (out[1] == call["v"][1].repeat_interleave(2, 1)).all()  # its first token
    assert (out[[0, 2]] != without[[0, 2]]).any()


def test_python_wrappers(device):
    """Positions and names are the ops', and nothing is returned."""
    call = make_call(device, torch.float16, page_size=4, rotary_dim=64)
    rope = {name: call.pop(name) for name in ("q", "cos", "sin", "interleaved")}
    wanted_k, wanted_v, _, _ = expected(**call)
    positional = [call[name] for name in ("k", "v", "k_cache", "v_cache", "cache_seqlens")]
    assert leanattn.append_kv(*positional, call["block_table"]) is None
    assert torch.equal(bits(call["k_cache"]), bits(wanted_k))
    assert torch.equal(bits(call["v_cache"]), bits(wanted_v))
    again = make_call(device, torch.float16, page_size=4, rotary_dim=64)
    run(again)
    assert leanattn.rope_append_kv(
        rope["q"], *positional, call["block_table"], rope["cos"], rope["sin"]
    ) is None  # fmt: skip
    assert torch.equal(bits(call["k_cache"]), bits(again["k_cache"]))
    assert torch.equal(bits(rope["q"]), bits(again["q"]))
