"""Exact decode attention at the speed of reading the KV cache.

The ops are torch.ops.leanattn.*; the functions here are thin wrappers with documentation.
"""

import importlib

import leanattn.autograd  # noqa: F401  these two register
import leanattn.vmap  # noqa: F401  their rules
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
from leanattn.integrations.when_imported import when_imported
from leanattn.ops import (
    __version__,
    append_decode,
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
    "append_decode",
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


def _register_with_transformers():
    try:
        importlib.import_module("leanattn.integrations.transformers")
    except ImportError:
        pass  # too old, which is nobody's fault who does not use leanattn there


torch_flash.register()
when_imported("transformers.modeling_utils", _register_with_transformers)
when_imported(
    "torch.distributed.tensor", lambda: importlib.import_module("leanattn.integrations.dtensor")
)
