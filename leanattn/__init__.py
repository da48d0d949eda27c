"""Exact decode attention at the speed of reading the KV cache.

The ops are torch.ops.leanattn.*; the functions here are thin wrappers with documentation.
"""

from leanattn.ops import __version__, counters, decode, is_supported, merge_states, warmup
from leanattn.schedule import schedule

__all__ = [
    "__version__",
    "counters",
    "decode",
    "is_supported",
    "merge_states",
    "schedule",
    "warmup",
]
