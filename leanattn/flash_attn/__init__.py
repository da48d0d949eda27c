"""FlashAttention's functions, with its signatures, names and meaning, on leanattn's op and torch.

`from leanattn.flash_attn import ...` in place of `from flash_attn import ...` is all that a program
has to change; for FlashAttention-3 it is `leanattn.flash_attn_interface`. docs/flash_attn.md says
what each call is computed by.
"""

from leanattn.flash_attn.dense import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from leanattn.flash_attn.kvcache import flash_attn_with_kvcache
from leanattn.flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
