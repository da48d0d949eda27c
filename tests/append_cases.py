"""What append_kv and rope_append_kv do, in plain torch, and calls to hold against it."""

import itertools
import math

import torch
from cases import int32, offsets

import leanattn  # noqa: F401  (registers torch.ops.leanattn)

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
    """[H, D] in fp64, the first 2 * len(cos) dims turned; cos and sin [pairs]."""
    pairs = len(cos)
    row, cos, sin = row.double().clone(), cos.double(), sin.double()
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
            k_row = rotated(k_row, cos[at], sin[at], interleaved)
            q_row = rotated(q[index], cos[at], sin[at], interleaved)
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


BAD_LENGTHS = [
    (INT32_MIN, INT32_MAX, -1), (24, 23, 25), (2_000_000_000, 0, 5), (INT32_MAX - 1, 22, -24),
]  # fmt: skip
