"""torch's registry of flash-attention implementations (torch >= 2.11).

    torch.nn.attention.activate_flash_attention_impl("LEANATTN")

Importing leanattn registers the name and activates nothing. Once active, where torch's
scaled_dot_product_attention chooses its flash backend, decode steps run here and all else runs as
before: the kernel that was there is asked.
"""

import torch

from leanattn.sdpa import MAX_QUERIES, decode_bhsd, unsupported

NAME = "LEANATTN"

_OP = "_scaled_dot_product_flash_attention"


class Activation:
    """What torch keeps while the implementation is active, and removes to restore its own."""

    def __init__(self):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_OP}", "CUDA"):
            raise RuntimeError(f"leanattn: this torch has no CUDA kernel of aten::{_OP} to extend")
        delegate = torch.library.get_kernel(f"aten::{_OP}", "CUDA")
        self._library = torch.library.Library("aten", "IMPL", "CUDA")
        self._library.impl(_OP, make_kernel(delegate.call_boxed), "CUDA", with_keyset=True)

    def remove(self):
        self._library._destroy()


def make_kernel(delegate):
    """The kernel of aten::_scaled_dot_product_flash_attention.

    Args:
        delegate: what runs all that is not a decode step; takes the kernel's own arguments.
    """

    def kernel(
        keyset, query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
        scale=None,
    ):  # fmt: skip
        takes = (
            dropout_p == 0.0
            and not return_debug_mask
            and query.shape[2] <= MAX_QUERIES
            and query.shape[3] == value.shape[3]
            and unsupported(query, key, value) is None
        )
        if not takes:
            return delegate(
                keyset, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale
            )
        # torch promises query's layout, and lse as [B, Hq, Sq].
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        decode_bhsd(query, key, value, is_causal, scale, out, lse)
        # No ragged offsets; the seed and the rest of dropout, which a backward may ask for.
        seed, unused = (query.new_empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
        return out, lse, None, None, query.shape[2], key.shape[2], seed, unused, query.new_empty(0)

    return kernel


def register():
    """Tells torch's registry of the name, where torch has one."""
    registry = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if registry is not None:
        registry(NAME, register_fn=Activation)
