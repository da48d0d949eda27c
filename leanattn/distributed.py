"""One sequence over several GPUs: its tokens are spread over the ranks of a group, each rank
decodes its part, and the softmax-rescaling merge puts the parts together.

That is LeanAttention's reduction (arXiv 2405.10480, section IV-A) one level up, on
torch.distributed: NCCL on GPUs, gloo on CPUs. docs/distributed.md has an example, and what it
costs.
"""

import math

import torch
import torch.distributed as dist

from leanattn.ops import append_kv as _append_kv
from leanattn.ops import merge_states
from leanattn.ops import rope_append_kv as _rope_append_kv

__all__ = ["append_kv", "decode", "placement", "rope_append_kv"]

# Of the float32 numbers of a rank's state: 16 bytes, so that every state begins where the merge may
# read whole vectors.
_ALIGNMENT = 4

# Its name from torch 2.13 on, where the other one warns.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def decode(
    q,
    k_cache,
    v_cache,
    cache_seqlens=None,
    block_table=None,
    *,
    group,
    interleave=None,
    sinks=None,
    return_lse=False,
    **options,
):
    """`leanattn.decode` of sequences whose tokens are spread over the ranks of a group.

    Every rank of the group makes the call, with the same q, lengths and options and with caches of
    the same capacity, and gets the whole result, the same bits on all ranks. One all-gather of each
    rank's out and lse, in one buffer of float32, and one merge in the order of the ranks.

    Args:
        q, sinks, options: as in `leanattn.decode`; `out` alone cannot be given.
        k_cache, v_cache, block_table: as there, of this rank's tokens.
        cache_seqlens: `[B]` int32, tokens of each sequence on all ranks together, the queries' own
            included; None: as many as the ranks can hold.
        group: a process group of torch.distributed; None: the default group.
        interleave: None: rank r has the r-th stretch of a sequence, each as long as a rank's
            capacity. A number I: tokens are dealt out in turn, I at a time.
        return_lse: also return the log-sum-exp.

    Returns:
        out, in q's dtype, or (out, lse), as `leanattn.decode`.

    Raises:
        RuntimeError: as `leanattn.decode`, before anything is exchanged; and where the exchange
            fails, as when a rank is gone, after the group's time-out at the latest. With NCCL it is
            the group's watchdog that acts then.
    """
    place = placement(k_cache, block_table, group=group, interleave=interleave)
    rows, head_dim_v = q.shape[:-1], v_cache.shape[-1]
    state = State(rows, head_dim_v)
    own = q.new_empty(state.size, dtype=torch.float32)
    out, lse = state.parts(own)
    torch.ops.leanattn.decode_with_lse_out(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        sinks=sinks if place["cp_rank"] == 0 else None,  # one more logit once, not once a rank
        **options,
        **place,
        out=out,
        lse=lse,
    )
    everyones = all_gather(own, place["cp_world_size"], group)
    out, lse = merge_states(*state.parts(everyones), dtype=q.dtype)
    return (out, lse) if return_lse else out


def append_kv(
    k, v, k_cache, v_cache, cache_seqlens, block_table=None, *, group, interleave=None, **options
):
    """`leanattn.append_kv` to caches that are spread over the ranks of a group.

    Every rank makes the call with all new tokens, and writes those that are its own. Nothing is
    exchanged.

    Args:
        k, v, options: as in `leanattn.append_kv`, the same on all ranks.
        k_cache, v_cache, block_table: as there, of this rank's tokens.
        cache_seqlens: `[B]` int32, tokens of each sequence on all ranks together, before the
            append.
        group, interleave: as in `decode`.
    """
    place = placement(k_cache, block_table, group=group, interleave=interleave)
    _append_kv(k, v, k_cache, v_cache, cache_seqlens, block_table, **options, **place)


def rope_append_kv(
    q,
    k,
    v,
    k_cache,
    v_cache,
    cache_seqlens,
    block_table,
    cos,
    sin,
    *,
    group,
    interleave=None,
    **options,
):
    """`leanattn.rope_append_kv` likewise: q is rotated on every rank, k where it is written."""
    place = placement(k_cache, block_table, group=group, interleave=interleave)
    _rope_append_kv(
        q, k, v, k_cache, v_cache, cache_seqlens, block_table, cos, sin, **options, **place
    )


def placement(k_cache, block_table=None, *, group, interleave=None):
    """The arguments cp_world_size, cp_rank and cp_interleave of the ops for this rank, a dict."""
    rank = dist.get_rank(group)
    if rank < 0:
        raise RuntimeError(
            f"leanattn.distributed: group must be one that this process belongs to, got {group}"
        )
    if interleave is None:
        pages = 1 if block_table is None else block_table.shape[1]
        interleave = max(k_cache.shape[1] * pages, 1)
    return dict(cp_world_size=dist.get_world_size(group), cp_rank=rank, cp_interleave=interleave)


class State:
    """How out and lse of one rank lie in its buffer of float32: out, lse, and what fills up."""

    def __init__(self, rows, head_dim_v):
        self.rows, self.head_dim_v = rows, head_dim_v
        self.count = math.prod(rows)
        self.size = -(-self.count * (head_dim_v + 1) // _ALIGNMENT) * _ALIGNMENT

    def parts(self, buffer):
        """(out `[..., rows, Dv]`, lse `[..., rows]`) as views of a buffer `[..., size]`."""
        out, lse, _ = buffer.split(
            [self.count * self.head_dim_v, self.count,
             self.size - self.count * (self.head_dim_v + 1)], dim=-1,
        )  # fmt: skip
        return out.unflatten(-1, (*self.rows, self.head_dim_v)), lse.unflatten(-1, self.rows)


def all_gather(own, ranks, group):
    """`[ranks, size]` of each rank's `own`, `[size]`."""
    everyones = own.new_empty(ranks * own.shape[0])
    try:
        _all_gather_single(everyones, own, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"leanattn.distributed.decode: the exchange with the group's {ranks} ranks failed; is "
            f"each of them there, and makes the same call? {error}"
        ) from error
    return everyones.unflatten(0, (ranks, -1))
