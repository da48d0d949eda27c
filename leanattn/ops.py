"""The ops of torch.ops.leanattn: wrappers, fakes for tracing, and the missing backward.

Schemas and implementations are in C++ (csrc/ops.cpp); importing leanattn._C registers them.
"""

import re

import torch

import leanattn._C  # noqa: F401  registers torch.ops.leanattn

_ops = torch.ops.leanattn

__version__ = _ops.build_info().split(";")[0]


def decode(
    q,
    k_cache,
    v_cache,
    cache_seqlens=None,
    block_table=None,
    *,
    cu_seqlens_q=None,
    max_seqlen_q=None,
    softmax_scale=None,
    causal=True,
    window_left=-1,
    window_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    k_scale=None,
    v_scale=None,
    batch_invariant=False,
    counters=None,
    cp_world_size=1,
    cp_rank=0,
    cp_interleave=1,
    return_lse=False,
    out=None,
):
    """Exact attention of a few new queries on a KV cache: LeanAttention (arXiv 2405.10480).

    One kernel launch, no plan and no host synchronisation: lengths stay on the device. Inference
    only. With L a sequence's length, its query i of n stands at p = L - n + i and sees key j where
    0 <= j < L, j <= p if causal, j >= p - window_left and j <= p + window_right where those are not
    -1. docs/semantics.md states the rest.

    Args:
        q: `[B, Sq, Hq, D]`, or `[B, Hq, D]` for one query a sequence; `[total_q, Hq, D]` with
            cu_seqlens_q. float16 or bfloat16; on the CPU float32 too. D up to 576, on CUDA even.
        k_cache: `[B, S, Hkv, D]`, or with block_table `[num_pages, page_size, Hkv, D]`; q's dtype,
            or float8_e4m3fn or float8_e5m2 (on CUDA D a multiple of 4 then) under float16 and
            bfloat16. Hq is a multiple of Hkv. Any strides (on CUDA: the last dimension contiguous,
            pointers and strides multiples of 4 bytes, q's and out's of 16 where head dims are
            multiples of 8), any page_size >= 1.
        v_cache: `[B, S, Hkv, Dv]` or `[num_pages, page_size, Hkv, Dv]`, likewise; Dv may differ
            from D, up to 512, its dtype not from k_cache's. With head dims beyond 256, of
            multi-head latent attention, a view of k_cache's first Dv columns is read once.
        cache_seqlens: `[B]` int32, valid tokens of each sequence, the queries' own included;
            None: all S, or all max_pages * page_size. Clamped to that on the device.
        block_table: `[B, max_pages]` int32, any strides: the page of each page_size tokens of a
            sequence. Entries of tokens that no query sees are not used; the others are clamped to
            [0, num_pages) on the device.
        cu_seqlens_q: `[B + 1]` int32, where each sequence's queries begin in a ragged q.
        max_seqlen_q: with cu_seqlens_q only, a hint that results never depend on.
        softmax_scale: default D ** -0.5.
        causal: a query does not see what comes after it.
        window_left, window_right: keys seen before and after the query's own position, -1 for all.
        softcap: 0 for none, else scores become softcap * tanh(score / softcap).
        alibi_slopes: fp32 `[Hq]` or `[B, Hq]`; scores become score - slope * abs(p - j).
        sinks: fp32 `[Hq]`, one more logit a head in the denominator.
        k_scale, v_scale: fp32 of one element, `[Hkv]` or `[B, Hkv]`, with float8 caches only: what
            their numbers are to be multiplied by.
        batch_invariant: on one GPU architecture, a sequence's result has the same bits for any
            batch around it, any place in it, any page size and number of units: its tiles are
            merged in a tree that depends on its own tokens alone. docs/semantics.md, section 13,
            states the workspace that it takes.
        counters: from `leanattn.counters`, one tensor a stream; without, a call is as fast.
        cp_world_size, cp_rank, cp_interleave: the caches hold one rank's part of tokens that are
            dealt out to cp_world_size ranks in turn, cp_interleave at a time; cache_seqlens are
            those of the whole sequences, and p and j count all tokens. `leanattn.distributed` is
            made of this.
        return_lse: also return the log-sum-exp.
        out: where to write the result, instead of a new tensor; q's dtype, or float32.

    Returns:
        out, like q with head dim Dv; or (out, lse), lse fp32 of shape out.shape[:-1], natural log.
        A row that sees no key is 0, its lse -inf (its sink, with sinks).

    Raises:
        RuntimeError: naming the argument, what was given and what is allowed, before any launch.
    """
    arguments = (q, k_cache, v_cache, cache_seqlens, block_table)
    options = dict(
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        softmax_scale=softmax_scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        batch_invariant=batch_invariant,
        counters=counters,
        cp_world_size=cp_world_size,
        cp_rank=cp_rank,
        cp_interleave=cp_interleave,
    )
    if out is None:
        op = _ops.decode_with_lse if return_lse else _ops.decode
        return _call(op, *arguments, **options)
    if not return_lse:
        _call(_ops.decode_out, *arguments, **options, out=out)
        return out
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    _call(_ops.decode_with_lse_out, *arguments, **options, out=out, lse=lse)
    return out, lse


def append_kv(
    k,
    v,
    k_cache,
    v_cache,
    cache_seqlens,
    block_table=None,
    *,
    cu_seqlens=None,
    k_scale=None,
    v_scale=None,
    cp_world_size=1,
    cp_rank=0,
    cp_interleave=1,
):
    """Write new keys and values into the caches, in place, one kernel launch.

    Token i of sequence b goes to position `cache_seqlens[b] + i`. `cache_seqlens` are the lengths
    before the append and stay as they are; add the new tokens for `decode`. Tokens beyond the
    capacity, or in a page that there is not, are not written. docs/append.md states the rest.

    Args:
        k: `[B, Sn, Hkv, D]`, or `[B, Hkv, D]` for one token a sequence; `[total, Hkv, D]` with
            cu_seqlens. float16 or bfloat16; on the CPU float32 too. Any strides.
        v: likewise with head dim Dv, k's dtype.
        k_cache: `[B, S, Hkv, D]`, or with block_table `[num_pages, page_size, Hkv, D]`. float16,
            bfloat16, float8_e4m3fn or float8_e5m2, on the CPU float32 too; values are cast to it.
            Any strides, as long as no two elements share memory.
        v_cache: likewise with head dim Dv, k_cache's dtype.
        cache_seqlens: `[B]` int32, clamped to [0, capacity] on the device.
        block_table: `[B, max_pages]` int32, the page of each page_size tokens.
        cu_seqlens: `[B + 1]` int32, where each sequence's new tokens begin in k and v; entries are
            clamped to [previous entry, total]. Tokens that no sequence has are not written.
        k_scale, v_scale: fp32 of one element, `[Hkv]` or `[B, Hkv]`, with float8 caches only:
            stored is value / scale, saturated to the finite range.
        cp_world_size, cp_rank, cp_interleave: as in `decode`; tokens of other ranks are not
            written.

    Raises:
        RuntimeError: naming the argument, what was given and what is allowed, before any launch.
    """
    _call(
        _ops.append_kv,
        k,
        v,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        cu_seqlens=cu_seqlens,
        k_scale=k_scale,
        v_scale=v_scale,
        cp_world_size=cp_world_size,
        cp_rank=cp_rank,
        cp_interleave=cp_interleave,
    )


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
    interleaved=False,
    cu_seqlens=None,
    k_scale=None,
    v_scale=None,
    cp_world_size=1,
    cp_rank=0,
    cp_interleave=1,
):
    """`append_kv` with rotary embedding (arXiv 2104.09864) of k on the way and of q in place.

    One kernel launch. Token i of sequence b is rotated by row `cache_seqlens[b] + i` of cos and
    sin, the length clamped as in `append_kv`, the row to [0, max_position). Computed in fp32 and
    rounded once. k itself stays as it is.

    Args:
        q: `[B, Sn, Hq, D]`, `[B, Hq, D]` or `[total, Hq, D]`, k's tokens, head dim and dtype; its
            first rotary_dim dims are rotated in place. Any strides.
        k, v, k_cache, v_cache, cache_seqlens, cu_seqlens, k_scale, v_scale, cp_world_size, cp_rank,
            cp_interleave: as in `append_kv`.
        block_table: as in `append_kv`, or None.
        cos, sin: `[max_position, rotary_dim / 2]`, float32 or q's dtype, any strides.
        interleaved: pair i is dims 2i and 2i + 1 (GPT-J) instead of i and rotary_dim / 2 + i
            (NeoX). The dims from rotary_dim on are not rotated.

    Raises:
        RuntimeError: naming the argument, what was given and what is allowed, before any launch.
    """
    _call(
        _ops.rope_append_kv,
        q,
        k,
        v,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        cos,
        sin,
        interleaved=interleaved,
        cu_seqlens=cu_seqlens,
        k_scale=k_scale,
        v_scale=v_scale,
        cp_world_size=cp_world_size,
        cp_rank=cp_rank,
        cp_interleave=cp_interleave,
    )


def append_decode(
    q,
    k,
    v,
    k_cache,
    v_cache,
    cache_seqlens,
    block_table=None,
    *,
    cos=None,
    sin=None,
    interleaved=False,
    cu_seqlens=None,
    max_seqlen_q=None,
    softmax_scale=None,
    causal=True,
    window_left=-1,
    window_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    k_scale=None,
    v_scale=None,
    batch_invariant=False,
    counters=None,
    return_lse=False,
    out=None,
):
    """`rope_append_kv` (or `append_kv`, without cos and sin) and `decode` in one: a layer's step.

    The queries are the new tokens' own, and see what the caches hold with them appended. The caches
    are left as the append leaves them, out is what `decode` gives then; q itself stays as it is.
    docs/append.md states the rest.

    Args:
        q: `[B, Sn, Hq, D]`, `[B, Hq, D]` or `[total, Hq, D]`: k's tokens, head dim and dtype.
        k, v: as in `append_kv`. Where v_cache is a view of k_cache's first columns, v must be one
            of k's; with cos that is not supported.
        k_cache, v_cache, block_table: as in `decode`, written to as in `append_kv`.
        cache_seqlens: `[B]` int32, the lengths **before** the append, clamped to [0, capacity] on
            the device. What is attended to has the new tokens too, up to the capacity.
        cos, sin, interleaved: as in `rope_append_kv`; without cos and sin nothing is rotated.
        cu_seqlens: `[B + 1]` int32, where each sequence's new tokens begin in q, k and v.
        max_seqlen_q, ..., counters: as in `decode`; k_scale and v_scale for writing too.
        return_lse: also return the log-sum-exp; not with out.
        out: where to write the result, instead of a new tensor.

    Returns:
        out, like q with head dim Dv; or (out, lse), as `decode` does.

    Raises:
        RuntimeError: naming the argument, what was given and what is allowed, before any launch.
        ValueError: return_lse and out together.
    """
    arguments = (q, k, v, k_cache, v_cache, cache_seqlens, block_table)
    options = dict(
        cos=cos,
        sin=sin,
        interleaved=interleaved,
        cu_seqlens=cu_seqlens,
        max_seqlen_q=max_seqlen_q,
        softmax_scale=softmax_scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        batch_invariant=batch_invariant,
        counters=counters,
    )
    if out is None:
        op = _ops.append_decode_with_lse if return_lse else _ops.append_decode
        return _call(op, *arguments, **options)
    if return_lse:
        raise ValueError(
            "leanattn.append_decode: return_lse does not go with out, got True and a tensor"
        )
    _call(_ops.append_decode_out, *arguments, **options, out=out)
    return out


def merge_states(outs, lses, *, dtype=None):
    """Merge attention results over disjoint sets of keys into the result over all of them.

    `out = sum(exp(lse_i) * out_i) / sum(exp(lse_i))` and `lse = log(sum(exp(lse_i)))`, in fp32 and
    in the order of the states: LeanAttention's softmax re-scaling (arXiv 2405.10480, section IV-A).
    With sinks, give them to one of the partial calls only. docs/append.md has an example.

    Args:
        outs: `[n, ..., D]`, float16, bfloat16 or float32, the normalised partial outputs. Any
            strides; a copy is made only where the last dimension is not contiguous or more than
            four of those between cannot be joined.
        lses: `[n, ...]` float32, natural logarithm, any strides. -inf and +inf (FlashAttention's)
            mean that the state saw no key: it has no weight, whatever its out holds.
        dtype: of the merged out; None: outs'. Of float32 outs also float16 or bfloat16.

    Returns:
        (out `[..., D]` in that dtype, lse `[...]` float32), contiguous. Where no state saw a key,
        or n is 0: out 0, lse -inf.

    Raises:
        RuntimeError: naming the argument, what was given and what is allowed, before any launch.
    """
    return _call(_ops.merge_states, outs, lses, dtype=dtype)


def counters(device, n=None):
    """Int32 zeros for the `counters` argument of `decode`; every call leaves them zero.

    One tensor serves one stream at a time. A call that is given none has others of the library's
    own, and is as fast.

    Args:
        device: where the calls will run.
        n: how many; a call needs as many as it has units, or items if those are fewer. Default:
            enough for any call on this device.
    """
    device = torch.device(device)
    if n is None:
        n = 1024 if device.type == "cpu" else _ops.max_units(_cuda_index("counters", device))
    return torch.zeros(n, dtype=torch.int32, device=device)


def check_decode(q, k_cache, v_cache, cache_seqlens=None, block_table=None, **options):
    """Raises what `decode` would raise for these arguments."""
    if not torch.compiler.is_compiling():  # decode itself will check then, when it runs
        _call(_ops.decode_check, q, k_cache, v_cache, cache_seqlens, block_table, **options)


def is_supported(
    q, k_cache, v_cache, cache_seqlens=None, block_table=None, *, return_lse=False, **options
):
    """Whether `decode` takes these arguments: (True, "") or (False, the reason).

    return_lse changes nothing: what can be computed has a log-sum-exp.

    Of fake and meta tensors, as under torch.compile, only that they share a device is checked.
    """
    try:
        _call(_ops.decode_check, q, k_cache, v_cache, cache_seqlens, block_table, **options)
    except (RuntimeError, ValueError) as error:
        return False, str(error)
    return True, ""


def warmup(device="cuda"):
    """Loads every kernel on a CUDA device and has memory for counters ready, so that no first call
    has to, nor a graph capture.

    On the CPU there is nothing to do.
    """
    device = torch.device(device)
    if device.type != "cpu":
        _ops.warmup(_cuda_index("warmup", device))


def _cuda_index(function, device):
    if device.type != "cuda" or not torch.cuda.is_available():
        seen = "" if torch.cuda.is_available() else ", but torch sees no CUDA device"
        raise RuntimeError(f"leanattn.{function}: device must be cpu or cuda, got {device}{seen}")
    return torch.cuda.current_device() if device.index is None else device.index


def _call(op, *args, **options):
    """op(*args, **options), with an error of one line where an argument is of a wrong type."""
    if torch.compiler.is_compiling():
        return op(*args, **options)
    try:
        return op(*args, **options)
    except RuntimeError as error:
        match = re.search(r"for argument '(\w+)' but instead found", str(error))
        if match is None:
            raise
        schema = op.default._schema
        given = named_arguments(op.default, args, options)[match[1]]
        wanted = next(str(a.type) for a in schema.arguments if a.name == match[1])
        kind = wanted.removeprefix("Optional[").rstrip("]")
        words = {"Tensor": "a tensor", "int": "an int", "float": "a float", "bool": "a bool"}[kind]
        none = " or None" if wanted != kind else ""
        message = f"{schema.name}: {match[1]} must be {words}{none}, got {given!r}"
    raise RuntimeError(f"{message}, of type {type(given).__name__}")


def _check_devices(op, other, tensors, other_name="q"):
    # The C++ checks do not run on fake and meta tensors.
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.device != other.device:
            raise RuntimeError(
                f"leanattn::{op}: {name} must be on {other_name}'s device, {other.device}, "
                f"got {tensor.device}"
            )


def named_arguments(op, args, kwargs):
    """{name: value} of those that were given, in order."""
    return dict(zip((a.name for a in op._schema.arguments), args)) | kwargs


def _named(op, args, kwargs):
    return named_arguments(getattr(_ops, op).default, args, kwargs)


def _fake_out(op, args, kwargs):
    q, _, v_cache = args[:3]
    _check_devices(op, q, _named(op, args, kwargs))
    return q.new_empty((*q.shape[:-1], v_cache.shape[-1]))


def _fake_lse(q):
    return q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("leanattn::decode")
def _(*args, **kwargs):
    return _fake_out("decode", args, kwargs)


@torch.library.register_fake("leanattn::decode_with_lse")
def _(*args, **kwargs):
    return _fake_out("decode_with_lse", args, kwargs), _fake_lse(args[0])


@torch.library.register_fake("leanattn::decode_out")
def _(*args, **kwargs):
    _fake_out("decode_out", args, kwargs)


@torch.library.register_fake("leanattn::decode_with_lse_out")
def _(*args, **kwargs):
    _fake_out("decode_with_lse_out", args, kwargs)


@torch.library.register_fake("leanattn::decode_check")
def _(*args, **kwargs):
    _check_devices("decode", args[0], _named("decode_check", args, kwargs))


@torch.library.register_fake("leanattn::append_kv")
def _(*args, **kwargs):
    tensors = _named("append_kv", args, kwargs)
    _check_devices("append_kv", tensors["k"], tensors, "k")


@torch.library.register_fake("leanattn::rope_append_kv")
def _(*args, **kwargs):
    tensors = _named("rope_append_kv", args, kwargs)
    _check_devices("rope_append_kv", tensors["k"], tensors, "k")


def _fake_append_decode(op, args, kwargs):
    q, k, v_cache = args[0], args[1], args[4]
    _check_devices(op, k, _named(op, args, kwargs), "k")
    return q.new_empty((*q.shape[:-1], v_cache.shape[-1]))


@torch.library.register_fake("leanattn::append_decode")
def _(*args, **kwargs):
    return _fake_append_decode("append_decode", args, kwargs)


@torch.library.register_fake("leanattn::append_decode_with_lse")
def _(*args, **kwargs):
    out = _fake_append_decode("append_decode_with_lse", args, kwargs)
    return out, _fake_lse(args[0])


@torch.library.register_fake("leanattn::append_decode_out")
def _(*args, **kwargs):
    _fake_append_decode("append_decode_out", args, kwargs)


@torch.library.register_fake("leanattn::merge_states")
def _(outs, lses, *, dtype=None):
    _check_devices("merge_states", outs, {"lses": lses}, "outs")
    return outs.new_empty(outs.shape[1:], dtype=dtype), outs.new_empty(
        outs.shape[1:-1], dtype=torch.float32
    )
