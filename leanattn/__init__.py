"""Exact decode attention at the speed of reading the KV cache.

The ops are torch.ops.leanattn.*; the functions here are thin wrappers with documentation.
"""

from leanattn.integrations import torch_flash
from leanattn.ops import __version__, counters, decode, is_supported, warmup
from leanattn.schedule import schedule
from leanattn.sdpa import Route, explain, scaled_dot_product_attention

__all__ = [
    "Route",
    "__version__",
    "counters",
    "decode",
    "explain",
    "is_supported",
    "scaled_dot_product_attention",
    "schedule",
    "warmup",
]

torch_flash.register()
