"""leanattn.explain: which way a call goes, without making it."""

import inspect

from leanattn.flash_attn import (
    dense,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    varlen,
)
from leanattn.sdpa import Route, explain_sdpa, scaled_dot_product_attention

_PREPARE = {
    flash_attn_func: dense.prepare_dense,
    flash_attn_kvpacked_func: dense.prepare_kvpacked,
    flash_attn_qkvpacked_func: dense.prepare_qkvpacked,
    flash_attn_varlen_func: varlen.prepare_varlen,
    flash_attn_varlen_kvpacked_func: varlen.prepare_varlen_kvpacked,
    flash_attn_varlen_qkvpacked_func: varlen.prepare_varlen_qkvpacked,
}


def explain(*arguments, **options):
    """Which way a call goes: `explain(function, ...)` for a call `function(...)`.

    Args:
        function: `scaled_dot_product_attention` or one of `leanattn.flash_attn`'s; without it the
            arguments are those of `scaled_dot_product_attention`.

    Returns:
        Route(backend, reason, by).

    Raises:
        ValueError: where the call itself would, for the arguments or because of LEANATTN_BACKEND.
        TypeError: for another function.
    """
    if not arguments or not callable(arguments[0]):
        return explain_sdpa(*arguments, **options)
    function, *arguments = arguments
    if function is scaled_dot_product_attention:
        return explain_sdpa(*arguments, **options)
    if function is flash_attn_with_kvcache:
        return Route("leanattn", "a KV cache, whatever the number of queries")
    if function not in _PREPARE:
        names = ", ".join(f.__name__ for f in (scaled_dot_product_attention, *_PREPARE))
        raise TypeError(f"explain: function must be one of {names}, got {function!r}")
    bound = inspect.signature(function).bind(*arguments, **options)
    bound.apply_defaults()
    return _PREPARE[function](function.__name__, *bound.args, **bound.kwargs).route()
