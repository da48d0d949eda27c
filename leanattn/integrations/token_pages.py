"""Contiguous caches as paged ones whose pages hold one token each, so that a block table can name
any tokens of a sequence: what lies behind left padding, or between masked tokens."""

import math


def as_token_pages(k_cache, v_cache):
    """Views of the caches as pages of one token.

    Args:
        k_cache, v_cache: `[B, S, Hkv, D]` and `[B, S, Hkv, Dv]`, any strides.

    Returns:
        (k_pages `[num_pages, 1, Hkv, D]`, v_pages, sequence_step, token_step): token t of sequence
        b is page b * sequence_step + t * token_step. None where the two caches' strides have no
        steps in common, or a page number would not fit an int32.
    """
    steps = _steps(k_cache)
    if steps is None or steps != _steps(v_cache):
        return None
    sequence_step, token_step = steps
    batch, tokens = k_cache.shape[:2]
    num_pages = (batch - 1) * sequence_step + (tokens - 1) * token_step + 1
    if num_pages >= 2**31:
        return None
    pages = (_pages(cache, num_pages, *steps) for cache in (k_cache, v_cache))
    return *pages, sequence_step, token_step


def _steps(cache):
    """(sequence_step, token_step) in units of the cache's own; None if no stride tells tokens
    apart."""
    batch, tokens = cache.shape[:2]
    batch_stride, token_stride = cache.stride()[:2]
    if batch == 1:
        return 0, 1
    if tokens == 1:
        return 1, 0
    # Spelled out, because under torch.compile strides may be symbols, of which there is no gcd.
    if token_stride and batch_stride % token_stride == 0:
        return batch_stride // token_stride, 1
    unit = math.gcd(batch_stride, token_stride)
    return (batch_stride // unit, token_stride // unit) if unit else None


def _pages(cache, num_pages, sequence_step, token_step):
    """Between the tokens lie pages that overlap others; they are in nobody's table."""
    batch_stride, token_stride, head_stride, dim_stride = cache.stride()
    unit = token_stride // token_step if token_step else batch_stride
    _, _, heads, dim = cache.shape
    return cache.as_strided((num_pages, 1, heads, dim), (unit, unit, head_stride, dim_stride))
