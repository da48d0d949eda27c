"""Calls over several ranks from calls of one: each rank's tokens, NaN in all other memory."""

import math

import torch
from paging import paginate

# (ranks, interleave): contiguous stretches, dealt out in turn by one, by less than a tile and by
# more, and so that most ranks have nothing.
DEALINGS = [(2, None), (4, None), (2, 1), (3, 7), (4, 16), (2, 160), (4, 1000)]


def token_owner(tokens, ranks, interleave):
    return tokens // interleave % ranks


def capacity_of(max_length, ranks, interleave):
    """(capacity of a rank, interleave) with room for `max_length` tokens on all."""
    if interleave is None:
        capacity = -(-max_length // ranks)
        return capacity, max(capacity, 1)
    rounds = -(-max_length // (ranks * interleave))
    return rounds * interleave, interleave


def part_of(cache, ranks, rank, interleave):
    """[B, capacity, ...]: a rank's tokens of a cache [B, S, ...], in order."""
    capacity, interleave = capacity_of(cache.shape[1], ranks, interleave)
    token = torch.arange(cache.shape[1], device=cache.device)
    own = token[token_owner(token, ranks, interleave) == rank]
    part = torch.full(
        (cache.shape[0], capacity, *cache.shape[2:]), math.nan, dtype=cache.dtype,
        device=cache.device,
    )  # fmt: skip
    numbers = torch.uint8 if cache.element_size() == 1 else cache.dtype  # what can be indexed
    part.view(numbers)[:, : len(own)] = cache.view(numbers)[:, own]
    return part


def deal(case, ranks, rank, interleave, page_size=None):
    """The arguments of `decode` for one rank, but for cp_*; paged by page_size."""
    values_in_keys = case["v_cache"].data_ptr() == case["k_cache"].data_ptr()
    call = dict(case)
    for name in ("k_cache", "v_cache"):
        call[name] = part_of(case[name], ranks, rank, interleave)
    if values_in_keys:
        call["v_cache"] = call["k_cache"][..., : case["v_cache"].shape[-1]]
    if page_size is None:
        return call
    lengths = call.pop("cache_seqlens")  # of all ranks: a rank's own pages are all its capacity
    paged = paginate(call, page_size, layout="values-in-keys" if values_in_keys else "plain",
                     spare_entries=0)  # fmt: skip
    return {**paged, "cache_seqlens": lengths}


def context_parallel(case, ranks, rank, interleave):
    """The arguments cp_* for a rank's part of a case."""
    _, interleave = capacity_of(case["k_cache"].shape[1], ranks, interleave)
    return dict(cp_world_size=ranks, cp_rank=rank, cp_interleave=interleave)


def gather_state(case, ranks, interleave, page_size=None, decode=None):
    """(outs, lses), a state a rank, in one process. Sinks go to the first."""
    states = []
    for rank in range(ranks):
        call = deal(case, ranks, rank, interleave, page_size)
        if rank > 0:
            call.pop("sinks", None)
        call |= context_parallel(case, ranks, rank, interleave)
        states.append((decode or torch.ops.leanattn.decode_with_lse)(**call))
    return tuple(torch.stack(parts) for parts in zip(*states))
