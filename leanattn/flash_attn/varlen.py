"""flash_attn_varlen_func and its packed forms: sequences of any lengths one after the other."""

import numbers
from dataclasses import dataclass, replace
from typing import Optional

import torch

from leanattn.flash_attn import by_torch
from leanattn.flash_attn.arguments import (
    Options,
    check_deterministic,
    check_qkv,
    check_return_attn_probs,
    check_shape,
    check_slopes,
    check_tensors,
    needs_gradients,
    refuse,
)
from leanattn.flash_attn.dense import as_result, unpacked
from leanattn.ops import decode
from leanattn.sdpa import Route, choose


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None, *, seqused_k=None,
):  # fmt: skip
    """FlashAttention's function, with its signature: short queries here, the rest by torch.

    docs/flash_attn.md has the table of which call goes where. Short queries never make the host
    wait; what torch can do only one sequence after the other does, and says so in
    `leanattn.explain(flash_attn_varlen_func, ...)`.

    Args:
        q: `[total_q, Hq, D]`.
        k, v: `[total_k, Hkv, D]` and `[total_k, Hkv, Dv]`; with block_table `[num_pages, page_size,
            Hkv, D]` likewise, which has no gradients.
        cu_seqlens_q, cu_seqlens_k: `[B + 1]` int32, where each sequence begins.
        max_seqlen_q, max_seqlen_k: no sequence has more queries or keys.
        block_table: `[B, max_pages]` int32, the pages of each sequence.
        seqused_k: `[B]` int32, keys of each sequence, in place of cu_seqlens_k's differences;
            cu_seqlens_k may be None then with block_table.
        The rest as in `flash_attn_func`.

    Returns:
        out `[total_q, Hq, Dv]`; or (out, lse fp32 `[Hq, total_q]`, an empty tensor). A row that
        sees no key, or is no sequence's, is 0, its lse -inf.

    Raises:
        ValueError, NotImplementedError: naming the argument, what was given and what is allowed.
    """
    return prepare_varlen(
        "flash_attn_varlen_func", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, block_table, seqused_k=seqused_k,
    ).run()  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """`flash_attn_varlen_func` of kv `[total_k, 2, Hkv, D]`, of which nothing is copied."""
    return prepare_varlen_kvpacked(
        "flash_attn_varlen_kvpacked_func", q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    ).run()  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False,
):  # fmt: skip
    """`flash_attn_varlen_func` of qkv `[total, 3, H, D]`, of which nothing is copied."""
    return prepare_varlen_qkvpacked(
        "flash_attn_varlen_qkvpacked_func", qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    ).run()  # fmt: skip


@dataclass
class VarlenCall:
    """A checked call of `[total, H, D]` tensors."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: Optional[torch.Tensor]
    max_seqlen_q: int
    max_seqlen_k: int
    block_table: Optional[torch.Tensor]
    seqused_k: Optional[torch.Tensor]
    options: Options

    def route(self):
        if self.block_table is not None or self.seqused_k is not None:
            return Route("leanattn", "keys in pages, or fewer than cu_seqlens_k says")
        q, k, v = (x.transpose(0, 1)[None] for x in (self.q, self.k, self.v))
        options = self.options
        torch_lacks = by_torch.varlen_lacks(self.q, self.v, options)
        route = choose(
            q, k, v, queries=self.max_seqlen_q, torch_lacks=torch_lacks,
            cannot=lambda: "there is dropout" if options.dropout_p else None,
        )  # fmt: skip
        if route.backend == "leanattn":
            return route
        return replace(route, by=by_torch.BY_SEQUENCE if torch_lacks else by_torch.VARLEN)

    def run(self):
        route = self.route()
        offsets = (self.cu_seqlens_q, self.cu_seqlens_k)
        tensors = (self.q, self.k, self.v)
        if route.backend == "leanattn":
            out, lse = self._decode()
        elif route.by == by_torch.VARLEN:
            lengths = (self.max_seqlen_q, self.max_seqlen_k)
            out, lse = by_torch.attend_varlen(*tensors, *offsets, *lengths, self.options)
        else:
            out, lse = by_torch.attend_by_sequence(*tensors, *offsets, self.options)
        return as_result(out, lse)

    def _decode(self):
        """Keys that lie one after the other are pages of one token."""
        k, v, table = self.k, self.v, self.block_table
        if table is None:
            tokens = torch.arange(self.max_seqlen_k, dtype=torch.int32, device=k.device)
            table = self.cu_seqlens_k[:-1, None] + tokens
            k, v = k[:, None], v[:, None]
        lengths = self.seqused_k
        if lengths is None:
            lengths = self.cu_seqlens_k.diff()
        options = self.options.decode_options()
        result = decode(
            self.q, k, v, lengths, table, cu_seqlens_q=self.cu_seqlens_q,
            max_seqlen_q=self.max_seqlen_q, **options,
        )  # fmt: skip
        out, lse = result if options["return_lse"] else (result, None)
        return out, lse if lse is None else lse.t()


def prepare_varlen(
    function, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    block_table=None, *, seqused_k=None,
):  # fmt: skip
    optional = dict(alibi_slopes=alibi_slopes, block_table=block_table, seqused_k=seqused_k)
    is_given = seqused_k is not None and block_table is not None and cu_seqlens_k is None
    if is_given:
        optional["cu_seqlens_k"] = None
    else:
        optional = {"cu_seqlens_k": cu_seqlens_k, **optional}
    check_tensors(
        function, dict(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, **optional),
        ("alibi_slopes", "block_table", "seqused_k") + ("cu_seqlens_k",) * is_given,
    )  # fmt: skip
    _check_shapes(function, q, k, v, block_table)
    check_qkv(function, q, k, v)
    batch = len(cu_seqlens_q) - 1
    for name, tensor, names, wanted in (
        ("cu_seqlens_q", cu_seqlens_q, "[B + 1]", (batch + 1,)),
        ("cu_seqlens_k", cu_seqlens_k, "[B + 1] as cu_seqlens_q", (batch + 1,)),
        ("seqused_k", seqused_k, "[B]", (batch,)),
        ("block_table", block_table, "[B, max_pages]", (batch, None)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != torch.int32 or batch < 0:
            refuse(function, name, f"must be int32 {names}, got {tensor.dtype} of {len(tensor)}")
        check_shape(function, name, tensor, names, wanted)
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(length, numbers.Integral) or not 0 <= length < 2**31:
            refuse(function, name, f"must be a number of tokens from 0 to 2^31 - 1, got {length}")
    check_slopes(function, alibi_slopes, batch, q.shape[1])
    check_deterministic(function, deterministic, (q, k, v))
    options = Options.of(
        function, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        wants_lse=return_attn_probs,
    )  # fmt: skip
    check_return_attn_probs(function, return_attn_probs, dropout_p)
    for name, tensor in (("block_table", block_table), ("seqused_k", seqused_k)):
        for what, is_wanted in (
            ("dropout_p", options.dropout_p), ("gradients", needs_gradients(q, k, v))
        ):  # fmt: skip
            if tensor is not None and is_wanted:
                refuse(function, name, f"is not supported with {what}", NotImplementedError)
    options.drop_idle_windows(max_seqlen_q, max_seqlen_k)
    return VarlenCall(
        q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), block_table,
        seqused_k, options,
    )  # fmt: skip


def _check_shapes(function, q, k, v, block_table):
    if q.dim() != 3:
        refuse(function, "q", f"must be [total_q, Hq, D], got shape {list(q.shape)}")
    rows = "total_k" if block_table is None else "num_pages, page_size"
    dims = 3 if block_table is None else 4
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != dims:
            refuse(function, name, f"must be [{rows}, Hkv, D], got shape {list(tensor.shape)}")
    if k.shape[-1] != q.shape[-1]:
        refuse(function, "k", f"must have q's head dim, {q.shape[-1]}, got {k.shape[-1]}")
    check_shape(function, "v", v, f"[{rows}, Hkv, Dv] as k", (*k.shape[:-1], None))


def prepare_varlen_kvpacked(function, q, kv, *options):
    return prepare_varlen(function, q, *unpacked(function, "kv", kv, 4), *options)


def prepare_varlen_qkvpacked(function, qkv, cu_seqlens, max_seqlen, *options):
    return prepare_varlen(
        function, *unpacked(function, "qkv", qkv, 4), cu_seqlens, cu_seqlens, max_seqlen,
        max_seqlen, *options,
    )  # fmt: skip
