"""Paged calls from contiguous ones: the same tokens in pages, and NaN in all other memory."""

import math

import torch
from reference import clamped_lengths

UNUSED_ENTRY = 2147480000


def ceil_div(a, b):
    return -(-a // b)


def empty_pages(k, v, num_pages, page_size, layout="plain"):
    """Caches of NaN, `[num_pages, page_size, Hkv, D]` and `[..., Dv]`, in one of the ways in which
    engines store them."""
    heads, dim, dim_v = k.shape[2], k.shape[3], v.shape[3]

    def memory(*shape):
        return torch.full(shape, math.nan, dtype=k.dtype, device=k.device)

    if layout == "plain":
        return memory(num_pages, page_size, heads, dim), memory(num_pages, page_size, heads, dim_v)
    if layout == "heads-first":
        return (memory(num_pages, heads, page_size, dim).transpose(1, 2),
                memory(num_pages, heads, page_size, dim_v).transpose(1, 2))  # fmt: skip
    if layout == "packed-heads-first":  # vLLM's
        both = memory(num_pages, heads, page_size, dim + dim_v).transpose(1, 2)
        return both[..., :dim], both[..., dim:]
    if layout == "tokens-outermost":
        return (memory(page_size, num_pages, heads, dim).transpose(0, 1),
                memory(page_size, num_pages, heads, dim_v).transpose(0, 1))  # fmt: skip
    if layout == "sliced":  # pages, rows, heads and columns from the middle of more

        def middle(width):
            return memory(2 * num_pages, page_size + 2, heads + 3, width + 24)[
                1::2, 1:-1, 1:-2, 8:-16
            ]

        return middle(dim), middle(dim_v)
    if layout == "values-in-keys":  # of multi-head latent attention
        k_pages = memory(num_pages, page_size, heads, dim)
        return k_pages, k_pages[..., :dim_v]
    assert dim == dim_v, "K and V in one tensor have one head dim"
    if layout == "k-beside-v":  # [num_pages, 2, page_size, Hkv, D]
        return memory(num_pages, 2, page_size, heads, dim).unbind(1)
    assert layout == "k-before-v"  # [2, num_pages, page_size, Hkv, D]
    return memory(2, num_pages, page_size, heads, dim).unbind(0)


LAYOUTS = ["plain", "heads-first", "packed-heads-first", "tokens-outermost", "sliced", "k-beside-v",
           "k-before-v"]  # fmt: skip


def as_numbers(tensor):
    """Something that torch can assign to by index, which float8 is not."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def random_table(lengths, page_size, device, *, spare_pages=3, spare_entries=2, seed=7):
    """(block_table, num_pages): pages in random order, none of them used twice, some by nobody."""
    counts = [ceil_div(length, page_size) for length in lengths]
    num_pages = sum(counts) + spare_pages
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(num_pages, generator=generator).int().to(device)
    table = torch.full(
        (len(counts), max([0, *counts]) + spare_entries), UNUSED_ENTRY, dtype=torch.int32,
        device=device,
    )  # fmt: skip
    for sequence, count in enumerate(counts):
        table[sequence, :count] = pages[:count]
        pages = pages[count:]
    return table, num_pages


def paginate(case, page_size, *, layout="plain", **options):
    """The same call on pages. Only tokens within the lengths are copied: the tail of a last page,
    the pages that nobody uses and the memory between pages are NaN."""
    k, v = case["k_cache"], case["v_cache"]
    lengths = clamped_lengths(case.get("cache_seqlens"), *k.shape[:2])
    table, num_pages = random_table(lengths, page_size, k.device, **options)
    k_pages, v_pages = empty_pages(k, v, num_pages, page_size, layout)
    for sequence, length in enumerate(lengths):
        token = torch.arange(length, device=k.device)
        page = table[sequence, token // page_size].long()
        as_numbers(k_pages)[page, token % page_size] = as_numbers(k)[sequence, :length]
        as_numbers(v_pages)[page, token % page_size] = as_numbers(v)[sequence, :length]
    return {**case, "k_cache": k_pages, "v_cache": v_pages, "block_table": table}


def gather(call):
    """The contiguous call that a paged one stands for, wrong page ids clamped."""
    call = dict(call)
    num_pages, page_size = call["k_cache"].shape[:2]
    table = call.pop("block_table").long().clamp(0, max(num_pages - 1, 0))
    batch, max_pages = table.shape
    for name in ("k_cache", "v_cache"):
        cache = call[name]
        if num_pages == 0:
            call[name] = cache.new_zeros(batch, 0, *cache.shape[2:])
        else:
            call[name] = cache[table].reshape(batch, max_pages * page_size, *cache.shape[2:])
    return call


def gather_pages(pages, block_table):
    """The dense `[B, max_pages * page_size, Hkv, D]` cache that a block table stands for.

    pages `[num_pages, page_size, Hkv, D]`; entries of block_table `[B, max_pages]` are clamped to
    [0, num_pages). Without a page the capacity is 0.
    """
    num_pages, page_size = pages.shape[:2]
    if num_pages == 0:
        return pages.new_empty(block_table.shape[0], 0, *pages.shape[2:])
    return pages[block_table.long().clamp(0, num_pages - 1)].flatten(1, 2)


def cut_into_pages(caches, page_size, order=None, filler=torch.nan, spare_pages=2):
    """([pages of each cache], block_table) that stand for dense caches `[B, S, Hkv, D]`.

    order: a permutation of the page ids, `[B * ceil(S / page_size) + spare_pages]`; pages that no
    sequence has, and the rows of a last page beyond S, hold `filler`.
    """
    batch, capacity = caches[0].shape[:2]
    max_pages = -(-capacity // page_size)
    num_pages = batch * max_pages + spare_pages
    order = torch.arange(num_pages) if order is None else order
    table = order[: batch * max_pages].view(batch, max_pages).to(caches[0].device)
    paged = []
    for cache in caches:
        rows = cache.new_full((batch, max_pages * page_size, *cache.shape[2:]), filler)
        rows[:, :capacity] = cache
        pages = cache.new_full((num_pages, page_size, *cache.shape[2:]), filler)
        pages[table.flatten()] = rows.view(-1, page_size, *cache.shape[2:])
        paged.append(pages)
    return paged, table.int()
