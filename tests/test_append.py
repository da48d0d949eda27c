"""append_kv and rope_append_kv: each new row lands in its place, rotated or not, nowhere else."""

import itertools
import math

import pytest
import torch
from cases import int32, offsets, sharp_dtype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_errors import Wrong, add, assert_refused, cast, replace

import leanattn

OPS = torch.ops.leanattn

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


# --- The definition ------------------------------------------------------------------------------


def new_tokens(k, batch, cu_seqlens):
    """(sequence, how manieth, index into k) of every token that a sequence has."""
    if cu_seqlens is None:
        counts = k.shape[1] if k.dim() == 4 else 1
        for sequence, i in itertools.product(range(batch), range(counts)):
            yield sequence, i, (sequence, i) if k.dim() == 4 else (sequence,)
        return
    begin = None
    for sequence, entry in enumerate(cu_seqlens.tolist(), -1):
        end = min(max(entry, begin or 0), len(k))
        for row in range(begin or 0, end if begin is not None else 0):
            yield sequence, row - begin, (row,)
        begin = end


def rotated(row, cos, sin, interleaved):
    """[H, D] in fp64, the first 2 * len(cos) dims turned."""
    pairs = len(cos)
    row = row.clone()
    if interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    x, y = row[:, first].clone(), row[:, second].clone()
    row[:, first] = x * cos - y * sin
    row[:, second] = x * sin + y * cos
    return row


def stored(row, cache, scale, sequence):
    """[H, D] as the cache holds it: scaled, saturated, rounded once."""
    if cache.dtype not in FP8:
        return row.to(cache.dtype)
    row = row.double()
    if scale is not None:
        scale = scale.double()
        if scale.numel() == 1:
            row = row / scale.flatten()
        else:
            row = row / (scale if scale.dim() == 1 else scale[sequence])[:, None]
    largest = torch.finfo(cache.dtype).max
    return row.clamp(-largest, largest).float().to(cache.dtype)


def assign(cache, place, row):
    """cache[place] = row, bit for bit, also where torch cannot index fp8."""
    if cache.dtype in FP8:
        cache, row = cache.view(torch.uint8), row.view(torch.uint8)
    cache[place] = row


def expected(
    k, v, k_cache, v_cache, cache_seqlens, block_table=None, *, q=None, cos=None, sin=None,
    interleaved=False, cu_seqlens=None, k_scale=None, v_scale=None,
):  # fmt: skip
    """(k_cache, v_cache, q) after the call, and which numbers of k_cache were rotated and so are
    known to an error only."""
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    k_inexact = torch.zeros(k_cache.shape, dtype=torch.bool, device=k.device)
    q = None if q is None else q.clone()
    batch = len(cache_seqlens)
    page_size = k_cache.shape[1]
    capacity = page_size if block_table is None else page_size * block_table.shape[1]
    capacity = 0 if len(k_cache) == 0 else capacity
    for sequence, i, index in new_tokens(k, batch, cu_seqlens):
        position = min(max(int(cache_seqlens[sequence]), 0), capacity) + i
        k_row, v_row = k[index], v[index]
        if cos is not None:
            at = min(position, len(cos) - 1)
            k_row = rotated(k_row.double(), cos[at].double(), sin[at].double(), interleaved)
            q_row = rotated(q[index].double(), cos[at].double(), sin[at].double(), interleaved)
            q[index] = q_row.to(q.dtype)
        if position >= capacity:
            continue
        place = (sequence, position)
        if block_table is not None:
            page = int(block_table[sequence, position // page_size])
            if not 0 <= page < len(k_cache):
                continue
            place = (page, position % page_size)
        assign(k_cache, place, stored(k_row, k_cache, k_scale, sequence))
        assign(v_cache, place, stored(v_row, v_cache, v_scale, sequence))
        if cos is not None:
            k_inexact[(*place, slice(None), slice(0, 2 * cos.shape[1]))] = True
    return k_cache, v_cache, q, k_inexact


def bits(tensor):
    """What torch.equal can compare, NaN included."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def step(values):
    """The spacing of a dtype at these numbers, in fp64."""
    info = torch.finfo(values.dtype)
    size = values.double().abs().nan_to_num(0, 0, 0).clamp(min=info.smallest_normal)
    return torch.ldexp(torch.full_like(size, info.eps), torch.frexp(size).exponent - 1)


def assert_rotated(actual, wanted, magnitude):
    """One spacing of the dtype, and fp32's error in the products."""
    limit = 1.01 * step(wanted) + 2e-6 * magnitude
    assert ((actual.double() - wanted.double()).abs() <= limit).all()


# --- Inputs --------------------------------------------------------------------------------------


def make_call(
    device, dtype, *, cache_dtype=None, batch=3, seqlen_new=2, new_lengths=None, heads=(4, 2),
    dims=(64, 64), lengths=(5, 0, 17), capacity=24, page_size=None, num_pages=None, rotary_dim=None,
    max_position=40, interleaved=False, table_dtype=torch.float32, scale=None, seed=1,
):  # fmt: skip
    """Random new rows; caches full of bytes that no number of the rows gives."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    heads_q, heads_kv = heads
    cache_dtype = cache_dtype or dtype
    if new_lengths is not None:
        rows = (sum(new_lengths),)
    else:
        rows = (batch,) if seqlen_new is None else (batch, seqlen_new)
    call = dict(k=normal(*rows, heads_kv, dims[0]), v=normal(*rows, heads_kv, dims[1]))
    if page_size is None:
        shape = (batch, capacity)
    else:
        max_pages = -(-capacity // page_size)
        num_pages = batch * max_pages + 2 if num_pages is None else num_pages
        shape = (num_pages, page_size)
        order = torch.randperm(max(num_pages, batch * max_pages), generator=generator,
                               device=device)[: batch * max_pages]  # fmt: skip
        call["block_table"] = order.view(batch, max_pages).int()
    for name, dim in zip(("k_cache", "v_cache"), dims):
        memory = torch.full((*shape, heads_kv, dim), math.nan, device=device)
        call[name] = memory.to(cache_dtype)
    call["cache_seqlens"] = int32(list(lengths)[:batch], device)
    if new_lengths is not None:
        call["cu_seqlens"] = offsets(new_lengths, device)
    if scale is not None:
        shape = {"one": (1,), "scalar": (), "head": (heads_kv,), "batch": (batch, heads_kv)}[scale]
        for name in ("k_scale", "v_scale"):
            call[name] = 0.01 + normal(*shape, dtype=torch.float32).abs()
    if rotary_dim is not None:
        call["q"] = normal(*rows, heads_q, dims[0])
        angles = normal(max_position, rotary_dim // 2, dtype=torch.float32)
        call["cos"], call["sin"] = angles.cos().to(table_dtype), angles.sin().to(table_dtype)
        call["interleaved"] = interleaved
    return call


def run(call):
    """The op on these very tensors."""
    if "q" in call:
        OPS.rope_append_kv(**{"block_table": None, **call})
    else:
        OPS.append_kv(**call)


def check(call):
    """Run the op and compare every element of the caches and of q, and that the rest stayed."""
    wanted_k, wanted_v, wanted_q, inexact = expected(**call)
    written = ("k_cache", "v_cache", "q")
    before = {name: x.clone() for name, x in call.items() if isinstance(x, torch.Tensor)}
    run(call)
    k_cache, v_cache = call["k_cache"], call["v_cache"]
    assert torch.equal(bits(v_cache), bits(wanted_v)), "v_cache"
    exact = ~inexact
    assert torch.equal(bits(k_cache)[exact], bits(wanted_k)[exact]), "k_cache"
    largest = max((call[n].abs().max().item() for n in ("k", "q") if n in call and call[n].numel()),
                  default=0)  # fmt: skip
    if inexact.any():
        scales = before.get("k_scale", torch.ones(1)).min().item()
        error = 3 * largest / (scales if k_cache.dtype in FP8 else 1)
        assert_rotated(k_cache.float()[inexact].to(k_cache.dtype),
                       wanted_k.float()[inexact].to(k_cache.dtype), error)  # fmt: skip
    if wanted_q is not None:
        rotary_dim = 2 * call["cos"].shape[1]
        if wanted_q.numel():
            assert_rotated(call["q"], wanted_q, 3 * largest)
        assert torch.equal(bits(call["q"][..., rotary_dim:]), bits(before["q"][..., rotary_dim:]))
    for name in set(before) - set(written):
        assert torch.equal(bits(call[name]), bits(before[name])), name


CALLS = {
    "plain": dict(),
    "one-token": dict(seqlen_new=1),
    "one-token-3d": dict(seqlen_new=None),
    "ragged": dict(new_lengths=(3, 0, 4)),
    "ragged-many": dict(batch=70, new_lengths=[i % 3 for i in range(70)],
                        lengths=[i % 20 for i in range(70)]),
    "value-dim": dict(dims=(64, 32)),
    "one-head": dict(heads=(1, 1), seqlen_new=5),
    "many-heads": dict(heads=(48, 16), dims=(128, 128), seqlen_new=1),
    "odd-dims": dict(dims=(7, 5)),
    "mla": dict(heads=(16, 1), dims=(576, 512)),
    "full": dict(lengths=(23, 24, 22), seqlen_new=3),
    "long": dict(batch=1, lengths=(20,), seqlen_new=70, capacity=88),
}  # fmt: skip
PAGINGS = {"contiguous": {}, "pages-of-1": dict(page_size=1), "pages-of-3": dict(page_size=3),
           "pages-of-16": dict(page_size=16), "one-page": dict(page_size=512)}  # fmt: skip
ROPES = {
    "no-rope": {},
    "neox": dict(rotary_dim=1.0),
    "gptj": dict(rotary_dim=1.0, interleaved=True),
    "neox-partial": dict(rotary_dim=0.5),
    "gptj-partial": dict(rotary_dim=0.25, interleaved=True),
}


def with_rope(rope, options):
    """rotary_dim as a part of the head dim, made even."""
    if not rope:
        return options
    dim = options.get("dims", (64, 64))[0]
    return {**options, **rope, "rotary_dim": int(dim * rope["rotary_dim"]) // 2 * 2}


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

BAD_LENGTHS = [
    (INT32_MIN, INT32_MAX, -1), (24, 23, 25), (2_000_000_000, 0, 5), (INT32_MAX - 1, 22, -24),
]  # fmt: skip


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


# --- Errors --------------------------------------------------------------------------------------


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


# --- Within torch --------------------------------------------------------------------------------

SCHEMAS = {
    "append_kv": "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor "
    "cache_seqlens, Tensor? block_table=None, *, Tensor? cu_seqlens=None, Tensor? k_scale=None, "
    "Tensor? v_scale=None) -> ()",
    "rope_append_kv": "(Tensor(c!) q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cache_seqlens, Tensor? block_table, Tensor cos, Tensor sin, *, bool interleaved=False, "
    "Tensor? cu_seqlens=None, Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
}


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema(op):
    expected_schema = torch._C.parse_schema(f"leanattn::{op}{SCHEMAS[op]}")
    assert str(getattr(OPS, op).default._schema) == str(expected_schema)


@pytest.mark.parametrize("name", ["plain", "one-token-3d", "ragged"])
@pytest.mark.parametrize("paging", ["contiguous", "pages-of-3"])
def test_opcheck(paging, name, device):
    """k_cache, v_cache and q change, and nothing else."""
    options = {**CALLS[name], **PAGINGS[paging]}
    call = make_call(device, torch.float16, **options)
    call["k_cache"].zero_()
    call["v_cache"].zero_()
    torch.library.opcheck(OPS.append_kv.default, (), call)
    call = {"block_table": None, **make_call(device, torch.float16, rotary_dim=64, **options)}
    call["k_cache"].zero_()
    call["v_cache"].zero_()
    torch.library.opcheck(OPS.rope_append_kv.default, (), call)


def attention_step(qkv, storage, cache_seqlens, cos, sin):
    """One layer's step, everything between the projections; K and V packed, or two caches."""
    q, k, v = (qkv * 2).split([4, 2, 2], dim=2)
    k_cache, v_cache = storage if isinstance(storage, tuple) else storage.split(64, -1)
    leanattn.rope_append_kv(q, k, v, k_cache, v_cache, cache_seqlens, None, cos, sin)
    out = leanattn.decode(q, k_cache, v_cache, cache_seqlens + q.shape[1])
    return out + 1, q * 3


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, packed, device):
    """Functionalized and put back in place, the caches being the graph's own inputs, also where K
    and V share their memory, and q a view of a buffer of inductor's."""
    if device == "cuda" and backend == "inductor":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    compiled = torch.compile(attention_step, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 3):
        dtype = sharp_dtype(device)
        call = make_call(device, dtype, batch=batch, rotary_dim=64)
        qkv = torch.randn(batch, 2, 8, 64, device=device).to(dtype)
        results = []
        for step_function in (attention_step, compiled):
            storage = torch.zeros(batch, 24, 2, 128, dtype=dtype, device=device)
            caches = storage if packed else tuple(x.clone() for x in storage.split(64, -1))
            rest = (call["cache_seqlens"], call["cos"], call["sin"])
            out = step_function(qkv, caches, *rest)
            results.append((*out, *(storage.split(64, -1) if packed else caches)))
        assert (results[0][2] != 0).any()
        for actual, wanted in zip(results[1], results[0]):
            torch.testing.assert_close(actual, wanted, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_backward_says_what_to_use(argument, op, device):
    """What was written knows that there is no way back."""
    call = make_call(device, torch.float16, rotary_dim=None if op == "append_kv" else 64)
    if argument not in call:
        pytest.skip("append_kv has no q")
    leaf = call[argument].requires_grad_()
    call[argument] = leaf * 1
    run(call)
    for name in ("k_cache", "v_cache", "q"):
        if name in call:
            with pytest.raises(RuntimeError, match="scaled_dot_product_attention"):
                call[name].float().sum().backward()


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_autograd(guard, device):
    call = make_call(device, torch.float16, rotary_dim=64)
    call["k"].requires_grad_()
    with guard():
        run(call)
    assert not call["k_cache"].requires_grad


def test_same_bits_in_every_run(device):
    first = make_call(device, torch.bfloat16, rotary_dim=64, seqlen_new=9)
    run(first)
    for _ in range(5):
        again = make_call(device, torch.bfloat16, rotary_dim=64, seqlen_new=9)
        run(again)
        for name in ("q", "k_cache", "v_cache"):
            assert torch.equal(bits(again[name]), bits(first[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "ragged"])
def test_graph_replay_without_a_sync(name, device):
    """A replay appends at the lengths, offsets and pages that it finds."""
    options = {**CALLS[name], "page_size": 4, "rotary_dim": 64}
    call = make_call(device, torch.float16, **options)
    leanattn.warmup(device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(call)
    for lengths in ((0, 1, 2), (20, 21, 22), (-5, 24, INT32_MAX)):
        call["cache_seqlens"].copy_(int32(lengths, device))
        call["block_table"].copy_(call["block_table"].roll(1, 0))
        call["q"].normal_()
        wanted = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in call.items()}
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(wanted)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph.replay()
        for written in ("q", "k_cache", "v_cache"):
            assert torch.equal(bits(call[written]), bits(wanted[written]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_one_launch(name, device):
    call = make_call(device, torch.float16, rotary_dim=2, **CALLS[name])
    run(call)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(call)
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    names = [event.name for event in profile.events() if event.device_type == cuda]
    names = [name for name in names if "Sync" not in name]
    if not names:
        pytest.skip("the profiler sees no kernels here")
    assert len(names) == 1, names


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


@pytest.mark.gpu
def test_cpu_and_cuda_agree(device):
    """Bit for bit where nothing is rotated."""
    for cache_dtype in (torch.float16, torch.bfloat16, *FP8):
        scale = "batch" if cache_dtype in FP8 else None
        call = make_call("cpu", torch.float16, cache_dtype=cache_dtype, scale=scale, seqlen_new=9)
        call["k"] *= 50
        moved = {name: x.to(device) for name, x in call.items()}
        run(call)
        run(moved)
        for name in ("k_cache", "v_cache"):
            actual, wanted = moved[name].cpu().float(), call[name].float()
            assert torch.equal(actual.nan_to_num(1e9), wanted.nan_to_num(1e9))
