"""flash_attn_with_kvcache: FlashAttention's function for decoding, on leanattn's ops."""

import numbers
import os

import torch

from leanattn.flash_attn import arguments
from leanattn.flash_attn.arguments import check_tensors, checked_window, refuse_unknown
from leanattn.integrations.token_pages import as_token_pages
from leanattn.ops import append_decode, append_kv, check_decode, decode, rope_append_kv


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
    *,
    page_table=None,
    s_aux=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    k_descale=None,
    v_descale=None,
    qv=None,
    q_descale=None,
    rotary_seqlens=None,
    attention_chunk=0,
    scheduler_metadata=None,
    pack_gqa=None,
    sm_margin=0,
):
    """Append new keys and values to the caches, then attend to them: FlashAttention's interface.

    Signature, order and meaning of the arguments are those of flash_attn 2.x; FlashAttention-3's
    are by name. One op, append_decode, where q has k's tokens, without cache_leftpad, and rotated
    at positions of their own; else two (append, decode), an addition of lengths between them, and a
    copy of q where it is rotated. No host synchronisation. What differs: a row that sees no key has
    lse -inf; caches may have any page size and new tokens that do not fit are dropped.

    Args:
        q: `[B, Sq, Hq, D]`, or `[total_q, Hq, D]` with cu_seqlens_q. Left as it is.
        k_cache, v_cache: `[B_cache, S, Hkv, D]`, or with block_table
            `[num_pages, page_size, Hkv, D]`; of q's dtype or float8. Updated in place if k and v
            are given, and never copied: on CUDA rows may begin at any multiple of 4 bytes.
        k, v: `[B, Sn, Hkv, D]`, or `[total_new, Hkv, D]` with cu_seqlens_k_new: new tokens, of q's
            dtype, that go to cache_seqlens and on. None: q's own tokens are in the caches already,
            and in cache_seqlens.
        rotary_cos, rotary_sin: `[max_position, rotary_dim / 2]`, with k and v only. k is rotated at
            cache_seqlens + i, and so is q if causal or with a window; else all of q at
            cache_seqlens. With cu_seqlens_q only where that is cu_seqlens_k_new, too.
        cache_seqlens: int or `[B]` int32, tokens in the caches before the append. None, without k
            and v only: all of them.
        cache_batch_idx: `[B]` int32, the row of the caches for each sequence; not with block_table.
        cache_leftpad: `[B]` int32, where in its row each sequence begins, clamped to the cache; not
            with block_table. Rotary positions and cache_seqlens count from the row's start. Tokens
            are read one at a time then, which is slower.
        block_table: `[B, max_pages]` int32; page_table is FlashAttention-3's name for it.
        softmax_scale: default D ** -0.5.
        causal: aligned to the bottom right corner.
        window_size: (left, right), -1 for no limit.
        softcap: 0 for none.
        rotary_interleaved: pairs 2i and 2i + 1 (GPT-J), else i and rotary_dim / 2 + i (NeoX).
        alibi_slopes: fp32 `[Hq]` or `[B, Hq]`.
        return_softmax_lse: also return the log-sum-exp.
        s_aux: `[Hq]`, attention sinks.
        cu_seqlens_q, cu_seqlens_k_new: `[B + 1]` int32, where each sequence begins in a ragged q,
            and in ragged k and v.
        k_descale, v_descale: fp32 `[B, Hkv]`, `[Hkv]` or one element, with float8 caches only: what
            their numbers are to be multiplied by; new tokens are divided by it.
        num_splits, max_seqlen_q, scheduler_metadata, pack_gqa, sm_margin: hints that results never
            depend on.
        qv, q_descale, rotary_seqlens, attention_chunk: of FlashAttention-3, not supported.

    Returns:
        out like q, with v_cache's head dim; or (out, lse), lse fp32 `[B, Hq, Sq]`, or
        `[Hq, total_q]` with cu_seqlens_q.

    Raises:
        ValueError: arguments that do not go together; with LEANATTN_CHECK=1 rows of the caches that
            would be clamped.
        NotImplementedError: what is not supported, by its name; cache_leftpad where k_cache's and
            v_cache's strides of sequences and tokens are not alike.
        RuntimeError: from the ops, naming the argument, what was given and what is allowed.
    """
    if page_table is not None:
        if block_table is not None:
            _refuse("page_table", "is another name of block_table: give one")
        block_table = page_table
    refuse_unknown(
        _NAME, qv=qv, q_descale=q_descale, rotary_seqlens=rotary_seqlens,
        attention_chunk=attention_chunk,
    )  # fmt: skip
    optional = dict(
        k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad, block_table=block_table, alibi_slopes=alibi_slopes,
        s_aux=s_aux, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new,
        k_descale=k_descale, v_descale=v_descale,
    )  # fmt: skip
    check_tensors(_NAME, dict(q=q, k_cache=k_cache, v_cache=v_cache, **optional), optional)
    _check_shapes(q, k_cache, v_cache, k, v, cu_seqlens_q, cu_seqlens_k_new)
    _check_new_tokens(q, k, v, rotary_cos, rotary_sin, cache_seqlens)
    batch = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    _check_cache_rows(batch, cache_batch_idx, cache_leftpad, block_table)
    window_left, window_right = checked_window(_NAME, window_size)
    is_ordered = causal or window_left >= 0 or window_right >= 0
    if rotary_cos is not None and cu_seqlens_q is not None:
        _check_ragged_rotation(cu_seqlens_q, cu_seqlens_k_new, is_ordered)
    if isinstance(cache_seqlens, numbers.Integral):
        if not 0 <= cache_seqlens < 2**31:
            _refuse("cache_seqlens", f"must be from 0 to 2^31 - 1, got {cache_seqlens}")
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    if _value_checks_wanted():
        rows, capacity = k_cache.shape[:2]
        if cache_batch_idx is not None:
            _check_values("cache_batch_idx", cache_batch_idx, [rows - 1] * batch)
        if cache_leftpad is not None:
            ends = [capacity] * batch
            if cache_seqlens is not None:
                ends = (
                    cache_seqlens if k is None else cache_seqlens + _new_tokens(k, cu_seqlens_k_new)
                )
                ends = ends.clamp(max=capacity).tolist()
            _check_values("cache_leftpad", cache_leftpad, ends)
    if k_cache.shape[1] == 0:
        # There is nothing to choose from, and pages, as which rows are chosen, are not empty.
        cache_leftpad = None
        if cache_batch_idx is not None:
            cache_batch_idx = None
            k_cache, v_cache = (t.new_empty(batch, *t.shape[1:]) for t in (k_cache, v_cache))
    if block_table is None:
        k_rows, v_rows = k_cache, v_cache  # as they are addressed with cache_leftpad
        if cache_batch_idx is not None:
            # A contiguous cache is a paged one with one page a sequence.
            block_table = cache_batch_idx[:, None]
        elif k_cache.shape[0] > batch:
            k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    attended = k_cache, v_cache, block_table
    if cache_leftpad is not None:
        capacity = k_rows.shape[1]
        begin = cache_leftpad.clamp(0, capacity)
        attended = _left_padded(k_rows, v_rows, batch, cache_batch_idx, begin)
    options = dict(
        softmax_scale=softmax_scale,
        causal=causal,
        window_left=window_left,
        window_right=-1 if causal else window_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=None if s_aux is None else s_aux.float(),
        k_scale=k_descale,
        v_scale=v_descale,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=None if cu_seqlens_q is None else max_seqlen_q,
    )

    if k is not None:
        has_own_tokens = _has_own_tokens(q, k, cu_seqlens_q, cu_seqlens_k_new)
        has_one = cu_seqlens_q is None and q.shape[1] == 1
        at_own_positions = rotary_cos is None or is_ordered or has_one
        if has_own_tokens and at_own_positions and cache_leftpad is None:
            rotary = {}
            if rotary_cos is not None:
                rotary = dict(cos=rotary_cos, sin=rotary_sin, interleaved=rotary_interleaved)
            del options["cu_seqlens_q"]
            result = append_decode(
                q, k, v, *attended[:2], cache_seqlens, attended[2], **rotary, **options,
                cu_seqlens=cu_seqlens_q, return_lse=return_softmax_lse,
            )  # fmt: skip
            return _with_lse(result, return_softmax_lse)
        # What decode would refuse must not have changed the caches.
        check_decode(q, *attended[:2], cache_seqlens, attended[2], **options)
        where = (k_cache, v_cache, cache_seqlens, block_table)
        stored = dict(cu_seqlens=cu_seqlens_k_new, k_scale=k_descale, v_scale=v_descale)
        if rotary_cos is None:
            append_kv(k, v, *where, **stored)
        else:
            rotary = dict(cos=rotary_cos, sin=rotary_sin, interleaved=rotary_interleaved)
            if has_own_tokens and at_own_positions:
                q = q.clone()
                rope_append_kv(q, k, v, *where, **rotary, **stored)
            else:
                rope_append_kv(k.clone(), k, v, *where, **rotary, **stored)
                q = _rotate(q, cache_seqlens, is_ordered, **rotary)
        cache_seqlens = cache_seqlens + _new_tokens(k, cu_seqlens_k_new)

    if cache_leftpad is not None:
        if cache_seqlens is None:
            cache_seqlens = torch.full_like(begin, capacity)
        cache_seqlens = cache_seqlens.clamp(0, capacity) - begin
    result = decode(
        q, *attended[:2], cache_seqlens, attended[2], **options, return_lse=return_softmax_lse
    )
    return _with_lse(result, return_softmax_lse)


def _with_lse(result, has_lse):
    """`decode`'s result, its lse as `[B, Hq, Sq]`."""
    if not has_lse:
        return result
    out, lse = result
    return out, lse.transpose(-1, -2).contiguous()


_NAME = "flash_attn_with_kvcache"


def _refuse(argument, text, error=ValueError):
    arguments.refuse(_NAME, argument, text, error)


def _new_tokens(k, cu_seqlens_k_new):
    """Of each sequence: a number, or `[B]` int32."""
    return k.shape[1] if cu_seqlens_k_new is None else cu_seqlens_k_new.diff()


def _value_checks_wanted():
    """As the ops have it: LEANATTN_CHECK is set, and nothing is being captured or traced."""
    if os.environ.get("LEANATTN_CHECK", "0") in ("", "0") or torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _check_values(name, values, largest):
    for i, (value, limit) in enumerate(zip(values.tolist(), largest)):
        if not 0 <= value <= limit:
            _refuse(name, f"[{i}] must be from 0 to {limit}, got {value}")


def _check_shapes(q, k_cache, v_cache, k, v, cu_seqlens_q, cu_seqlens_k_new):
    def check_dims(name, tensor, dims, names):
        if tensor is not None and tensor.dim() != dims:
            _refuse(name, f"must be {names}, got shape {list(tensor.shape)}")

    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_dims(name, tensor, 4, "[B, S, Hkv, D], or pages likewise")
    if cu_seqlens_q is None:
        check_dims("q", q, 4, "[B, Sq, Hq, D]")
    else:
        check_dims("cu_seqlens_q", cu_seqlens_q, 1, "[B + 1]")
        check_dims("q", q, 3, "[total_q, Hq, D] with cu_seqlens_q")
    for name, tensor in (("k", k), ("v", v)):
        if cu_seqlens_k_new is None:
            check_dims(name, tensor, 4, "[B, Sn, Hkv, D]")
        else:
            check_dims(name, tensor, 3, "[total_new, Hkv, D] with cu_seqlens_k_new")
    if cu_seqlens_k_new is not None and k is None:
        _refuse("cu_seqlens_k_new", "goes with k and v only, got k None")


def _are_same(cu_seqlens_q, cu_seqlens_k_new):
    return cu_seqlens_k_new is not None and (
        cu_seqlens_k_new is cu_seqlens_q or cu_seqlens_k_new.data_ptr() == cu_seqlens_q.data_ptr()
    )


def _has_own_tokens(q, k, cu_seqlens_q, cu_seqlens_k_new):
    """Whether q's tokens are those of k, as far as the host can tell."""
    if cu_seqlens_q is None:
        return cu_seqlens_k_new is None and q.shape[1] == k.shape[1]
    return _are_same(cu_seqlens_q, cu_seqlens_k_new) and len(q) == len(k)


def _check_ragged_rotation(cu_seqlens_q, cu_seqlens_k_new, is_ordered):
    """q is rotated along with k then, token by token."""
    if not (_are_same(cu_seqlens_q, cu_seqlens_k_new) and is_ordered):
        _refuse(
            "rotary_cos",
            "is not supported with cu_seqlens_q, unless that is cu_seqlens_k_new, too, and causal "
            "is True or there is a window",
            NotImplementedError,
        )


def _check_new_tokens(q, k, v, rotary_cos, rotary_sin, cache_seqlens):
    if (k is None) != (v is None):
        _refuse("v" if v is None else "k", "is None: give both k and v, or neither")
    if (rotary_cos is None) != (rotary_sin is None):
        name = "rotary_sin" if rotary_sin is None else "rotary_cos"
        _refuse(name, "is None: give both rotary_cos and rotary_sin, or neither")
    if rotary_cos is not None:
        limit = q.shape[-1] // 2
        if rotary_cos.dim() != 2 or rotary_cos.shape[1] > limit:
            _refuse(
                "rotary_cos",
                f"must be [max_position, rotary_dim / 2] with up to {limit} columns, got shape "
                f"{list(rotary_cos.shape)}",
            )
        if rotary_sin.shape != rotary_cos.shape or rotary_sin.dtype != rotary_cos.dtype:
            _refuse(
                "rotary_sin",
                f"must be like rotary_cos, {rotary_cos.dtype} of shape {list(rotary_cos.shape)}, "
                f"got {rotary_sin.dtype} of shape {list(rotary_sin.shape)}",
            )
        if rotary_cos.dtype not in (q.dtype, torch.float32):
            _refuse(
                "rotary_cos", f"must be float32 or of q's dtype, {q.dtype}, got {rotary_cos.dtype}"
            )
    if k is None and rotary_cos is not None:
        _refuse("rotary_cos", "goes with k and v only, got k None")
    if k is not None and cache_seqlens is None:
        _refuse("cache_seqlens", "must be given with k and v, got None")


def _check_cache_rows(batch, cache_batch_idx, cache_leftpad, block_table):
    for name, tensor in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if tensor is None:
            continue
        if block_table is not None:
            _refuse(name, "does not go with block_table: give one of them")
        if tensor.dtype != torch.int32 or tensor.shape != (batch,):
            shape = list(tensor.shape)
            _refuse(name, f"must be int32 of shape [{batch}], got {tensor.dtype} of shape {shape}")


def _rotate(q, cache_seqlens, is_ordered, cos, sin, interleaved):
    """q rotated apart from k: at cache_seqlens + i, or all of it at cache_seqlens."""
    steps = torch.arange(q.shape[1], device=q.device) * int(is_ordered)
    positions = (cache_seqlens.clamp(min=0)[:, None] + steps).clamp(max=len(cos) - 1)
    cos, sin = (table[positions].float().unsqueeze(2) for table in (cos, sin))  # [B, Sq, 1, pairs]
    pairs = cos.shape[-1]
    rotated, rest = q[..., : 2 * pairs].float(), q[..., 2 * pairs :]
    if interleaved:
        x, y = rotated[..., ::2], rotated[..., 1::2]
    else:
        x, y = rotated.chunk(2, -1)
    turned = (x * cos - y * sin, x * sin + y * cos)
    rotated = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([rotated.to(q.dtype), rest], -1)


def _left_padded(k_cache, v_cache, batch, cache_batch_idx, begin):
    """The caches as pages of one token, and the table that begins each sequence at `begin`."""
    pages = as_token_pages(k_cache, v_cache)
    if pages is None:
        raise NotImplementedError(
            "flash_attn_with_kvcache: cache_leftpad is not supported on caches whose strides of "
            f"sequences and tokens are not alike, got k_cache of strides {list(k_cache.stride())} "
            f"and v_cache of {list(v_cache.stride())}"
        )
    k_pages, v_pages, sequence_step, token_step = pages
    tokens = torch.arange(k_cache.shape[1], dtype=torch.int32, device=k_cache.device)
    if cache_batch_idx is None:
        cache_batch_idx = torch.arange(batch, dtype=torch.int32, device=k_cache.device)
    first = cache_batch_idx * sequence_step + begin * token_step
    return k_pages, v_pages, first[:, None] + tokens * token_step
