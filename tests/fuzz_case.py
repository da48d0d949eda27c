"""One random call of decode: drawn as plain numbers from (seed, index, device), then built.

`draw` chooses shapes, strides, pages, lengths and options over the whole argument space; `build`
makes the tensors, on the CPU whatever the device, so that a case is the same numbers everywhere.
Every key that no query row may see is poison; needles and visible NaN stand where an error of one
in a boundary would show.
"""

import dataclasses
import math
import random

import torch
from paging import as_numbers, gather_pages
from reference import clamped_lengths, own_tokens, query_ranges, scaled, visible_range

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
OPS = ("decode", "decode_with_lse", "decode_out", "decode_with_lse_out")
TILE_EDGES = sorted(edge + side for edge in (16, 64, 128, 256, 512) for side in (-1, 0, 1))
JUNK_PAGES = (-1, INT32_MIN, 2147480000, INT32_MAX)
JUNK_STRIDES = (0, 1, 3, 2**31 + 1, 2**50)
CONTEXT_PARALLEL = ("cp_world_size", "cp_rank", "cp_interleave")
POISONS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

CACHE_ELEMENTS = 300_000  # of K, beyond which a case is too slow for a suite
SCORES_TIMES_DIMS = 10_000_000  # likewise, multiplications of one pass of the reference


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a tensor lies: its dimensions but the last in any order, with memory around them."""

    order: tuple  # of all dimensions but the last, outermost first
    before: tuple  # elements of each dimension that lie before the view,
    after: tuple  # and after it
    step: tuple  # 2: every other element of a dimension
    expanded: int | None  # dimension of stride 0
    junk_stride: int | None  # stride of dimensions of size 1


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of a call as plain numbers, and what its tensors hold."""

    seed: int
    index: int
    device: str
    op: str
    dtype: str
    cache_dtype: str | None  # None: dtype
    scales: str | None  # of float8 caches: "one", "heads", "batch"
    batch: int
    heads: tuple  # Hq, Hkv
    dims: tuple  # D, Dv
    seqlen_q: int | None  # None: q is [B, Hq, D], or ragged
    offsets: tuple | None  # cu_seqlens_q
    total_q: int
    capacity: int  # tokens that a sequence can hold
    ranks: (
        tuple | None
    )  # cp_world_size, cp_rank, cp_interleave; lengths count the tokens of all then
    lengths: tuple | None
    appended: tuple | None  # tokens of each sequence that append_kv is to write before
    page_size: int | None
    max_pages: int
    num_pages: int
    table: str | None  # "in order", "shuffled", "shared prefix", "one row for all", "corrupted"
    table_strides: bool
    packing: str  # of K and V: "separate", "one row", "neighbour heads", "heads in turn", "V in K"
    q_layout: Layout
    k_layout: Layout
    v_layout: Layout
    out_layout: Layout
    small_strides: bool  # of lengths, offsets, slopes, sinks and lse
    softmax_scale: float | None
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    alibi: str | None  # "heads", "batch"
    slope: float
    sinks: str | None  # "finite", "some -inf", "large"
    max_seqlen_q: int | None
    batch_invariant: bool
    counters: bool
    units: int | None  # LEANATTN_NUM_UNITS
    layout: str | None  # LEANATTN_LAYOUT
    loader: str | None  # LEANATTN_LOADER
    head_pairs: str | None  # LEANATTN_HEAD_PAIRS
    mean: float
    scale_q: float
    poison: str | None  # None: keys that no query sees hold numbers like the others
    needles: int
    specials: tuple  # visible ones: "q nan", "k nan", "v nan", "v inf"

    @property
    def own_tokens(self):
        """The tokens that stand in the caches, in order, `[capacity]` or fewer."""
        return own_tokens(self.capacity, *(self.ranks or ()))[0]

    @property
    def max_length(self):
        """Tokens that a sequence can have."""
        return own_tokens(self.capacity, *(self.ranks or ()))[1]

    def keys(self, begin, end):
        """The range of keys in the caches that a range of tokens is."""
        return torch.searchsorted(self.own_tokens, torch.tensor([begin, end])).tolist()


def draw(seed, index, device="cpu"):
    """The case of this number."""
    rng = random.Random(f"{seed} {index} {device}")

    def likely(probability):
        return rng.random() < probability

    dtype = rng.choice(["fp32", "fp16", "bf16"] if device == "cpu" else ["fp16", "bf16"])
    group_size = rng.choice([1, 1, 2, 3, 4, 5, 7, 8, 8, 16, 17, 64, 71])
    heads_kv = rng.choice([1, 1, 2, 2, 3, 4, 8] if group_size < 64 else [1, 1, 2])
    dim = rng.choice([64, 64, 128, 128, 8 * rng.randint(1, 32)])
    dim_v = 8 * rng.randint(1, 32) if likely(0.25) else dim
    if likely(0.08):
        any_wide = (8 * rng.randint(1, 72), 8 * rng.randint(33, 64))
        dim, dim_v = rng.choice([(576, 512), (512, 512), any_wide])
    cache_dtype, scales = None, None
    if dtype != "fp32" and likely(0.3):
        cache_dtype, scales = rng.choice(list(FLOAT8)), rng.choice([None, "one", "heads", "batch"])
        dim, dim_v = -(-dim // 16) * 16, -(-dim_v // 16) * 16
    # Any others, drawn apart, so that no other case changes.
    dims_rng = random.Random(f"{seed} {index} head dims")
    if dims_rng.random() < 0.12:
        grain = 1 if device == "cpu" else 2 if cache_dtype is None else 4
        dim, dim_v = (grain * dims_rng.randint(1, 256 // grain) for _ in range(2))
    batch = 0 if likely(0.01) else rng.choice([1, 1, 2, 3, 3, 4, 5, 8, 30])

    ragged = likely(0.3)
    seqlen_q, offsets, total_q = None, None, batch
    if ragged:
        offsets, total_q = draw_offsets(rng, batch)
    elif likely(0.75):
        seqlen_q = 0 if likely(0.01) else rng.choice([1, 1, 2, 3, 4, rng.randint(1, 16)])
        total_q = batch * seqlen_q

    longest = min(
        CACHE_ELEMENTS // max(1, batch * heads_kv * max(dim, dim_v)),
        SCORES_TIMES_DIMS // max(1, total_q * group_size * heads_kv * (dim + dim_v)),
        3000,
    )
    capacity = draw_capacity(rng, max(4, longest))
    page_size, max_pages, num_pages, table = None, 0, 0, None
    if likely(0.5):
        page_size, max_pages, num_pages, table = draw_pages(rng, batch, capacity)
        capacity = max_pages * page_size if num_pages > 0 else 0

    causal = likely(0.7)
    window = likely(0.35)
    alibi = rng.choice(["heads", "batch"]) if likely(0.2) else None
    softmax_scale = rng.choice([0.0, -0.125, 0.3, 1.0, 3.0]) if likely(0.25) else None
    softcap = rng.choice([0.05, 2.0, 30.0, 20_000.0]) if likely(0.2) else 0.0
    scale_q = rng.choice([1.0, 1.0, 1.0, 0.3, 6.0])
    specials = tuple(kind for kind in ("q nan", "k nan", "v nan") if likely(0.05))
    sinks = rng.choice(["finite", "finite", "some -inf", "large"]) if likely(0.25) else None
    # An infinite value of a key whose weight is all but zero is inf or NaN as the weight underflows
    # or not, which differs from dtype to dtype.
    mild = alibi is None and softmax_scale is None and scale_q < 1 and sinks != "large"
    if mild and likely(0.3):
        specials += ("v inf",)
    packing, k_layout, v_layout = draw_cache_layouts(rng, device, dim, dim_v)
    if packing == "V in K" or cache_dtype is not None:
        # Nor is it said what an infinite key gives, and one float8 has no infinity.
        specials = tuple(kind for kind in specials if kind != "v inf")
    lengths = None if likely(0.08) else draw_lengths(rng, batch, capacity, page_size)
    # Rows can be appended where each has memory of its own.
    own_memory = packing != "V in K" and table in (None, "in order", "shuffled")
    own_memory = own_memory and k_layout.expanded is None and v_layout.expanded is None
    # Nor does append_kv write infinity to float8.
    infinities = ["inf", "-inf"] if cache_dtype is None else []
    appended = None
    if lengths and own_memory and likely(0.3):
        appended = tuple(rng.choice([0, 1, 1, 2, 5]) for _ in range(batch))
        if likely(0.5):
            appended = (rng.choice([1, 1, 3]),) * batch
    case = Case(
        seed=seed, index=index, device=device, op=rng.choice(OPS), dtype=dtype,
        cache_dtype=cache_dtype, scales=scales, batch=batch,
        heads=(group_size * heads_kv, heads_kv), dims=(dim, dim_v), seqlen_q=seqlen_q,
        offsets=offsets, total_q=total_q, capacity=capacity, ranks=None,
        lengths=lengths, appended=appended,
        page_size=page_size, max_pages=max_pages, num_pages=num_pages, table=table,
        table_strides=likely(0.3), packing=packing,
        q_layout=draw_layout(rng, device, 4 if seqlen_q is not None else 3),
        k_layout=k_layout, v_layout=v_layout,
        out_layout=draw_layout(rng, device, 4 if seqlen_q is not None else 3, expand=False),
        small_strides=likely(0.2), softmax_scale=softmax_scale, causal=causal,
        window_left=draw_window(rng, capacity) if window else -1,
        window_right=rng.choice([-1, 0]) if causal or not window else draw_window(rng, 12),
        softcap=softcap, alibi=alibi, slope=rng.choice([0.05, 0.05, -0.02, 30.0]),
        sinks=sinks,
        max_seqlen_q=rng.choice([1, 16, 1000]) if ragged and likely(0.5) else None,
        batch_invariant=likely(0.2), counters=likely(0.3),
        units=rng.choice([None, None, 1, 2, 3, 5, 16, 64, 1000]), layout=None,
        loader="cp_async" if device == "cuda" and likely(0.4) else None,
        head_pairs=rng.choice([None, "0", "1"]) if device == "cuda" else None,
        mean=rng.choice([0.0, 0.0, 0.5, 2.0]), scale_q=scale_q,
        poison=rng.choice(["nan", "nan", *infinities, None, None]),
        needles=rng.choice([0, 1, 2, 4, 8]), specials=specials,
    )  # fmt: skip
    if device == "cuda" and not ragged and likely(0.4):
        layouts = ["stream_k", "teams:1", "teams:2", "teams:5"]
        if not case.batch_invariant and max(case.dims) <= 256:
            layouts += ["clusters:2", "clusters:3", "clusters:8", "clusters:2*3", "clusters:4*4"]
        case = dataclasses.replace(case, units=None, layout=rng.choice(layouts))
    if likely(0.2):
        case = over_ranks(rng, case)
    return case


def over_ranks(rng, case):
    """The case with one rank's part of its tokens in the caches."""
    ranks = rng.choice([2, 2, 3, 4, 8])
    interleave = rng.choice([1, 2, 5, 16, 64, max(1, case.capacity), rng.randint(1, 300)])
    case = dataclasses.replace(case, ranks=(ranks, rng.randrange(ranks), interleave))
    if case.lengths is None:
        return case
    return dataclasses.replace(
        case, lengths=draw_lengths(rng, case.batch, case.max_length, case.page_size)
    )


def draw_offsets(rng, batch):
    """(cu_seqlens_q, total_q): right ones mostly, rows left over or entries gone bad sometimes."""
    offsets = [0]
    for _ in range(batch):
        offsets.append(offsets[-1] + rng.choice([0, 1, 1, 1, 2, 3, rng.randint(0, 16)]))
    total_q = offsets[-1]
    if rng.random() < 0.25:
        total_q += rng.randint(0, 4)
        for _ in range(rng.randint(1, 2)):
            junk = rng.choice([-5, INT32_MIN, INT32_MAX, rng.randint(0, total_q + 2)])
            offsets[rng.randint(0, batch)] = junk
    return tuple(offsets), total_q


def draw_capacity(rng, longest):
    """Often next to the edge of a tile, rarely nothing."""
    if rng.random() < 0.02:
        return 0
    edges = [1, *(edge for edge in TILE_EDGES if edge <= longest)]
    return rng.choice([rng.choice(edges), rng.randint(1, longest), min(longest, 300), longest])


def draw_pages(rng, batch, capacity):
    """(page_size, max_pages, num_pages, kind of table) for about this capacity."""
    page_size = rng.choice([1, 1, 2, 3, 5, 7, 8, 16, 16, 16, 24, 32, 64, 64, 100, 128, 256])
    max_pages = -(-capacity // page_size)
    table = rng.choice(
        ["in order", "shuffled", "shuffled", "shared prefix", "one row for all", "corrupted"]
    )
    num_pages = batch * max_pages + rng.randint(0, 3)
    if table in ("shared prefix", "corrupted"):
        num_pages = rng.randint(max(1, max_pages), max(1, max_pages, num_pages))
    if rng.random() < 0.02:
        num_pages = 0
    return page_size, max_pages, num_pages, table


def draw_lengths(rng, batch, capacity, page_size):
    """Ends, edges of tiles and pages, anything; beyond the capacity and negative sometimes."""
    edges = {0, 1, 2, capacity - 1, capacity, *TILE_EDGES}
    if page_size is not None:
        page = page_size * rng.randint(0, capacity // page_size)
        edges |= {page - 1, page, page + 1}
    edges = sorted(edge for edge in edges if 0 <= edge <= capacity)
    lengths = []
    for _ in range(batch):
        kind = rng.random()
        if kind < 0.35:
            lengths.append(rng.choice(edges))
        elif kind < 0.5:
            lengths.append(capacity)
        elif kind < 0.9:
            lengths.append(rng.randint(0, capacity))
        else:
            beyond = [capacity + 1, capacity + 100, INT32_MAX, -1, INT32_MIN]
            lengths.append(rng.choice(beyond))
    return tuple(lengths)


def draw_window(rng, size):
    near = [0, 1, 2, 15, 16, 63, 64, 65, 127, 128, 129, rng.randint(0, max(1, size))]
    return rng.choice([*near, *near, 2**31 - 1, 2**31, 2**63 - 1, -1])


def draw_layout(rng, device, dims, expand=True):
    """Contiguous one time in three. On CUDA rows stay multiples of 16 bytes and whole."""
    leading = dims - 1
    plain = Layout(tuple(range(leading)), (0,) * dims, (0,) * dims, (1,) * dims, None, None)
    if rng.random() < 0.33:
        return plain
    unit = 8 if device == "cuda" else 1
    padding = [[rng.choice([0, 0, 1, 3]) for _ in range(leading)] for _ in range(2)]
    columns = [unit * rng.choice([0, 0, 1, 3]) for _ in range(2)]
    step = [rng.choice([1, 1, 1, 2]) for _ in range(leading)]
    step.append(2 if device == "cpu" and rng.random() < 0.1 else 1)
    return Layout(
        order=tuple(rng.sample(range(leading), leading)),
        before=(*padding[0], columns[0]), after=(*padding[1], columns[1]), step=tuple(step),
        expanded=rng.randrange(leading) if expand and rng.random() < 0.15 else None,
        junk_stride=rng.choice(JUNK_STRIDES) if rng.random() < 0.4 else None,
    )  # fmt: skip


def draw_cache_layouts(rng, device, dim, dim_v):
    """(packing, layout of K, layout of V)"""
    packing = rng.choice(["separate"] * 4 + ["one row"])
    if dim == dim_v:
        packing = rng.choice([packing, packing, "neighbour heads", "heads in turn"])
    if dim_v <= dim and rng.random() < (0.06 if dim <= 256 else 0.5):
        packing = "V in K"
    k_layout = draw_layout(rng, device, 4, expand=packing == "separate")
    v_layout = draw_layout(rng, device, 4) if rng.random() < 0.5 else k_layout
    return packing, k_layout, v_layout


class Memory:
    """A tensor in its layout: `view` is what the op gets, `written` the same without stride 0."""

    def __init__(self, shape, layout, dtype, filler):
        stored = [1 if dim == layout.expanded else size for dim, size in enumerate(shape)]
        # A dimension of size 0 stays so: there is nothing that a stride of 0 could repeat.
        stored = [min(size, one) for size, one in zip(shape, stored)]
        order = (*layout.order, len(shape) - 1)
        sizes = [layout.before[d] + stored[d] * layout.step[d] + layout.after[d] for d in order]
        memory = torch.full(sizes, filler, dtype=dtype)
        for axis, d in enumerate(order):
            part = slice(layout.before[d], layout.before[d] + stored[d] * layout.step[d],
                         layout.step[d])  # fmt: skip
            memory = memory[(slice(None),) * axis + (part,)]
        self.written = memory.permute([order.index(d) for d in range(len(shape))])
        self.view = with_junk_strides(self.written.expand(shape), layout.junk_stride)


def with_junk_strides(tensor, junk):
    """The tensor with another stride in its dimensions of size 1, where it means nothing."""
    if junk is None or tensor.shape[-1] == 1:
        return tensor
    strides = [junk if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride())]
    return tensor.as_strided(tensor.shape, strides, tensor.storage_offset())


def cache_type(case):
    return FLOAT8.get(case.cache_dtype, DTYPES[case.dtype])


def build(case):
    """The arguments of the op as tensors on the CPU, but for `counters`."""
    return Builder(case).arguments


def dense(arguments):
    """The arguments that `reference` takes: no pages, and nothing that changes no result."""
    arguments = dict(arguments)
    block_table = arguments.pop("block_table", None)
    for name in ("max_seqlen_q", "batch_invariant", "counters"):
        arguments.pop(name, None)
    if block_table is not None:
        for name in ("k_cache", "v_cache"):
            arguments[name] = gather_pages(arguments[name], block_table)
    return arguments


def token_places(case, block_table, sequence, tokens):
    """Indices into the first two dimensions of the caches, for tokens `[n]` of a sequence."""
    if case.page_size is None:
        return torch.full_like(tokens, sequence), tokens
    pages = block_table[sequence, tokens // case.page_size].long()
    return pages.clamp(0, case.num_pages - 1), tokens % case.page_size


def take_back_last_rows(case, inputs, arguments):
    """Erases the last tokens of each sequence from the caches in `arguments`, copies of those in
    `inputs`, and returns the arguments of append_kv that bring them back.

    A full sequence gets two rows more, which lie beyond the capacity and must not be written.
    """
    table = inputs.get("block_table")
    lengths = clamped_lengths(inputs["cache_seqlens"], case.batch, case.max_length)
    before, rows = [], {"k": [], "v": []}
    for sequence, (length, count) in enumerate(zip(lengths, case.appended)):
        count = min(count, length)
        before.append(length - count)
        begin, end = case.keys(length - count, length)
        places = token_places(case, table, sequence, torch.arange(begin, end))
        # Tokens of other ranks are not written, nor are those beyond.
        beyond = 2 if length == case.max_length else 0
        own = case.own_tokens[begin:end] - (length - count)
        for name in rows:
            cache = inputs[f"{name}_cache"]
            taken = cache[places]
            if case.cache_dtype is not None:
                taken = scaled(taken.float(), inputs.get(f"{name}_scale"), sequence)
            appended = torch.full((count + beyond, *taken.shape[1:]), 9.0, dtype=inputs["q"].dtype)
            appended[own] = taken.to(appended.dtype)
            rows[name].append(appended)
            erased = as_numbers(arguments[f"{name}_cache"])
            five = as_numbers(torch.full((1,), 5.0, dtype=cache.dtype)).to(erased.device)
            erased[tuple(index.to(erased.device) for index in places)] = five
    counts = [len(part) for part in rows["k"]]
    names = ("k_scale", "v_scale", *CONTEXT_PARALLEL)
    options = {name: arguments[name] for name in names if name in arguments}
    if len(set(counts)) == 1:
        k, v = (torch.stack(rows[name]) for name in "kv")
    else:
        no_rows = [inputs["q"].new_empty(0, *inputs[f"{name}_cache"].shape[2:]) for name in "kv"]
        k, v = (torch.cat([empty, *rows[name]]) for empty, name in zip(no_rows, "kv"))
        offsets = torch.tensor([0, *counts]).cumsum(0).int()
        options["cu_seqlens"] = offsets.to(arguments["k_cache"].device)
    before = torch.tensor(before, dtype=torch.int32, device=arguments["k_cache"].device)
    return dict(
        k=k.to(before.device), v=v.to(before.device), k_cache=arguments["k_cache"],
        v_cache=arguments["v_cache"], cache_seqlens=before,
        block_table=arguments.get("block_table"), **options,
    )  # fmt: skip


class Builder:
    """Fills the tensors of a case, in the order of its methods."""

    def __init__(self, case):
        self.case = case
        self.rng = random.Random(f"{case.seed} {case.index} values")
        self.generator = torch.Generator().manual_seed(self.rng.getrandbits(62))
        self.filler = POISONS.get(case.poison, 3.0)
        self.arguments = {}
        self.make_small_tensors()
        self.make_options()
        self.make_q()
        self.make_caches()
        self.find_visible_keys()
        for _ in range(case.needles):
            self.plant_needle()
        for kind in case.specials:
            self.plant_special(kind)
        if case.poison is not None:
            self.poison_unseen_keys()

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator) + self.case.mean

    def small(self, tensor):
        """A vector or matrix, every third column of a wider one where the case says so."""
        if not self.case.small_strides:
            return tensor
        wide = torch.full((*tensor.shape, 3), 99, dtype=tensor.dtype)
        wide[..., 1] = tensor
        return wide[..., 1]

    def make_small_tensors(self):
        case, heads_q = self.case, self.case.heads[0]
        if case.lengths is not None:
            lengths = torch.tensor(case.lengths, dtype=torch.int32)
            self.arguments["cache_seqlens"] = self.small(lengths)
        if case.offsets is not None:
            offsets = torch.tensor(case.offsets, dtype=torch.int32)
            self.arguments["cu_seqlens_q"] = self.small(offsets)
        if case.alibi is not None:
            shape = (heads_q,) if case.alibi == "heads" else (case.batch, heads_q)
            slopes = case.slope * torch.rand(shape, generator=self.generator)
            self.arguments["alibi_slopes"] = self.small(slopes)
        if case.sinks is not None:
            sinks = 2 + torch.randn(heads_q, generator=self.generator)
            sinks *= 30 if case.sinks == "large" else 1
            if case.sinks == "some -inf":
                sinks[::2] = -math.inf
            self.arguments["sinks"] = self.small(sinks)
        for name in ("k_scale", "v_scale") if case.scales is not None else ():
            shape = {"one": (1,), "heads": case.heads[1:], "batch": (case.batch, case.heads[1])}
            scale = 0.5 + torch.rand(shape[case.scales], generator=self.generator)
            self.arguments[name] = self.small(scale)
        if case.page_size is not None:
            self.arguments["block_table"] = self.make_table()

    def make_table(self):
        """[B, max_pages]; what a row holds behind its last page is junk."""
        case = self.case
        max_pages = case.max_pages
        ids = list(range(case.num_pages))
        if case.table != "in order":
            self.rng.shuffle(ids)
        table = torch.zeros(case.batch, max_pages, dtype=torch.int32)
        lengths = [case.max_length] * case.batch if case.lengths is None else case.lengths
        for sequence, length in enumerate(lengths):
            _, used = case.keys(0, min(max(length, 0), case.max_length))
            used = -(-used // case.page_size)
            if case.table in ("in order", "shuffled"):
                row = ids[sequence * max_pages : sequence * max_pages + used]
            elif case.table == "one row for all":
                row = ids[:max_pages]
            else:
                shared = self.rng.randint(0, used)
                row = ids[:shared] + self.rng.choices(ids, k=used - shared)
            if case.table == "corrupted":
                for entry in range(len(row)):
                    if self.rng.random() < 0.3:
                        row[entry] = self.rng.choice([*JUNK_PAGES, case.num_pages])
            junk = self.rng.choices([*JUNK_PAGES, case.num_pages, 0], k=max_pages - len(row))
            table[sequence] = torch.tensor(row + junk, dtype=torch.int32)
        if case.table == "one row for all" and case.batch > 0:
            return table[:1].expand(case.batch, max_pages)
        if case.table_strides:
            wide = torch.full((2 * case.batch, max_pages + 3), 2147480000, dtype=torch.int32)
            wide[::2, 1 : 1 + max_pages] = table
            return wide[::2, 1 : 1 + max_pages]
        return table

    def make_options(self):
        case = self.case
        for name, default in (
            ("softmax_scale", None), ("causal", True), ("window_left", -1), ("window_right", -1),
            ("softcap", 0.0), ("max_seqlen_q", None), ("batch_invariant", False),
        ):  # fmt: skip
            if getattr(case, name) != default:
                self.arguments[name] = getattr(case, name)
        if case.ranks is not None:
            self.arguments.update(zip(CONTEXT_PARALLEL, case.ranks))

    def make_q(self):
        case = self.case
        leading = (case.total_q,) if case.seqlen_q is None else (case.batch, case.seqlen_q)
        q = Memory((*leading, case.heads[0], case.dims[0]), case.q_layout, DTYPES[case.dtype],
                   self.filler)  # fmt: skip
        q.written.copy_(case.scale_q * self.normal(*q.written.shape))
        self.arguments["q"] = q.view

    def make_caches(self):
        """[B, S, Hkv, D] or [num_pages, page_size, Hkv, D] in memory of their own or in one."""
        case = self.case
        heads_kv, (dim, dim_v), packing = case.heads[1], case.dims, case.packing
        leading = (case.batch, case.capacity)
        if case.page_size is not None:
            leading = (case.num_pages, case.page_size)

        def memory(heads, width, layout):
            shape = (*leading, heads, width)
            filled = Memory(shape, layout, cache_type(case), self.filler)
            filled.written.copy_(self.normal(*filled.written.shape))
            return filled

        def parts(k_index, v_index):
            k = both.view[k_index], both.written[k_index]
            return k, (both.view[v_index], both.written[v_index])

        every = slice(None)
        if packing == "separate":
            k, v = memory(heads_kv, dim, case.k_layout), memory(heads_kv, dim_v, case.v_layout)
            k, v = (k.view, k.written), (v.view, v.written)
        elif packing == "one row":
            both = memory(heads_kv, dim + dim_v, case.k_layout)
            k, v = parts((..., slice(0, dim)), (..., slice(dim, None)))
        elif packing == "neighbour heads":
            both = memory(2 * heads_kv, dim, case.k_layout)
            k, v = parts((every, every, slice(0, heads_kv)), (every, every, slice(heads_kv, None)))
        elif packing == "heads in turn":
            both = memory(2 * heads_kv, dim, case.k_layout)
            k, v = parts((every, every, slice(0, None, 2)), (every, every, slice(1, None, 2)))
        else:
            both = memory(heads_kv, dim, case.k_layout)
            k, v = parts((...,), (..., slice(0, dim_v)))
        self.arguments["k_cache"], self.k_written = k
        self.arguments["v_cache"], self.v_written = v

    def find_visible_keys(self):
        """Rows that see a key: self.sights, (sequence, row of q, keys begin..end) of each."""
        case = self.case
        lengths = clamped_lengths(self.arguments.get("cache_seqlens"), case.batch, case.max_length)
        ends = torch.searchsorted(case.own_tokens, torch.arange(case.max_length + 1)).tolist()
        self.lengths = [ends[length] for length in lengths]  # in keys
        ranges = query_ranges(self.arguments["q"], case.batch, self.arguments.get("cu_seqlens_q"))
        self.sights = []
        for sequence, (length, (row_begin, row_end)) in enumerate(zip(lengths, ranges)):
            for row in range(row_begin, row_end):
                begin, end = visible_range(
                    length, row_end - row_begin, row - row_begin, case.causal, case.window_left,
                    case.window_right,
                )  # fmt: skip
                begin, end = ends[begin], ends[end]
                if begin < end:
                    self.sights.append((sequence, row, begin, end))

    def place(self, sequence, token):
        """Where a token lies in the first two dimensions of the caches."""
        table = self.arguments.get("block_table")
        places = token_places(self.case, table, sequence, torch.tensor([token]))
        return tuple(int(index) for index in places)

    def boundary_token(self, begin, end, length):
        """A token at an edge of what a row sees, of a tile or of a page; inside or just outside."""
        edges = [begin, begin, end - 1, end - 1, begin - 1, end, length - 1]
        edges += [edge for edge in TILE_EDGES if begin <= edge < end]
        if self.case.page_size is not None:
            page = begin + self.rng.randrange(end - begin)
            page -= page % self.case.page_size
            edges += [page - 1, page]
        token = self.rng.choice(edges)
        return min(max(token, 0), length - 1)

    def plant_needle(self):
        """A key with about half of the weight of one row of q, its value unlike the others."""
        if not self.sights:
            return
        case = self.case
        sequence, row, begin, end = self.rng.choice(self.sights)
        place = self.place(sequence, self.boundary_token(begin, end, self.lengths[sequence]))
        head = self.rng.randrange(case.heads[0])
        q = self.arguments["q"]
        q = (q if q.dim() == 3 else q.flatten(0, 1))[row, head].float()
        scale = case.dims[0] ** -0.5 if case.softmax_scale is None else case.softmax_scale
        strength = scale * float(q @ q)
        if abs(strength) < 1e-3:
            return
        head //= case.heads[0] // case.heads[1]
        needle = q * (math.log(end - begin + 1) + case.mean**2) / strength
        self.arguments["k_cache"][(*place, head)] = needle.clamp(-100, 100)
        if case.packing != "V in K":
            value = torch.arange(case.dims[1]) % 7 - 4.5
            self.arguments["v_cache"][(*place, head)] = value

    def plant_special(self, kind):
        if not self.sights:
            return
        sequence, row, begin, end = self.rng.choice(self.sights)
        name, value = kind.split()
        if name == "q":
            q = self.arguments["q"]
            place = (row,) if q.dim() == 3 else divmod(row, q.shape[1])
            q[(*place, self.rng.randrange(q.shape[-2]), self.rng.randrange(q.shape[-1]))] = math.nan
            return
        cache = self.arguments[f"{name}_cache"]
        place = self.place(sequence, self.boundary_token(begin, end, self.lengths[sequence]))
        head, column = (self.rng.randrange(size) for size in cache.shape[2:])
        infinity = -math.inf if self.rng.random() < 0.5 else math.inf
        cache[(*place, head, column)] = math.nan if value == "nan" else infinity

    def poison_unseen_keys(self):
        seen = torch.zeros(self.arguments["k_cache"].shape[:2], dtype=torch.bool)
        table = self.arguments.get("block_table")
        for sequence, _, begin, end in self.sights:
            seen[token_places(self.case, table, sequence, torch.arange(begin, end))] = True
        for written in (self.k_written, self.v_written):
            unseen = ~seen
            for dim in (0, 1):
                if written.shape[dim] != seen.shape[dim]:
                    unseen = unseen.all(dim, keepdim=True)
            filler = torch.full((1,), self.filler, dtype=written.dtype)
            as_numbers(written)[unseen] = as_numbers(filler)
        self.poison_unused_queries()

    def poison_unused_queries(self):
        """Rows of q that see no key or belong to no sequence: what they hold does not matter."""
        if self.case.q_layout.expanded is not None:
            return
        unused = torch.ones(self.case.total_q, dtype=torch.bool)
        unused[[row for _, row, _, _ in self.sights]] = False
        q = self.arguments["q"]
        q[unused.view(q.shape[:-2])] = self.filler
