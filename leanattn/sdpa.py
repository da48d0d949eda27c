"""scaled_dot_product_attention with torch's signature: decode steps here, the rest by torch.

`_refusal` is the decision table of docs/sdpa.md: `explain` says what it says.
"""

import os
from dataclasses import dataclass

import torch

import leanattn._C  # noqa: F401  registers torch.ops.leanattn
from leanattn.ops import has_tangent

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
    """Where `scaled_dot_product_attention` sends a call: "leanattn" or "torch", and why."""

    backend: str
    reason: str

    def __str__(self):
        return f"{self.backend}: {self.reason}"


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
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if _route(*arguments).backend == "torch":
        return _torch_sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    step = _ops.sdpa_step if torch.compiler.is_compiling() else decode_bhsd
    return step(query, key, value, is_causal, scale)


def decode_bhsd(query, key, value, is_causal, scale, out=None, lse=None):
    """SDPA by the op: [B, H, S, D] tensors, is_causal aligned to the top left.

    Args:
        out, lse: `[B, Hq, Sq, Dv]` and fp32 `[B, Hq, Sq]`, to be written; both or none.
    """
    queries = query.shape[2]
    if is_causal:
        # Query i sees the keys 0 to i. In the op it stands at keys - queries + i.
        key, value = key[:, :, :queries], value[:, :, :queries]
    arguments = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    options = dict(softmax_scale=scale, causal=False)
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
    aligned = (t if t.data_ptr() % 16 == 0 else t.clone() for t in (query, key, value))
    return decode_bhsd(*aligned, is_causal, scale)


@torch.library.register_fake("leanattn::sdpa_step", lib=_library)
def _(query, key, value, is_causal, scale):
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)


def explain(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
    enable_gqa=False,
):  # fmt: skip
    """Which way `scaled_dot_product_attention` takes with these arguments, without taking it.

    Returns:
        Route(backend, reason).

    Raises:
        ValueError: where the call itself would, because of LEANATTN_BACKEND.
    """
    return _route(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


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
    for size, largest in ((query.shape[3], MAX_HEAD_DIM), (value.shape[3], MAX_HEAD_DIM_V)):
        if size % 8 or size > largest:
            return "a head dim is no multiple of 8 up to 576 (value's: 512)"
    if device == "cuda":
        for tensor in (query, key, value):
            # In 2-byte elements: the op wants pointers and strides in multiples of 16 bytes.
            strides = tensor.stride()
            if strides[3] != 1 or any(s % 8 for s in strides[:3]) or _begins_between(tensor):
                return "a tensor's last dimension is not contiguous, or its strides are not aligned"
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return "gradients are needed"
    if not torch.compiler.is_compiling() and has_tangent(query, key, value):
        return "derivatives are needed"
    return None


def _begins_between(tensor):
    """Whether it does not begin at a multiple of 16 bytes; unknown while a graph is made."""
    return not torch.compiler.is_compiling() and tensor.storage_offset() % 8 != 0


def _refusal(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """(why leanattn cannot take a call, why it had better not); the first reason that holds."""
    reason = unsupported(query, key, value)
    if reason is not None:
        return reason, None
    if attn_mask is not None:
        return "there is an attn_mask", None
    if dropout_p != 0.0:
        return "there is dropout", None
    if query.shape[1] != key.shape[1] and not enable_gqa:
        return "query and key differ in heads, without enable_gqa", None
    if query.shape[2] > MAX_QUERIES:
        return None, "more than 16 queries: a prefill"
    if query.device.type == "cpu":
        return None, "on the CPU torch is faster"
    return None, None


def _route(*arguments):
    override = backend_override()
    if override == "torch":
        return Route("torch", "LEANATTN_BACKEND is torch")
    cannot, had_better_not = _refusal(*arguments)
    if override == "leanattn":
        if cannot is not None:
            raise ValueError(f"LEANATTN_BACKEND is leanattn, which cannot take this call: {cannot}")
        return Route("leanattn", "LEANATTN_BACKEND is leanattn")
    reason = cannot or had_better_not
    if reason is not None:
        return Route("torch", reason)
    return Route("leanattn", "a decode step: at most 16 queries, no mask, dropout or gradients")
