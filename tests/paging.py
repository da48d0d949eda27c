"""Paged caches in plain torch: pages gathered to a dense cache, a dense cache cut into pages."""

import torch


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
