"""Exact decode attention at the speed of reading the KV cache.

The ops are torch.ops.leanattn.*; the functions here are thin wrappers with documentation.
"""

from leanattn.explain import explain
from leanattn.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from leanattn.integrations import torch_flash
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
from leanattn.sdpa import Route, scaled_dot_product_attention

__all__ = [
    "Route",
    "__version__",
    "append_kv",
    "counters",
    "decode",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "is_supported",
    "merge_states",
    "rope_append_kv",
    "scaled_dot_product_attention",
    "schedule",
    "warmup",
]

torch_flash.register()
