"""Tensors for a shape: several input sets out of one pool of random numbers that is filled once."""

import math
from dataclasses import dataclass
from typing import Optional

import torch

from bench.shapes import ELEMENT_BYTES, Shape

ALIGNMENT = 512  # elements; where each tensor begins
MAX_SETS = 256


@dataclass
class Inputs:
    """One input set, as `leanattn.decode` takes it, with the memory that the caches lie in."""

    q: torch.Tensor  # [B, Sq, Hq, D]
    k_cache: torch.Tensor  # [B, S, Hkv, D] or [num_pages, page_size, Hkv, D]
    v_cache: torch.Tensor  # like k_cache
    k_visible: torch.Tensor  # [visible elements]: as much of K's memory as the queries see
    v_visible: torch.Tensor  # likewise of V's


@dataclass
class Case:
    """A shape with its tensors. Lengths and block table are those of all input sets."""

    shape: Shape
    sets: list  # of Inputs
    cache_seqlens: Optional[torch.Tensor]  # [B] int32; None where every sequence fills its cache
    block_table: Optional[torch.Tensor]  # [B, max_pages] int32

    @property
    def device(self):
        return self.sets[0].q.device

    @property
    def dtype(self):
        return self.sets[0].q.dtype


class Pool:
    """Normally distributed numbers on a device, of which input sets are views."""

    def __init__(self, shapes, dtype, device, limit_bytes):
        """As large as the largest of `shapes` needs, but at most `limit_bytes`, and no more than
        60% of what is free on a GPU."""
        self.cold_bytes = 1 << 18  # on the CPU nothing is measured in earnest
        if device.type == "cuda":
            # More than 4 times the L2 cache, so that a round through the sets leaves nothing there.
            self.cold_bytes = 4.2 * torch.cuda.get_device_properties(device).L2_cache_size
            limit_bytes = min(limit_bytes, 0.6 * torch.cuda.mem_get_info(device)[0])
        wanted = max(sets_wanted(s, self.cold_bytes) * elements_of_set(s) for s in shapes)
        elements = min(wanted, int(limit_bytes) // ELEMENT_BYTES)
        self.numbers = torch.empty(elements, dtype=dtype, device=device)
        generator = torch.Generator(device).manual_seed(0)
        for piece in self.numbers.split(1 << 28):
            piece.normal_(generator=generator)

    def case(self, shape):
        """`shape` with as many input sets as a cold round takes, or as the pool holds. MemoryError
        if that is none."""
        size = elements_of_set(shape)
        count = min(sets_wanted(shape, self.cold_bytes), self.numbers.numel() // size)
        if count == 0:
            raise MemoryError(
                f"needs {size * ELEMENT_BYTES / 2**30:.1f} GiB, the pool has "
                f"{self.numbers.numel() * ELEMENT_BYTES / 2**30:.1f}"
            )
        sets = [_inputs(shape, self.numbers[i * size : (i + 1) * size]) for i in range(count)]
        device = self.numbers.device
        lengths = torch.tensor(shape.lengths, dtype=torch.int32)
        return Case(
            shape=shape,
            sets=sets,
            cache_seqlens=lengths.to(device) if shape.is_ragged or shape.page_size else None,
            block_table=unsorted_pages(shape).to(device) if shape.page_size else None,
        )


def sets_wanted(shape, cold_bytes):
    """How many input sets make a round through all of them read `cold_bytes`."""
    return max(1, min(MAX_SETS, math.ceil(cold_bytes / shape.visible_bytes)))


def elements_of_set(shape):
    return _padded(shape.query_elements) + 2 * _padded(shape.cache_elements)


def unsorted_pages(shape):
    """A block table `[B, max_pages]` int32 on the CPU that takes every page once, in random order;
    entries past a sequence's pages are 0."""
    counts = [-(-length // shape.page_size) for length in shape.lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).int()
    table = torch.zeros(shape.batch, max(counts), dtype=torch.int32)
    for row, pages in zip(table, order.split(counts)):
        row[: len(pages)] = pages
    return table


def _padded(elements):
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _inputs(shape, numbers):
    """One input set in `numbers`: q, then K, then V."""
    begin_k = _padded(shape.query_elements)
    begin_v = begin_k + _padded(shape.cache_elements)
    q = numbers[: shape.query_elements]
    k, v = (numbers[begin : begin + shape.cache_elements] for begin in (begin_k, begin_v))
    return Inputs(
        q=q.view(shape.batch, shape.seqlen_q, shape.heads_q, shape.head_dim),
        k_cache=_cache_view(shape, k),
        v_cache=_cache_view(shape, v),
        k_visible=k[: shape.visible_elements],
        v_visible=v[: shape.visible_elements],
    )


def _cache_view(shape, memory):
    if shape.page_size:
        return memory.view(shape.pages, shape.page_size, shape.heads_kv, shape.head_dim)
    if shape.layout == "bhsd":
        cache = memory.view(shape.batch, shape.heads_kv, shape.capacity, shape.head_dim)
        return cache.transpose(1, 2)
    return memory.view(shape.batch, shape.capacity, shape.heads_kv, shape.head_dim)


# --- The truth ------------------------------------------------------------------------------------

CHECKED_SEQUENCES = 16
# Norm of the difference over the norm of the truth: bf16's rounding gives some 3e-3, a wrong mask
# or a lost split more than 0.1.
TOLERANCE = 0.02


@dataclass
class Truth:
    """fp32 attention of the first input set, of a few of its sequences."""

    sequences: list
    outputs: list  # each [Sq, Hq, D]

    def error(self, out):
        """Of `out` `[B, Sq, Hq, D]`: the norm of the difference over that of the truth."""
        picked = torch.stack([out[seq].float() for seq in self.sequences])
        truth = torch.stack(self.outputs)
        return ((picked - truth).norm() / truth.norm()).item()


def truth(case):
    """At most 16 sequences, spread over the batch, the longest one among them."""
    shape = case.shape
    step = max(1, shape.batch // CHECKED_SEQUENCES)
    sequences = {*range(0, shape.batch, step), shape.lengths.index(max(shape.lengths))}
    sequences = sorted(sequences)
    return Truth(sequences, [_attend(case, seq) for seq in sequences])


def _attend(case, seq):
    """Causal attention of one sequence in fp32, [Sq, Hq, D], a KV head at a time."""
    shape, inputs = case.shape, case.sets[0]
    q = inputs.q[seq].float().unflatten(1, (shape.heads_kv, shape.group_size))  # [Sq, Hkv, g, D]
    k, v = (_sequence(case, cache, seq) for cache in (inputs.k_cache, inputs.v_cache))
    tokens = k.shape[0]
    positions = torch.arange(tokens - shape.seqlen_q, tokens, device=case.device)
    hidden = torch.arange(tokens, device=case.device) > positions[:, None, None]  # [Sq, 1, L]
    out = torch.empty_like(q)
    for head in range(shape.heads_kv):
        scores = q[:, head] @ k[:, head].float().T * shape.head_dim**-0.5  # [Sq, g, L]
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        out[:, head] = weights @ v[:, head].float()
    return out.flatten(1, 2)


def _sequence(case, cache, seq):
    """The tokens of one sequence, [L, Hkv, D]."""
    length = case.shape.lengths[seq]
    if case.block_table is None:
        return cache[seq, :length]
    pages = case.block_table[seq, : -(-length // case.shape.page_size)].long()
    return cache[pages].flatten(0, 1)[:length]
