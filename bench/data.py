"""Tensors for a shape: several input sets out of one pool of random numbers that is filled once."""

import math
from dataclasses import dataclass
from typing import Optional

import torch

from bench.shapes import Shape

ALIGNMENT = 512  # elements; where each tensor begins
MAX_SETS = 256
FLOAT8 = torch.float8_e4m3fn


@dataclass
class Inputs:
    """One input set, as `leanattn.decode` takes it, with the memory that the caches lie in."""

    q: torch.Tensor  # [B, Sq, Hq, D]
    k_cache: torch.Tensor  # [B, S, Hkv, D] or [num_pages, page_size, Hkv, D]
    v_cache: torch.Tensor  # like k_cache, or its first columns
    k_visible: torch.Tensor  # [visible elements]: as much of K's memory as the queries see
    v_visible: torch.Tensor  # likewise of V's; where V lies in K, each is a half of K's


@dataclass
class Case:
    """A shape with its tensors. Lengths and block table are those of all input sets."""

    shape: Shape
    sets: list  # of Inputs
    cache_seqlens: Optional[torch.Tensor] = None  # [B] int32; None only where all caches are full
    block_table: Optional[torch.Tensor] = None  # [B, max_pages] int32
    cu_seqlens_q: Optional[torch.Tensor] = None  # [B + 1] int32
    sinks: Optional[torch.Tensor] = None  # [Hq] fp32
    alibi_slopes: Optional[torch.Tensor] = None  # [Hq] fp32

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
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)
        groups = {shape.is_float8: [] for shape in shapes}
        for shape in shapes:
            groups[shape.is_float8].append(shape)
        limit_bytes /= len(groups)
        self.numbers = {key: self._draw(group, limit_bytes) for key, group in groups.items()}

    def _draw(self, shapes, limit_bytes):
        element_bytes = shapes[0].cache_bytes
        wanted = max(
            sets_wanted(s, self.cold_bytes) * elements_of_set(s) + s.overhang for s in shapes
        )
        elements = min(wanted, int(limit_bytes) // element_bytes)
        dtype = FLOAT8 if shapes[0].is_float8 else self.dtype
        numbers = torch.empty(elements, dtype=dtype, device=self.device)
        for piece in numbers.split(1 << 28):
            if dtype == FLOAT8:
                piece.copy_(torch.randn(piece.shape, device=self.device, generator=self.generator))
            else:
                piece.normal_(generator=self.generator)
        return numbers

    def case(self, shape, with_lengths=True):
        """`shape` with as many input sets as a cold round takes, or as the pool holds. MemoryError
        if that is none. Lengths are given as servers give them, also where every cache is full,
        unless `with_lengths` is False."""
        numbers = self.numbers[shape.is_float8]
        size = elements_of_set(shape)
        held = max(0, numbers.numel() - shape.overhang) // size
        count = min(sets_wanted(shape, self.cold_bytes), held)
        if count == 0:
            needed, there = (
                elements * shape.cache_bytes / 2**30
                for elements in (size + shape.overhang, numbers.numel())
            )
            raise MemoryError(f"needs {needed:.1f} GiB, the pool has {there:.1f}")
        sets = [_inputs(shape, numbers[i * size : (i + 1) * size]) for i in range(count)]
        for inputs in sets if shape.is_float8 else ():
            inputs.q = inputs.q.to(self.dtype)
        tensors = {}
        if with_lengths or not shape.is_full:
            tensors["cache_seqlens"] = torch.tensor(shape.lengths, dtype=torch.int32)
        if shape.page_size:
            tensors["block_table"] = unsorted_pages(shape)
        if shape.has_query_offsets:
            tensors["cu_seqlens_q"] = query_offsets(shape)
        if shape.has_sinks:
            tensors["sinks"] = torch.linspace(-2, 2, shape.heads_q)
        if shape.has_alibi:
            steps = torch.arange(1, shape.heads_q + 1) / shape.heads_q
            tensors["alibi_slopes"] = 2.0 ** (-8 * steps)
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        return Case(shape, sets, **tensors)


def sets_wanted(shape, cold_bytes):
    """How many input sets make a round through all of them read `cold_bytes`."""
    return max(1, min(MAX_SETS, math.ceil(cold_bytes / shape.visible_bytes)))


def elements_of_set(shape):
    return _padded(shape.query_elements) + shape.num_caches * _padded(shape.cache_elements)


def unsorted_pages(shape):
    """A block table `[B, max_pages]` int32 on the CPU that takes every page once, in random order;
    entries past a sequence's pages are 0."""
    counts = [-(-length // shape.page_size) for length in shape.lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).int()
    table = torch.zeros(shape.batch, -(-shape.capacity // shape.page_size), dtype=torch.int32)
    for row, pages in zip(table, order.split(counts)):
        row[: len(pages)] = pages
    return table


def query_offsets(shape):
    """`[B + 1]` int32 on the CPU: where each sequence's queries begin."""
    return torch.arange(shape.batch + 1, dtype=torch.int32) * shape.seqlen_q


def _padded(elements):
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _inputs(shape, numbers):
    """One input set in `numbers`: q, then K, then V if it is apart."""
    begin_k = _padded(shape.query_elements)
    q = numbers[: shape.query_elements].view(
        shape.batch, shape.seqlen_q, shape.heads_q, shape.head_dim
    )
    k = numbers[begin_k : begin_k + shape.cache_elements]
    k_cache = _cache_view(shape, k)
    if shape.latent_dim:
        halves = k[: shape.visible_elements // 2 * 2].chunk(2)
        return Inputs(q, k_cache, k_cache[..., : shape.latent_dim], *halves)
    begin_v = begin_k + _padded(shape.cache_elements)
    v = numbers[begin_v : begin_v + shape.cache_elements]
    visible = slice(0, shape.visible_elements)
    return Inputs(q, k_cache, _cache_view(shape, v), k[visible], v[visible])


def _cache_view(shape, memory):
    heads, head_dim = shape.heads_kv, shape.head_dim
    if shape.page_size:
        return memory.view(shape.pages, shape.page_size, heads, head_dim)
    head, token = head_dim, heads * head_dim
    if shape.layout == "bhsd":
        head, token = shape.longest * head_dim, head_dim
    # A sequence begins where the longest one before it could have ended: see Shape.overhang.
    return memory.as_strided(
        (shape.batch, shape.capacity, heads, head_dim),
        (shape.longest * heads * head_dim, token, head, 1),
    )


# --- The truth ------------------------------------------------------------------------------------

CHECKED_SEQUENCES = 16
# Norm of the difference over the norm of the truth: bf16's rounding gives some 3e-3, a wrong mask
# or a lost split more than 0.1.
TOLERANCE = 0.02


@dataclass
class Truth:
    """fp32 attention of the first input set, of a few of its sequences."""

    sequences: list
    outputs: list  # each [Sq, Hq, Dv]

    def error(self, out):
        """Of `out` `[B, Sq, Hq, Dv]`: the norm of the difference over that of the truth."""
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
    """Causal attention of one sequence in fp32, [Sq, Hq, Dv], a KV head at a time."""
    shape, inputs = case.shape, case.sets[0]
    groups = (shape.heads_kv, shape.group_size)
    q = inputs.q[seq].float().unflatten(1, groups)  # [Sq, Hkv, g, D]
    k, v = (_sequence(case, cache, seq) for cache in (inputs.k_cache, inputs.v_cache))
    tokens = torch.arange(k.shape[0], device=case.device)
    positions = torch.arange(shape.seqlen_q, device=case.device) + k.shape[0] - shape.seqlen_q
    distances = (positions[:, None] - tokens)[:, None]  # [Sq, 1, L]
    hidden = distances < 0
    if shape.window:
        hidden |= distances >= shape.window
    out = q.new_empty(*q.shape[:3], shape.head_dim_v)
    for head in range(shape.heads_kv):
        scores = q[:, head] @ k[:, head].float().T * shape.head_dim**-0.5  # [Sq, g, L]
        if shape.softcap:
            scores = shape.softcap * (scores / shape.softcap).tanh()
        if shape.has_alibi:
            slopes = case.alibi_slopes.view(groups)[head]
            scores = scores - slopes[:, None] * distances.abs()
        scores = scores.masked_fill(hidden, -math.inf)
        if shape.has_sinks:
            sinks = case.sinks.view(groups)[head]
            scores = torch.cat([scores, sinks[:, None].expand(*scores.shape[:2], 1)], -1)
        weights = scores.softmax(-1)[..., : k.shape[0]]
        out[:, head] = weights @ v[:, head].float()
    return out.flatten(1, 2)


def _sequence(case, cache, seq):
    """The tokens of one sequence, [L, Hkv, D]."""
    length = case.shape.lengths[seq]
    if case.block_table is None:
        return cache[seq, :length]
    pages = case.block_table[seq, : -(-length // case.shape.page_size)].long()
    return cache[pages].flatten(0, 1)[:length]
