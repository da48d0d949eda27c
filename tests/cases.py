"""Inputs for the op, as keyword arguments that both `reference` and the op understand."""

import pytest
import torch
from reference import assert_close, clamped_lengths, query_ranges, visible_range

import leanattn  # noqa: F401  (registers torch.ops.leanattn)


def sharp_dtype(device):
    """The dtype that shows errors best where a test runs in one only."""
    return torch.float32 if device == "cpu" else torch.float16


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def offsets(query_lengths, device):
    """cu_seqlens_q of these query lengths."""
    return int32([0] + torch.tensor(query_lengths).cumsum(0).tolist(), device)


def make_case(
    device, dtype, *, heads=(4, 2), dims=(64, 64), lengths=(5, 200, 77), batch=None, capacity=None,
    seqlen_q=1, query_lengths=None, mean=0.0, scale_q=1.0, alibi=None, sinks=False, seed=1,
    poison=torch.nan, cache_dtype=None, scales=None, values_in_keys=False, **options,
):  # fmt: skip
    """Random inputs; every key that no query of its sequence may see holds `poison`.

    `seqlen_q=None` gives q without that dimension, `query_lengths` ragged queries, `lengths=None`
    no cache_seqlens. `alibi` is None, "heads" or "batch". `cache_dtype` is a float8, with `scales`
    None, "one", "heads" or "batch". With `values_in_keys` v_cache is a view of k_cache's first
    columns.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, dtype=dtype):
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return (values + mean).to(dtype)

    heads_q, heads_kv = heads
    dim, dim_v = dims
    batch = len(lengths) if batch is None else batch
    if capacity is None:
        capacity = max([0, *lengths]) + 37
    case = dict(options)
    if query_lengths is not None:
        case["q"] = normal(sum(query_lengths), heads_q, dim)
        case["cu_seqlens_q"] = offsets(query_lengths, device)
    elif seqlen_q is None:
        case["q"] = normal(batch, heads_q, dim)
    else:
        case["q"] = normal(batch, seqlen_q, heads_q, dim)
    case["q"] *= scale_q
    case["k_cache"] = normal(batch, capacity, heads_kv, dim)
    case["v_cache"] = normal(batch, capacity, heads_kv, dim_v)
    if values_in_keys:
        case["v_cache"] = case["k_cache"][..., :dim_v]
    if lengths is not None:
        case["cache_seqlens"] = int32(list(lengths), device)
    if alibi is not None:
        shape = (heads_q,) if alibi == "heads" else (batch, heads_q)
        case["alibi_slopes"] = 0.05 * normal(*shape, dtype=torch.float32).abs()
    if sinks:
        case["sinks"] = 2 + normal(heads_q, dtype=torch.float32)
    if poison is not None:
        poison_unseen(case, poison)
    for name in ("k", "v") if scales is not None else ():
        shape = {"one": (), "heads": (heads_kv,), "batch": (batch, heads_kv)}[scales]
        case[f"{name}_scale"] = normal(*shape, dtype=torch.float32).abs() + 0.25
    if cache_dtype is not None:
        case["k_cache"] = case["k_cache"].to(cache_dtype)
        case["v_cache"] = case["v_cache"].to(cache_dtype)
        if values_in_keys:
            case["v_cache"] = case["k_cache"][..., :dim_v]
    return case


def poison_unseen(case, poison):
    """Overwrite every key that no query row of its sequence may see."""
    k_cache, v_cache = case["k_cache"], case["v_cache"]
    batch, capacity = k_cache.shape[:2]
    rules = {name: case[name] for name in ("causal", "window_left", "window_right") if name in case}
    lengths = clamped_lengths(case.get("cache_seqlens"), batch, capacity)
    ranges = query_ranges(case["q"], batch, case.get("cu_seqlens_q"))
    for sequence, (length, (row_begin, row_end)) in enumerate(zip(lengths, ranges)):
        unseen = torch.ones(capacity, dtype=torch.bool, device=k_cache.device)
        for row in range(row_end - row_begin):
            unseen[slice(*visible_range(length, row_end - row_begin, row, **rules))] = False
        k_cache[sequence, unseen] = poison
        v_cache[sequence, unseen] = poison


def run(case, **more):
    """(out, lse) of the op."""
    return torch.ops.leanattn.decode_with_lse(**case, **more)


def check(case, **more):
    """Run the op and hold its result against fp64."""
    out, lse = run(case, **more)
    assert_close(out, lse, **case)
    return out, lse


def launched(call):
    """Names of what `call` launches on the GPU: kernels, copies and memsets."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    names = [event.name for event in profile.events() if event.device_type == cuda]
    names = [name for name in names if "Sync" not in name]
    if not names:
        pytest.skip("the profiler sees no kernels here")
    return names
