"""scaled_dot_product_attention with torch's signature: decode steps here, the rest by torch.

`choose` is the decision table of docs/sdpa.md, which the functions of leanattn.flash_attn go by
too: `leanattn.explain` says what it says.
"""

import os
import sys
from dataclasses import dataclass
from typing import Optional

import torch

import leanattn._C  # noqa: F401  registers torch.ops.leanattn
from leanattn.autograd import has_tangent

_ops = torch.ops.leanattn
_torch_sdpa = torch.nn.functional.scaled_dot_product_attention

MAX_QUERIES = 16  # beyond, a call is a prefill: bound by arithmetic, which SDPA is made for
MAX_HEAD_DIM, MAX_HEAD_DIM_V = 576, 512
MIN_CAPABILITY = (8, 0)
# Up to here GPUs with 99 KB of shared memory a CTA have room: 8.6, 8.9, and from 12.0 on.
MAX_HEAD_DIM_OF_SMALL_GPUS = 256

_HAS_CUDA_KERNELS = _ops.build_info().split(";")[1] != "cpu"


@dataclass(frozen=True)
class Route:
    """Where a call goes, "leanattn" or "torch", why, and by what of torch, if there is a choice."""

    backend: str
    reason: str
    by: Optional[str] = None

    def __str__(self):
        return f"{self.backend}: {self.reason}" + (f" (by {self.by})" if self.by else "")


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
    enable_gqa=False,
):  # fmt: skip
    """torch's scaled_dot_product_attention, with decode steps by leanattn.

    docs/sdpa.md has the table of which call goes where, `leanattn.explain` says it of one call, and
    the environment variable LEANATTN_BACKEND, "auto", "leanattn" or "torch", overrides it.

    Args:
        query: `[B, Hq, Sq, D]`.
        key: `[B, Hkv, Skv, D]`; Hkv may be a divisor of Hq with enable_gqa.
        value: `[B, Hkv, Skv, Dv]`.
        attn_mask, dropout_p, is_causal, scale, enable_gqa: as torch's. is_causal is aligned to the
            top left, as it is there: query i sees the keys 0 to i, whatever Skv is.

    Returns:
        `[B, Hq, Sq, Dv]`.

    Raises:
        ValueError: LEANATTN_BACKEND is "leanattn" and leanattn does not take the call, or it is
            none of the three. All else is as torch raises it.
    """
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if _route(*arguments).backend == "torch":
        return _torch_sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.compiler.is_compiling():
        return _ops.sdpa_step(query, key, value, is_causal, scale)
    if attn_mask is None:
        return decode_bhsd(query, key, value, is_causal, scale)
    if _is_causal_bias(attn_mask):
        is_lower_right = attn_mask.variant.name == "LOWER_RIGHT"
        return decode_bhsd(query, key, value, not is_lower_right, scale, causal=is_lower_right)
    lengths = _prefix_lengths(query, key, attn_mask)
    return decode_bhsd(query, key, value, False, scale, cache_seqlens=lengths)


def decode_bhsd(query, key, value, is_causal, scale, out=None, lse=None, **options):
    """SDPA by the op: [B, H, S, D] tensors, is_causal aligned to the top left.

    Args:
        out, lse: `[B, Hq, Sq, Dv]` and fp32 `[B, Hq, Sq]`, to be written; both or none.
        options: more of `leanattn.decode`'s, whose causal is aligned to the bottom right.
    """
    queries = query.shape[2]
    if is_causal:
        # Query i sees the keys 0 to i. In the op it stands at keys - queries + i.
        key, value = key[:, :, :queries], value[:, :, :queries]
    arguments = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    options = dict(softmax_scale=scale, causal=False) | options
    if is_causal:
        options["window_right"] = queries - key.shape[2]
    if out is None:
        return _ops.decode(*arguments, **options).transpose(1, 2)
    _ops.decode_with_lse_out(
        *arguments, **options, out=out.transpose(1, 2), lse=lse.transpose(1, 2)
    )
    return out


# What compiled code calls. Where tensors begin is known only when it runs: Dynamo does not trace
# storage_offset(), and a graph that is there already is used for any offset.
_library = torch.library.Library("leanattn", "FRAGMENT")
_library.define(
    "sdpa_step(Tensor query, Tensor key, Tensor value, bool is_causal, float? scale) -> Tensor"
)


@torch.library.impl(_library, "sdpa_step", "CompositeExplicitAutograd")
def _(query, key, value, is_causal, scale):
    if query.data_ptr() % 16:
        query = query.clone()
    key, value = (t if t.data_ptr() % 4 == 0 else t.clone() for t in (key, value))
    return decode_bhsd(query, key, value, is_causal, scale)


@torch.library.register_fake("leanattn::sdpa_step", lib=_library)
def _(query, key, value, is_causal, scale):
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)


def explain_sdpa(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
    enable_gqa=False,
):  # fmt: skip
    """`leanattn.explain` of `scaled_dot_product_attention`."""
    return _route(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)


def backend_override():
    """LEANATTN_BACKEND: "auto", "leanattn" or "torch"."""
    name = os.environ.get("LEANATTN_BACKEND") or "auto"
    if name not in ("auto", "leanattn", "torch"):
        raise ValueError(f"LEANATTN_BACKEND must be auto, leanattn or torch, got '{name}'")
    return name


def unsupported(query, key, value):
    """Why leanattn.decode cannot take these [B, H, S, D] tensors, or None. Host knowledge alone."""
    if query.is_nested or key.is_nested or value.is_nested:
        return "a tensor is nested"
    if not query.dim() == key.dim() == value.dim() == 4:
        return "not all of query, key and value are 4-D"
    if not (query.dtype == key.dtype == value.dtype):
        return "query, key and value differ in dtype"
    if not (query.device == key.device == value.device):
        return "query, key and value differ in device"
    device, dtype = query.device.type, query.dtype
    if device == "cuda":
        if not _HAS_CUDA_KERNELS:
            return "this build of leanattn has no CUDA kernels"
        properties = torch.cuda.get_device_properties(query.device)
        capability = (properties.major, properties.minor)
        if capability < MIN_CAPABILITY:
            return "the GPU's compute capability is below 8.0"
        is_small = capability in ((8, 6), (8, 9)) or capability >= (12, 0)
        if is_small and max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM_OF_SMALL_GPUS:
            return "the GPU has no room for head dims beyond 256 in its shared memory"
    elif device != "cpu":
        return "the device is neither CUDA nor CPU"
    narrow = dtype in (torch.float16, torch.bfloat16)
    if not narrow and not (device == "cpu" and dtype == torch.float32):
        return "the dtype is not float16 or bfloat16 (on the CPU also float32)"
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != dtype:
        return "autocast is on, for another dtype"
    if query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3]:
        return "query, key and value differ in batch, or key and value in heads or length"
    if query.shape[3] != key.shape[3]:
        return "query and key differ in head dim"
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        return "a tensor is empty"
    if query.shape[1] % key.shape[1]:
        return "query's heads are no multiple of key's"
    dims = (query.shape[3], value.shape[3])
    if dims[0] > MAX_HEAD_DIM or dims[1] > MAX_HEAD_DIM_V:
        return "a head dim is beyond 576 (value's: 512)"
    if device == "cuda":
        if any(dim % 2 for dim in dims):
            return "a head dim is odd"
        # In 2-byte elements: the op wants multiples of 4 bytes, of query of 16 if it does not pad.
        query_grain = 1 if any(dim % 8 for dim in dims) else 8
        for tensor, grain in ((query, query_grain), (key, 2), (value, 2)):
            strides = tensor.stride()
            is_contiguous = strides[3] == 1 or (tensor is query and query_grain == 1)
            if not is_contiguous or any(s % grain for s in strides[:3]):
                return "a tensor's last dimension is not contiguous, or its strides are not aligned"
            if _begins_between(tensor, grain):
                return "a tensor does not begin at an aligned address"
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return "gradients are needed"
    if not torch.compiler.is_compiling() and has_tangent(query, key, value):
        return "derivatives are needed"
    return None


def _begins_between(tensor, grain):
    """Whether it begins at no multiple of `grain` elements; unknown while a graph is made."""
    return not torch.compiler.is_compiling() and tensor.storage_offset() % grain != 0


def _prefix_lengths(query, key, mask):
    """`[B]` int32, how many keys each sequence's queries see by a bool mask that is padding: every
    query the same, those before the padding, at least one. None where the mask is anything else, or
    lies on a device, where the host would have to wait for it."""
    batch, _, queries, _ = query.shape
    if mask.device.type != "cpu" or mask.dtype != torch.bool or mask.dim() > 4:
        return None
    try:
        mask = mask.expand(batch, query.shape[1], queries, key.shape[2])
    except RuntimeError:
        return None
    rows = mask[:, 0, 0]
    lengths = rows.sum(-1)
    is_prefix = torch.arange(key.shape[2]) < lengths[:, None]
    is_padding = (mask == is_prefix[:, None, None]).all() and (lengths > 0).all()
    return lengths.int() if is_padding else None


def _is_causal_bias(attn_mask):
    """Whether it is one of torch's own causal masks. Their module, which imports half of torch, is
    there if there is such a mask."""
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(attn_mask, module.CausalBias)


def _needs_mask(query, key, attn_mask):
    """Whether attn_mask is more than the op's own causal masks and lengths can say."""
    if attn_mask is None:
        return False
    if torch.compiler.is_compiling():
        return True
    if _is_causal_bias(attn_mask):
        return (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (query.shape[2], key.shape[2])
    return _prefix_lengths(query, key, attn_mask) is None


def choose(query, key, value, *, cannot, queries, torch_lacks=None):
    """The decision table: the first reason that holds.

    Args:
        query, key, value: `[B, H, S, D]`.
        cannot: a function that gives why leanattn cannot take the call, where it can take such
            tensors, or None.
        queries: of a sequence, at most.
        torch_lacks: why torch had better not take it, however many queries there are.
    """
    override = backend_override()
    if override == "torch":
        return Route("torch", "LEANATTN_BACKEND is torch")
    reason = unsupported(query, key, value) or cannot()
    if override == "leanattn":
        if reason is not None:
            raise ValueError(f"LEANATTN_BACKEND is leanattn, which cannot take this call: {reason}")
        return Route("leanattn", "LEANATTN_BACKEND is leanattn")
    if reason is not None:
        return Route("torch", reason)
    if query.device.type == "cpu":
        return Route("torch", "on the CPU torch is faster")
    if torch_lacks is not None:
        return Route("leanattn", torch_lacks)
    if queries > MAX_QUERIES:
        return Route("torch", "more than 16 queries: a prefill")
    return Route("leanattn", "a decode step: at most 16 queries, no mask, dropout or gradients")


def _route(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
    def cannot():
        if attn_mask is not None and is_causal:
            return "there are an attn_mask and is_causal"
        if _needs_mask(query, key, attn_mask):
            return "there is an attn_mask"
        if dropout_p != 0.0:
            return "there is dropout"
        if query.shape[1] != key.shape[1] and not enable_gqa:
            return "query and key differ in heads, without enable_gqa"
        return None

    queries = query.shape[2] if query.dim() > 2 else 1
    return choose(query, key, value, cannot=cannot, queries=queries)
