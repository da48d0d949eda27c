"""Exact decode attention at the speed of reading the KV cache.

The ops are torch.ops.leanattn.*; the functions here are thin wrappers with documentation.
"""

from leanattn.flash_attn import flash_attn_with_kvcache
from leanattn.ops import (
    __version__,
    append_kv,
    counters,
    decode,
    is_supported,
    merge_states,
    rope_append_kv,
    warmup,
)
from leanattn.schedule import schedule

__all__ = [
    "__version__",
    "append_kv",
    "counters",
    "decode",
    "flash_attn_with_kvcache",
    "is_supported",
    "merge_states",
    "rope_append_kv",
    "schedule",
    "warmup",
]
