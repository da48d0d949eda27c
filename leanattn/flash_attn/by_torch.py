"""FlashAttention's semantics by what torch has: scaled_dot_product_attention, its
torch.nn.attention.varlen, and plain operations where neither can."""

import inspect
import math
from dataclasses import replace
from functools import cache

import torch
from torch.nn.functional import dropout, pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

SDPA = "scaled_dot_product_attention"
SDPA_WITH_MASK = "scaled_dot_product_attention with a mask of queries x keys"
VARLEN = "torch.nn.attention.varlen"
PLAIN = "plain operations, with scores of queries x keys in memory"
BY_SEQUENCE = "one sequence after the other, whose offsets the host waits for"

_MAX_VARLEN_HEAD_DIM = 256


@cache
def _varlen_attn():
    """torch's, where it has all the arguments that are needed here, or None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    wanted = {"scale", "window_size", "enable_gqa", "return_aux"}
    return varlen_attn if wanted <= set(inspect.signature(varlen_attn).parameters) else None


def varlen_lacks(q, v, options):
    """Why torch.nn.attention.varlen cannot take a call, or None."""
    if not q.is_cuda:
        return "torch.nn.attention.varlen is for CUDA alone"
    if _varlen_attn() is None:
        return "this torch has no torch.nn.attention.varlen with windows and grouped heads"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > _MAX_VARLEN_HEAD_DIM:
        return "torch.nn.attention.varlen wants one head dim up to 256"
    for name, given in (
        ("softcap", options.softcap),
        ("alibi_slopes", options.alibi_slopes is not None),
        ("dropout_p", options.dropout_p),
    ):
        if given:
            return f"torch.nn.attention.varlen has no {name}"
    return None


def way_of_dense(q, v, options):
    """Which of torch's ways takes `[B, S, H, D]` tensors."""
    if options.softcap:
        return PLAIN
    if options.has_window or options.alibi_slopes is not None or options.wants_lse:
        if varlen_lacks(q, v, options) is None:
            return VARLEN
        return PLAIN if options.wants_lse else SDPA_WITH_MASK
    return SDPA


def attend_dense(q, k, v, options, way):
    """(out `[B, Sq, Hq, Dv]`, lse fp32 `[B, Hq, Sq]` or None)."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    # The first queries may stand before the first key. What torch gives there differs.
    blind = queries if keys == 0 else 0
    if options.window_right >= 0:
        blind = min(queries, max(blind, queries - keys - options.window_right))
    if blind == queries or 0 in (batch, v.shape[-1]):
        out = q.new_zeros(batch, queries, heads, v.shape[-1])
        lse = q.new_full((batch, heads, queries), -math.inf, dtype=torch.float32)
        return out, lse if options.wants_lse else None
    out, lse = _WAYS[way](q[:, blind:], k, v, options)
    if blind:
        out = pad(out, (0, 0, 0, 0, blind, 0))
        lse = lse if lse is None else pad(lse, (blind, 0), value=-math.inf)
    return out, lse


def _by_sdpa(q, k, v, options):
    is_square = q.shape[1] == k.shape[1]
    mask = None
    if options.is_causal and not is_square:
        from torch.nn.attention.bias import causal_lower_right  # half of torch comes with it

        mask = causal_lower_right(q.shape[1], k.shape[1])
    out = sdpa(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, options.dropout_p,
        is_causal=options.is_causal and is_square, scale=options.softmax_scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2), None


def _by_sdpa_with_mask(q, k, v, options):
    distances = _distances(q, k)
    mask = _visible(distances, options)
    if options.alibi_slopes is not None:
        bias = -_slopes(options) * distances.abs()  # [1 or B, Hq, Sq, Sk]
        mask = bias.masked_fill(~mask, -math.inf).to(q.dtype)
    out = sdpa(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, options.dropout_p,
        scale=options.softmax_scale, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2), None


def _by_plain_operations(q, k, v, options):
    """In fp32."""
    group_size = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    k, v = (x.repeat_interleave(group_size, 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    scores = q.float() @ k.float().transpose(2, 3) * scale
    if options.softcap:
        scores = options.softcap * (scores / options.softcap).tanh()
    distances = _distances(q.transpose(1, 2), k.transpose(1, 2))
    if options.alibi_slopes is not None:
        scores = scores - _slopes(options) * distances.abs()
    scores = scores.masked_fill(~_visible(distances, options), -math.inf)
    weights = dropout(scores.softmax(-1), options.dropout_p, training=options.dropout_p > 0)
    lse = scores.detach().logsumexp(-1) if options.wants_lse else None
    return (weights @ v.float()).to(q.dtype).transpose(1, 2), lse


def _by_varlen(q, k, v, options):
    batch = q.shape[0]
    out, lse = attend_varlen(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), _even_offsets(q), _even_offsets(k),
        q.shape[1], k.shape[1], options,
    )  # fmt: skip
    if lse is not None:
        lse = lse.unflatten(1, (batch, -1)).transpose(0, 1)  # [Hq, B * Sq]
    return out.unflatten(0, (batch, -1)), lse


_WAYS = {
    SDPA: _by_sdpa,
    SDPA_WITH_MASK: _by_sdpa_with_mask,
    PLAIN: _by_plain_operations,
    VARLEN: _by_varlen,
}


def _even_offsets(x):
    """`[B + 1]` int32: where each sequence of `[B, S, ...]` begins when they lie in a row."""
    batch, tokens = x.shape[:2]
    return torch.arange(batch + 1, dtype=torch.int32, device=x.device) * tokens


def attend_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, options):
    """By torch.nn.attention.varlen: (out `[total_q, Hq, D]`, lse fp32 `[Hq, total_q]` or None)."""
    from torch.nn.attention.varlen import AuxRequest

    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if options.softmax_scale is None else options.softmax_scale
    if head_dim % 8:
        q, k, v = (pad(x, (0, -head_dim % 8)) for x in (q, k, v))
    out, lse = _varlen_attn()(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, return_aux=AuxRequest(lse=True),
        scale=scale, window_size=(options.window_left, options.window_right),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    if not options.wants_lse:
        lse = None
    else:  # +inf is its log-sum-exp of no keys
        lse = lse.detach().masked_fill(lse == math.inf, -math.inf)
    return out[..., :head_dim], lse


def attend_by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, options):
    """By `attend_dense`, (out `[total_q, Hq, Dv]`, lse `[Hq, total_q]` or None)."""
    outs, lses = [], []
    ends_q, ends_k = (
        _checked_offsets(options.function, name, offsets, len(tensor))
        for name, offsets, tensor in (
            ("cu_seqlens_q", cu_seqlens_q, q), ("cu_seqlens_k", cu_seqlens_k, k)
        )
    )  # fmt: skip
    slopes = options.alibi_slopes
    is_shared = slopes is None or slopes.dim() == 1
    for b in range(len(ends_q) - 1):
        rows, tokens = slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])
        own = options if is_shared else replace(options, alibi_slopes=slopes[b])
        one = q[None, rows], k[None, tokens], v[None, tokens]
        out, lse = attend_dense(*one, own, way_of_dense(one[0], v, own))
        outs.append(out[0])
        lses.append(lse)
    before, behind = ends_q[0], len(q) - ends_q[-1]  # rows that are no sequence's
    out = pad(torch.cat(outs), (0, 0, 0, 0, before, behind))
    if not options.wants_lse:
        return out, None
    return out, pad(torch.cat([lse[0] for lse in lses], 1), (before, behind), value=-math.inf)


def _checked_offsets(function, name, offsets, total):
    offsets = offsets.tolist()
    if any(a > b for a, b in zip([0, *offsets], [*offsets, total])):
        raise ValueError(
            f"{function}: {name} must not decrease, from 0 to {total} at most, got {offsets}"
        )
    return offsets


def _distances(q, k):
    """`[Sq, Sk]`: position of query i less that of key j, the last ones at one position."""
    positions = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)
    return positions[:, None] - torch.arange(k.shape[1], device=q.device)


def _visible(distances, options):
    visible = torch.ones_like(distances, dtype=torch.bool)
    if options.window_left >= 0:
        visible &= distances <= options.window_left
    if options.window_right >= 0:
        visible &= distances >= -options.window_right
    return visible


def _slopes(options):
    """`[1 or B, Hq, 1, 1]`"""
    slopes = options.alibi_slopes
    return (slopes if slopes.dim() == 2 else slopes[None])[:, :, None, None]
