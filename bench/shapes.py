"""What is measured: sets of shapes, each a list that is the same in every run. No torch here."""

import random
import zlib
from dataclasses import dataclass, replace
from typing import Optional

ELEMENT_BYTES = 2  # fp16 and bf16: of q, and of caches that are not float8
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Shape:
    """One batch of decoding. `layout` names the order in memory of a contiguous cache: bshd is
    `[B, S, Hkv, D]`, bhsd is `[B, Hkv, S, D]`; a paged one is `[num_pages, page_size, Hkv, D]`. Of
    multi-head latent attention, the values are the first `latent_dim` columns of the keys."""

    heads_q: int
    heads_kv: int
    head_dim: int
    lengths: tuple  # tokens of each sequence
    name: str
    seqlen_q: int = 1
    layout: str = "bshd"
    page_size: Optional[int] = None
    latent_dim: Optional[int] = None
    is_float8: bool = False
    room: Optional[int] = None  # tokens that a sequence has room for; None: the longest's
    window: Optional[int] = None  # keys that a query sees at most, its own among them
    softcap: float = 0.0
    has_sinks: bool = False
    has_alibi: bool = False
    has_query_offsets: bool = False  # queries one sequence after the other, with cu_seqlens_q

    @property
    def head_dim_v(self):
        return self.latent_dim or self.head_dim

    @property
    def cache_bytes(self):
        """Of an element of the caches."""
        return 1 if self.is_float8 else ELEMENT_BYTES

    @property
    def num_caches(self):
        """In memory: K and V, or K with V in it."""
        return 1 if self.latent_dim else 2

    @property
    def batch(self):
        return len(self.lengths)

    @property
    def group_size(self):
        return self.heads_q // self.heads_kv

    @property
    def longest(self):
        return max(self.lengths)

    @property
    def capacity(self):
        """Tokens that a sequence has room for."""
        return self.room or self.longest

    @property
    def is_ragged(self):
        return min(self.lengths) != self.longest

    @property
    def is_full(self):
        """Whether every sequence fills its cache, so that a call can do without lengths."""
        return not (self.page_size or self.is_ragged or self.room)

    @property
    def features(self):
        """What there is beyond plain causal attention, by names for messages."""
        given = {
            "a window": self.window,
            "softcap": self.softcap,
            "sinks": self.has_sinks,
            "ALiBi": self.has_alibi,
        }
        return {name for name, value in given.items() if value}

    @property
    def context_ratio(self):
        """The batch-context ratio of LeanAttention (arXiv 2405.10480): average over maximum."""
        return sum(self.lengths) / self.batch / self.longest

    @property
    def has_rows_floor(self):
        """Whether `read_rows_floor` reads these caches: it takes V of K's head dim, of 16 bits."""
        return not (self.latent_dim or self.is_float8)

    @property
    def has_short_rows(self):
        """Whether a head's tokens lie apart in rows of 128 bytes or less, which cost more to read
        than the same bytes in the order of memory."""
        short = self.heads_kv > 1 and self.head_dim * ELEMENT_BYTES <= 128
        whole = self.is_full and self.window is None
        return self.has_rows_floor and whole and short and self.layout == "bshd"

    @property
    def pages(self):
        """Pages that hold the tokens, of all sequences."""
        return sum(-(-length // self.page_size) for length in self.lengths)

    @property
    def visible_elements(self):
        """Elements of the K rows that the queries see; as many of V's."""
        tokens = sum(self.lengths)
        if self.window:
            tokens = sum(min(length, self.window + self.seqlen_q - 1) for length in self.lengths)
        return tokens * self.heads_kv * self.head_dim

    @property
    def visible_bytes(self):
        """Bytes of the K and V rows that the queries see, each once."""
        return self.num_caches * self.cache_bytes * self.visible_elements

    @property
    def cache_elements(self):
        """Elements that the K cache is allocated with; as many for V if it is apart."""
        rows = self.pages * self.page_size if self.page_size else self.batch * self.longest
        return rows * self.heads_kv * self.head_dim

    @property
    def overhang(self):
        """Elements of a contiguous cache beyond those that it is allocated with. Room behind the
        longest sequence is never read, so it lies over the next sequence's tokens, and the last
        one's over whatever follows: a large capacity costs no memory."""
        rows = 0 if self.page_size else self.capacity - self.longest
        return rows * self.heads_kv * self.head_dim

    @property
    def query_elements(self):
        return self.batch * self.seqlen_q * self.heads_q * self.head_dim


def uniform(batch, heads_q, heads_kv, head_dim, tokens, layout="bshd", seqlen_q=1):
    """Sequences of one length that fill a contiguous cache."""
    name = f"b{batch} {heads_q}/{heads_kv} D{head_dim} s{tokens}"
    name += f" q{seqlen_q}" * (seqlen_q > 1) + f" {layout}"
    lengths = (tokens,) * batch
    return Shape(heads_q, heads_kv, head_dim, lengths, name, seqlen_q, layout)


def in_pages(shape, page_size):
    name = f"{shape.name.removesuffix(' bshd')} page {page_size}"
    return replace(shape, page_size=page_size, name=name)


def with_room(shape, factor):
    """Cache or block table `factor` times as long as the longest sequence."""
    return replace(shape, room=factor * shape.longest, name=f"{shape.name} room x{factor}")


def padded(shape, batch):
    """Filled up to `batch` sequences with empty ones, as servers do that capture few batches."""
    lengths = (*shape.lengths, *[0] * (batch - shape.batch))
    return replace(shape, lengths=lengths, name=f"{shape.name} padded to b{batch}")


def masked(shape):
    """`shape` with each of the options that a plain decode does without."""
    return [
        replace(shape, name=f"{shape.name} {name}", **options)
        for name, options in (
            (f"window {shape.longest // 2}", dict(window=shape.longest // 2)),
            ("softcap", dict(softcap=30.0)),
            ("sinks", dict(has_sinks=True)),
            ("ALiBi", dict(has_alibi=True)),
            ("q4", dict(seqlen_q=4)),
            ("cu_seqlens_q", dict(has_query_offsets=True)),
        )
    ]


def with_ratio(batch, longest, ratio):
    """Lengths of which one is `longest` and whose average is `ratio` times that, the others spread
    evenly around their mean, in a random order that is the same in every run."""
    mean = (ratio * longest * batch - longest) / (batch - 1)
    assert 1 <= mean <= longest, f"one of {batch} sequences alone exceeds the ratio {ratio}"
    reach = 0.9 * min(mean - 1, longest - mean)
    steps = [(2 * i + 1) / (batch - 1) - 1 for i in range(batch - 1)]  # -1 to 1, around 0
    lengths = [longest] + [round(mean + reach * step) for step in steps]
    _shuffle(lengths)
    return tuple(lengths)


def one_long(batch, longest, others):
    lengths = [longest] + [others] * (batch - 1)
    _shuffle(lengths)
    return tuple(lengths)


def between(batch, shortest, longest):
    """Lengths drawn evenly, the same in every run, the last one `longest`."""
    draw = _random(batch, shortest, longest)
    return (*(draw.randint(shortest, longest) for _ in range(batch - 1)), longest)


def _shuffle(lengths):
    _random(*lengths[:64], len(lengths)).shuffle(lengths)


def _random(*numbers):
    return random.Random(zlib.crc32(repr(numbers).encode()))


def seed():
    """The grid of ONNX Runtime's benchmark of its Lean Attention kernel, up to 8 GiB."""
    shapes = [
        uniform(batch, heads, heads, head_dim, 512 << i, "bhsd")
        for heads, head_dim in ((16, 64), (32, 128))
        for batch in (1, 4, 16)
        for i in range(8)
    ]
    return [shape for shape in shapes if shape.visible_bytes <= 8 * GIB]


def gqa():
    """Heads as models have them (Llama 3, Phi-3 medium, Qwen2, Falcon, Gemma, gpt-oss), and counts
    that leave processors idle under fixed splits (56, 128)."""
    return [
        *(uniform(1, 32, 8, 128, n) for n in (1024, 4096, 16384, 65536, 131072, 524288)),
        *(uniform(1, 32, 8, 128, n, "bhsd") for n in (4096, 32768)),
        *(uniform(4, 32, 8, 128, n) for n in (1024, 8192, 32768)),
        *(uniform(8, 32, 8, 128, n) for n in (2048, 16384)),
        *(uniform(16, 32, 8, 128, 4096, layout) for layout in ("bshd", "bhsd")),
        *(uniform(32, 32, 8, 128, n) for n in (1024, 8192)),
        uniform(64, 32, 8, 128, 2048),
        *(uniform(128, 32, 8, 128, n) for n in (1024, 4096)),
        *(uniform(256, 32, 8, 128, n) for n in (1024, 2048)),
        *(uniform(b, 40, 10, 128, n) for b, n in ((1, 4096), (1, 32768), (8, 8192), (32, 4096))),
        *(uniform(b, 28, 4, 128, n) for b, n in ((1, 4096), (1, 131072), (8, 8192), (128, 2048))),
        *(uniform(b, 64, 8, 128, n) for b, n in ((1, 8192), (1, 131072), (8, 8192), (64, 2048))),
        *(uniform(b, 128, 8, 128, n) for b, n in ((1, 16384), (16, 8192))),
        *(uniform(b, 71, 1, 64, n) for b, n in ((1, 8192), (16, 2048), (64, 8192))),
        uniform(8, 64, 1, 128, 16384),
        uniform(8, 32, 2, 128, 8192),
        uniform(1, 32, 8, 64, 4096),
        *(uniform(8, 32, 8, 64, 4096, layout) for layout in ("bshd", "bhsd")),
        *(uniform(32, 32, 8, 64, 8192, layout) for layout in ("bshd", "bhsd")),
        *(uniform(b, 64, 8, 64, n) for b, n in ((1, 8192), (16, 8192), (64, 4096))),
        uniform(4, 16, 16, 64, 8192),
        *(uniform(b, 16, 8, 256, n) for b, n in ((1, 4096), (1, 32768), (8, 8192), (32, 4096))),
        *(uniform(b, 8, 1, 256, n) for b, n in ((1, 8192), (16, 8192))),
        *(uniform(b, 56, 56, 128, n) for b, n in ((1, 8192), (1, 65536), (4, 8192))),
        *(uniform(1, 128, 128, 128, n, "bhsd") for n in (4096, 32768)),
        *(uniform(1, heads, heads, 64, 16384, "bhsd") for heads in (56, 128)),
        *(uniform(b, 32, 32, 128, 4096) for b in (1, 8)),
    ]


RATIOS = (0.1, 0.25, 0.5, 0.75, 1.0)


def ragged():
    """LeanAttention's sweep of the batch-context ratio, mixes of one long with many short
    sequences, and batches of many short ones."""
    shapes = []
    for heads_kv, batch, longest in (
        (8, 4, 65536), (8, 16, 65536), (8, 32, 32768), (8, 128, 8192),
        (32, 4, 16384), (32, 16, 16384), (32, 128, 4096),
    ):  # fmt: skip
        for ratio in RATIOS:
            if ratio * batch < 1.2:  # the longest alone makes up more than that
                continue
            name = f"b{batch} 32/{heads_kv} D128 to {longest} ratio {ratio:.2f}"
            shapes.append(Shape(32, heads_kv, 128, with_ratio(batch, longest, ratio), name))
    for batch, longest, others in ((8, 131072, 1024), (16, 65536, 512), (32, 131072, 1024),
                                   (64, 32768, 2048)):  # fmt: skip
        name = f"b{batch} 32/8 D128 one {longest} others {others}"
        shapes.append(Shape(32, 8, 128, one_long(batch, longest, others), name))
    for batch, shortest, longest in ((1024, 1, 256), (2048, 32, 96), (4096, 1, 128)):
        name = f"b{batch} 32/8 D128 {shortest} to {longest}"
        shapes.append(Shape(32, 8, 128, between(batch, shortest, longest), name))
    shapes.append(uniform(4096, 32, 8, 128, 16))
    return shapes


def paged():
    """Pages that lie anywhere in their pool, from single tokens to 256."""
    batches = {"b1 s32768": (32768,), "b16 s4096": (4096,) * 16,
               "b32 100 to 16384": between(32, 100, 16384)}  # fmt: skip
    return [
        Shape(32, heads_kv, 128, lengths, page_size=page_size,
              name=f"{batch.replace(' ', f' 32/{heads_kv} D128 ', 1)} page {page_size}")
        for heads_kv in (8, 32)
        for batch, lengths in batches.items()
        for page_size in (1, 8, 16, 64, 256)
    ]  # fmt: skip


def spec():
    """Several queries a sequence, as speculative decoding has them."""
    batches = ((1, 32, 8, 8192), (16, 32, 8, 4096), (64, 32, 8, 2048), (8, 64, 8, 8192),
               (4, 32, 32, 4096))  # fmt: skip
    return [
        uniform(batch, heads_q, heads_kv, 128, tokens, seqlen_q=seqlen_q)
        for batch, heads_q, heads_kv, tokens in batches
        for seqlen_q in (1, 2, 4, 8, 16)
    ]


def latent():
    """Multi-head latent attention as DeepSeek's models have it: all 128 heads, or a GPU's part."""
    shapes = [
        Shape(heads, 1, 576, (tokens,) * batch, latent_dim=512, page_size=page_size,
              name=f"b{batch} {heads}/1 D576/512 s{tokens}"
              + (f" page {page_size}" if page_size else ""))
        for heads in (16, 64, 128)
        for batch, tokens, page_size in ((1, 4096, None), (1, 8192, None), (1, 131072, None),
                                         (16, 8192, None), (16, 8192, 64), (16, 8192, 16),
                                         (64, 4096, 64), (128, 4096, 64), (64, 32768, 64))
    ]  # fmt: skip
    lengths = between(64, 100, 16384)
    name = "b64 16/1 D576/512 100 to 16384 page 64"
    return [*shapes, Shape(16, 1, 576, lengths, name, page_size=64, latent_dim=512)]


def float8():
    """Caches of half the bytes."""
    shapes = [
        uniform(1, 32, 8, 128, 4096),
        uniform(1, 32, 8, 128, 65536),
        uniform(16, 32, 8, 128, 4096),
        uniform(16, 32, 32, 128, 4096),
        uniform(8, 64, 8, 128, 16384),
        uniform(64, 32, 8, 128, 2048, seqlen_q=4),
        uniform(16, 16, 8, 256, 8192),
        Shape(32, 8, 128, between(32, 100, 16384), "b32 32/8 D128 100 to 16384 page 16",
              page_size=16),
    ]  # fmt: skip
    return [replace(shape, is_float8=True, name=f"{shape.name} float8") for shape in shapes]


def versions():
    """The few shapes by which versions of the kernel are compared: bench/VERSIONS.md."""
    return [
        *(uniform(1, 16, 16, 64, n, "bhsd") for n in (512, 4096)),
        *(uniform(1, 32, 32, 128, n, "bhsd") for n in (512, 2048, 8192)),
        *(uniform(1, 32, 8, 128, n) for n in (1024, 4096, 32768)),
        uniform(16, 32, 8, 128, 4096),
        *(uniform(16, 32, 32, 128, n, "bhsd") for n in (512, 8192)),
        uniform(4, 16, 16, 64, 8192),
        uniform(8, 8, 8, 256, 4096),
        uniform(8, 64, 1, 128, 16384),
        uniform(8, 32, 2, 128, 8192),
    ]


def _served():
    """What servers call most: a few heads, batches and contexts, without a cache's oddities."""
    return [
        *(uniform(1, 32, 8, 128, n) for n in (1024, 8192)),
        uniform(8, 32, 8, 128, 4096),
        uniform(32, 32, 8, 128, 2048),
        uniform(1, 32, 32, 128, 2048),
        uniform(16, 40, 10, 128, 4096),
    ]


def model():
    """The shapes by which a decode inside a model is judged: bench/in_model.py."""
    ragged = {"b8 32/8 D128 100 to 4096": between(8, 100, 4096),
              "b32 32/8 D128 100 to 8192": between(32, 100, 8192)}  # fmt: skip
    return [
        *_served(),
        uniform(1, 16, 16, 64, 4096, "bhsd"),
        uniform(1, 16, 8, 256, 8192),
        uniform(1, 28, 4, 128, 131072),
        uniform(64, 8, 1, 128, 4096),
        uniform(128, 32, 8, 128, 1024),
        Shape(32, 8, 128, one_long(32, 32768, 512), "b32 32/8 D128 one 32768 others 512"),
        Shape(32, 8, 128, between(8, 1024, 65536), "b8 32/8 D128 1024 to 65536"),
        in_pages(uniform(8, 32, 8, 128, 4096), 16),
        *(in_pages(Shape(32, 8, 128, lengths, name), page_size)
          for name, lengths in ragged.items() for page_size in (16, 64)),
    ]  # fmt: skip


def capacity():
    """Tables and caches that are longer than what stands in them: each shape without room to
    spare, then 8 and 32 times as long; and a batch that is filled up with empty sequences."""
    alike = [uniform(1, 32, 8, 128, 8192), uniform(8, 32, 8, 128, 4096),
             uniform(32, 32, 8, 128, 2048), uniform(16, 40, 10, 128, 4096)]  # fmt: skip
    varied = [
        Shape(32, 8, 128, between(b, round(0.9 * n), n), f"b{b} 32/8 D128 {round(0.9 * n)} to {n}")
        for b, n in ((8, 4096), (32, 2048))
    ]
    roomy = [*alike, in_pages(alike[1], 16), in_pages(alike[2], 64),
             *varied, *(in_pages(shape, 16) for shape in varied)]  # fmt: skip
    odd = uniform(17, 32, 8, 128, 2048)
    return [
        *(s for shape in roomy for s in (shape, with_room(shape, 8), with_room(shape, 32))),
        *(s for shape in (odd, in_pages(odd, 16))
          for s in (shape, padded(shape, 24), with_room(padded(shape, 24), 8))),
    ]  # fmt: skip


def general():
    """Windows, softcap, sinks, ALiBi, four queries a sequence and ragged queries, each alone."""
    return [s for shape in _served() for s in masked(shape)]


def long():
    """One sequence of half a million tokens and more."""
    tokens = (1 << 19, 1 << 20, 1 << 22)
    return [uniform(1, *heads, 128, n) for heads in ((32, 8), (8, 1)) for n in tokens]


def tiny():
    """A few KiB of each kind, to try the bench itself where there is no GPU."""
    ragged = Shape(4, 2, 64, (5, 96, 40), "b3 4/2 D64 5 to 96")
    return [
        uniform(2, 4, 4, 64, 96, "bhsd"),
        uniform(2, 4, 2, 64, 96),
        uniform(1, 4, 2, 64, 96, seqlen_q=2),
        ragged,
        in_pages(ragged, 16),
        Shape(4, 1, 576, (96, 40), "b2 4/1 D576/512 40 to 96", latent_dim=512),
        Shape(4, 2, 64, (96, 40), "b2 4/2 D64 40 to 96 float8", is_float8=True),
        *(with_room(uniform(2, 4, 2, 64, 96, layout), 8) for layout in ("bshd", "bhsd")),
        *(with_room(padded(shape, 5), 2) for shape in (ragged, in_pages(ragged, 16))),
        *masked(uniform(2, 4, 2, 64, 64)),
    ]


MAIN_SETS = {"seed": seed, "gqa": gqa, "ragged": ragged, "paged": paged, "spec": spec}
MODEL_SETS = {"model": model, "capacity": capacity, "general": general}
SETS = {**MAIN_SETS, "latent": latent, "float8": float8, "long": long, "versions": versions,
        **MODEL_SETS, "tiny": tiny}  # fmt: skip


def shapes_of(names, all_sets=MAIN_SETS):
    """[(set, shape)] of the sets named; "all" stands for `all_sets`."""
    if "all" in names:
        names = [*all_sets, *(name for name in names if name not in all_sets and name != "all")]
    return [(name, shape) for name in names for shape in SETS[name]()]
