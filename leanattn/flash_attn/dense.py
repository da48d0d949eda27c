"""flash_attn_func and its packed forms: one length for all sequences of a batch."""

from dataclasses import dataclass, replace

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
    refuse,
)
from leanattn.ops import decode
from leanattn.sdpa import choose


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """FlashAttention's function, with its signature: decode shapes here, the rest by torch.

    docs/flash_attn.md has the table of which call goes where, and
    `leanattn.explain(flash_attn_func, q, k, v, ...)` says it of one call. Gradients are torch's.

    Args:
        q: `[B, Sq, Hq, D]`, float16 or bfloat16, on the CPU float32 too.
        k: `[B, Sk, Hkv, D]`; Hkv a divisor of Hq.
        v: `[B, Sk, Hkv, Dv]`.
        dropout_p: of the attention's weights.
        softmax_scale: default D ** -0.5.
        causal: aligned to the bottom right corner: query i sees the keys up to Sk - Sq + i.
        window_size: (left, right), keys seen beside the query's own position; -1 for no limit.
        softcap: 0 for none, else scores become softcap * tanh(score / softcap).
        alibi_slopes: fp32 `[Hq]` or `[B, Hq]`; scores become score - slope * distance. It has no
            gradient.
        deterministic: every result here is; a backward on CUDA only by torch's own flag.
        return_attn_probs: also return what the tuple below has; not with dropout.

    Returns:
        out `[B, Sq, Hq, Dv]`; or (out, lse fp32 `[B, Hq, Sq]`, an empty tensor). A row that sees no
        key is 0, its lse -inf.

    Raises:
        ValueError, NotImplementedError: naming the argument, what was given and what is allowed.
    """
    return prepare_dense(
        "flash_attn_func", q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    ).run()  # fmt: skip


def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """`flash_attn_func` of kv `[B, Sk, 2, Hkv, D]`, of which nothing is copied."""
    return prepare_kvpacked(
        "flash_attn_kvpacked_func", q, kv, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    ).run()  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """`flash_attn_func` of qkv `[B, S, 3, H, D]`, of which nothing is copied."""
    return prepare_qkvpacked(
        "flash_attn_qkvpacked_func", qkv, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    ).run()  # fmt: skip


@dataclass
class DenseCall:
    """A checked call of `[B, S, H, D]` tensors."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: Options

    def route(self):
        q, k, v, options = self.q, self.k, self.v, self.options
        way = by_torch.way_of_dense(q, v, options)
        lacks = {
            by_torch.PLAIN: "torch has no softcap or log-sum-exp here but in plain operations",
            by_torch.SDPA_WITH_MASK: "torch would make a mask of queries x keys",
        }
        route = choose(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), queries=q.shape[1],
            cannot=lambda: "there is dropout" if options.dropout_p else None,
            torch_lacks=lacks.get(way),
        )  # fmt: skip
        return route if route.backend == "leanattn" else replace(route, by=way)

    def run(self):
        route = self.route()
        if route.backend == "torch":
            out, lse = by_torch.attend_dense(self.q, self.k, self.v, self.options, route.by)
        else:
            result = decode(self.q, self.k, self.v, **self.options.decode_options())
            if not self.options.wants_lse:
                return result
            out, lse = result
            lse = lse.transpose(1, 2)
        return as_result(out, lse)


def as_result(out, lse):
    """What FlashAttention 2 returns, whose third is the dropout mask: empty without dropout."""
    return out if lse is None else (out, lse.contiguous(), out.new_empty(0))


def prepare_dense(
    function, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
    deterministic, return_attn_probs,
):  # fmt: skip
    check_tensors(function, dict(q=q, k=k, v=v, alibi_slopes=alibi_slopes), ("alibi_slopes",))
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            refuse(function, name, f"must be [B, S, H, D], got shape {list(tensor.shape)}")
    batch, queries, heads, head_dim = q.shape
    keys, heads_kv = k.shape[1:3]
    check_shape(function, "k", k, "[B, Sk, Hkv, D]", (batch, None, None, head_dim))
    check_shape(function, "v", v, "[B, Sk, Hkv, Dv]", (batch, keys, heads_kv, None))
    check_qkv(function, q, k, v)
    check_slopes(function, alibi_slopes, batch, heads)
    check_deterministic(function, deterministic, (q, k, v))
    options = Options.of(
        function, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        wants_lse=return_attn_probs,
    )  # fmt: skip
    check_return_attn_probs(function, return_attn_probs, dropout_p)
    options.drop_idle_windows(queries, keys)
    return DenseCall(q, k, v, options)


def prepare_kvpacked(function, q, kv, *options):
    return prepare_dense(function, q, *unpacked(function, "kv", kv, 5), *options)


def prepare_qkvpacked(function, qkv, *options):
    return prepare_dense(function, *unpacked(function, "qkv", qkv, 5), *options)


def unpacked(function, name, packed, dims):
    """Views of kv `[..., 2, H, D]` or qkv `[..., 3, H, D]`."""
    count = len(name)
    check_tensors(function, {name: packed})
    if packed.dim() != dims or packed.shape[-3] != count:
        leading = "total" if dims == 4 else "B, S"
        refuse(function, name, f"must be [{leading}, {count}, H, D], got {list(packed.shape)}")
    return packed.unbind(-3)
