"""Steps of a layer for append_decode, and what the two ops that it stands for make of them."""

import math

import torch
from append_cases import OPS, bits, make_call

from leanattn.ops import append_kv, decode, rope_append_kv

APPEND = ("k", "v", "k_cache", "v_cache", "cache_seqlens", "block_table", "cu_seqlens", "k_scale",
          "v_scale")  # fmt: skip
ROPE = ("cos", "sin", "interleaved")


def clamped_lengths(step):
    """Tokens before the append, and the capacity."""
    rows, capacity = step["k_cache"].shape[:2]
    if step.get("block_table") is not None:
        capacity = 0 if rows == 0 else capacity * step["block_table"].shape[1]
    return step["cache_seqlens"].long().clamp(0, capacity), capacity


def new_tokens(step):
    """How many each sequence has, [B]."""
    k, offsets = step["k"], step.get("cu_seqlens")
    if offsets is None:
        return torch.full_like(step["cache_seqlens"], k.shape[1] if k.dim() == 4 else 1).long()
    return offsets.long().cummax(0).values.clamp(0, len(k)).diff()


def make_step(
    device, dtype, *, rope=True, packed=False, latent=False, interleaved=False, **options
):
    """A call of append_decode, its caches random up to the lengths and NaN from there on. `packed`:
    K and V of a token are one row. `latent`: values are in the keys."""
    options.setdefault("dims", (64, 64))
    call = make_call(
        device, dtype, rotary_dim=options["dims"][0], interleaved=interleaved, **options
    )
    if not rope:
        for name in ROPE:
            del call[name]
    generator = torch.Generator(device).manual_seed(7)
    cache_dtype = call["k_cache"].dtype
    shape = call["k_cache"].shape[:3]
    widths = [options["dims"][0], 0 if latent else options["dims"][1]]
    memory = torch.randn(*shape, sum(widths), generator=generator, device=device)
    hide_new_tokens(call, memory)
    memory = memory.to(cache_dtype)
    call["k_cache"], call["v_cache"] = memory.split(widths, -1)
    if latent:
        call["v_cache"] = memory[..., : options["dims"][1]]
        call["v"] = call["k"][..., : options["dims"][1]]
    elif not packed:
        call["k_cache"], call["v_cache"] = (x.contiguous() for x in memory.split(widths, -1))
    return call


def hide_new_tokens(call, memory):
    """NaN from the lengths on."""
    lengths, capacity = clamped_lengths(call)
    table = call.get("block_table")
    for sequence, length in enumerate(lengths.tolist()):
        for position in range(length, capacity):
            place = (sequence, position)
            if table is not None:
                page_size = memory.shape[1]
                place = (int(table[sequence, position // page_size]), position % page_size)
            if place[0] < len(memory):
                memory[place] = math.nan


def cloned(step):
    """The same step on memory of its own; views of one cache stay views of one."""
    clone = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in step.items()}
    base = step["k_cache"]._base
    if base is not None and base is step["v_cache"]._base:
        memory = base.clone()
        for name in ("k_cache", "v_cache"):
            view = step[name]
            clone[name] = memory.as_strided(view.shape, view.stride(), view.storage_offset())
    if step["v"].data_ptr() == step["k"].data_ptr() and step["v"].numel():
        clone["v"] = clone["k"][..., : step["v"].shape[-1]]
    return clone


def by_two_ops(step, **options):
    """(out, lse) of append and decode, the caches of `step` changed; its q too."""
    lengths, capacity = clamped_lengths(step)
    append = {name: step[name] for name in APPEND if name in step}
    if "cos" in step:
        append.setdefault("block_table", None)
        rope_append_kv(step["q"], **append, **{name: step[name] for name in ROPE})
    else:
        append_kv(**append)
    attended = (lengths + new_tokens(step)).clamp(max=capacity).int()
    scales = {name: step[name] for name in ("k_scale", "v_scale") if name in step}
    return decode(
        step["q"], step["k_cache"], step["v_cache"], attended, step.get("block_table"),
        cu_seqlens_q=step.get("cu_seqlens"), return_lse=True, **scales, **options,
    )  # fmt: skip


def same_numbers(one, other):
    """Bit for bit; a NaN is one whatever its bits."""
    one, other = one.float().nan_to_num(12345.0), other.float().nan_to_num(12345.0)
    return torch.equal(one, other)


def check(step, **options):
    """append_decode against the two ops: the same bits, in out, lse and the caches, and nothing
    else changed. Returns out."""
    twin = cloned(step)
    before = {name: x.clone() for name, x in step.items() if isinstance(x, torch.Tensor)}
    out, lse = OPS.append_decode_with_lse(**step, **options)
    wanted_out, wanted_lse = by_two_ops(twin, **options)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(bits(step[name]), bits(twin[name])), name
    for name in set(before) - {"k_cache", "v_cache"}:
        assert torch.equal(bits(step[name]), bits(before[name])), name
    assert same_numbers(lse, wanted_lse), (lse - wanted_lse).abs().max()
    assert same_numbers(out, wanted_out), (out - wanted_out).abs().max()
    return out
