"""What the functions of this package have in common: the options that each has, and checks of what
each is given, by FlashAttention's own names."""

import math
import numbers
from dataclasses import dataclass
from typing import Optional

import torch

_DTYPES = {
    "cuda": (torch.float16, torch.bfloat16),
    "cpu": (torch.float16, torch.bfloat16, torch.float32),
}


def refuse(function, argument, text, error=ValueError):
    raise error(f"{function}: {argument} {text}")


@dataclass
class Options:
    """Of one call, checked. A window is a number of keys, -1 for all; causal is one of 0 after."""

    function: str  # for messages
    dropout_p: float
    softmax_scale: Optional[float]  # None: D ** -0.5
    window_left: int
    window_right: int
    softcap: float
    alibi_slopes: Optional[torch.Tensor]  # fp32 [Hq] or [B, Hq]
    wants_lse: bool

    @classmethod
    def of(
        cls, function, *, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        wants_lse,
    ):  # fmt: skip
        """From FlashAttention's arguments."""
        window_left, window_right = checked_window(function, window_size)
        for name, value in (("dropout_p", dropout_p), ("softcap", softcap)):
            if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
                refuse(function, name, f"must be a finite number >= 0 (0 is off), got {value}")
        if dropout_p >= 1:
            refuse(function, "dropout_p", f"must be from 0 to below 1, got {dropout_p}")
        if softmax_scale is not None and not (
            isinstance(softmax_scale, numbers.Real) and math.isfinite(softmax_scale)
        ):
            refuse(function, "softmax_scale", f"must be a finite number, got {softmax_scale}")
        if causal:
            window_right = 0
        return cls(
            function, float(dropout_p), softmax_scale, window_left, window_right, float(softcap),
            alibi_slopes, wants_lse,
        )  # fmt: skip

    def drop_idle_windows(self, queries, keys):
        """Those that hide nothing from at most so many queries of at most so many keys."""
        if self.window_left >= keys - 1:
            self.window_left = -1
        if self.window_right >= queries - 1:
            self.window_right = -1

    @property
    def is_causal(self):
        """The causal mask and no other."""
        return self.window_left < 0 and self.window_right == 0

    @property
    def has_window(self):
        """One that is not the causal mask alone."""
        return self.window_left >= 0 or self.window_right > 0

    def decode_options(self):
        """Of `leanattn.decode`."""
        return dict(
            softmax_scale=self.softmax_scale,
            causal=False,
            window_left=self.window_left,
            window_right=self.window_right,
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            return_lse=self.wants_lse,
        )


def checked_window(function, window_size):
    """(left, right), -1 for no limit."""
    is_pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not is_pair or not all(isinstance(size, numbers.Integral) for size in window_size):
        refuse(function, "window_size", f"must be a pair (left, right), got {window_size}")
    return tuple(size if size >= 0 else -1 for size in window_size)


def check_tensors(function, tensors, optional=()):
    """All on the first one's device, and none missing but `optional` ones."""
    device = None
    for name, tensor in tensors.items():
        may_be_none = name in optional
        if not (isinstance(tensor, torch.Tensor) or (tensor is None and may_be_none)):
            wanted = f"must be a tensor{' or None' * may_be_none}"
            refuse(function, name, f"{wanted}, got {tensor!r}")
        if tensor is None:
            continue
        if device is None:
            device, first = tensor.device, name
        if tensor.device != device:
            refuse(function, name, f"must be on {first}'s device, {device}, got {tensor.device}")


def check_shape(function, name, tensor, names, wanted):
    """`wanted` has None where any size will do."""
    shape = tuple(tensor.shape)
    fits = len(shape) == len(wanted) and all(w in (None, s) for w, s in zip(wanted, shape))
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in wanted)
        refuse(function, name, f"must be {names} = [{sizes}], got shape {list(shape)}")


def check_qkv(function, q, k, v):
    """Dtypes and heads of `[..., H, D]`."""
    allowed = _DTYPES.get(q.device.type)
    if allowed is None:
        refuse(function, "q", f"must be on cpu or cuda, got {q.device}")
    if q.dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        refuse(function, "q", f"must be one of {names} on {q.device.type}, got {q.dtype}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            refuse(function, name, f"must be of q's dtype, {q.dtype}, got {tensor.dtype}")
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    if heads_kv < 1 or heads_q < 1 or heads_q % heads_kv:
        refuse(function, "q", f"must have a multiple of k's {heads_kv} heads, got {heads_q}")


def check_slopes(function, slopes, batch, heads):
    if slopes is None:
        return
    if slopes.dtype != torch.float32 or tuple(slopes.shape) not in ((heads,), (batch, heads)):
        refuse(
            function,
            "alibi_slopes",
            f"must be float32 of shape [{heads}] or [{batch}, {heads}], got {slopes.dtype} of "
            f"shape {list(slopes.shape)}",
        )


def check_deterministic(function, deterministic, tensors):
    """A backward is torch's, and deterministic if torch's own flag says so."""
    if not deterministic or torch.are_deterministic_algorithms_enabled():
        return
    if needs_gradients(*tensors) and tensors[0].is_cuda:
        refuse(
            function,
            "deterministic",
            "is not supported where gradients are needed, for the backward is torch's: call "
            "torch.use_deterministic_algorithms(True)",
            NotImplementedError,
        )


def check_return_attn_probs(function, return_attn_probs, dropout_p):
    if return_attn_probs and dropout_p:
        refuse(
            function,
            "return_attn_probs",
            "is not supported with dropout_p, whose mask no backend of torch gives; got "
            f"dropout_p {dropout_p}",
            NotImplementedError,
        )


def refuse_unknown(function, *, attention_chunk=0, **tensors):
    """FlashAttention-3's arguments that nothing here can do."""
    for name, tensor in tensors.items():
        if tensor is not None:
            refuse(function, name, "is not supported, it must be None", NotImplementedError)
    if attention_chunk:
        text = f"is not supported, it must be 0, got {attention_chunk}"
        refuse(function, "attention_chunk", text, NotImplementedError)


def needs_gradients(*tensors):
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
