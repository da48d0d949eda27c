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
    def capacity(self):
        """Tokens that a sequence has room for."""
        return max(self.lengths)

    @property
    def is_ragged(self):
        return min(self.lengths) != max(self.lengths)

    @property
    def context_ratio(self):
        """The batch-context ratio of LeanAttention (arXiv 2405.10480): average over maximum."""
        return sum(self.lengths) / self.batch / self.capacity

    @property
    def has_short_rows(self):
        """Whether a head's tokens lie apart in rows of 128 bytes or less, which cost more to read
        than the same bytes in the order of memory."""
        contiguous = self.page_size is None and not self.is_ragged
        short = self.heads_kv > 1 and self.head_dim * ELEMENT_BYTES <= 128
        short = short and not self.is_float8  # the floor of rows reads none
        return contiguous and short and self.layout == "bshd"

    @property
    def pages(self):
        """Pages that hold the tokens, of all sequences."""
        return sum(-(-length // self.page_size) for length in self.lengths)

    @property
    def visible_elements(self):
        """Elements of the K rows that the queries see; as many of V's."""
        return sum(self.lengths) * self.heads_kv * self.head_dim

    @property
    def visible_bytes(self):
        """Bytes of the K and V rows that the queries see, each once."""
        return self.num_caches * self.cache_bytes * self.visible_elements

    @property
    def cache_elements(self):
        """Elements that the K cache is allocated with; as many for V if it is apart."""
        rows = self.pages * self.page_size if self.page_size else self.batch * self.capacity
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
        for batch, tokens, page_size in ((1, 8192, None), (1, 131072, None), (16, 8192, None),
                                         (16, 8192, 64), (128, 4096, 64))
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


def tiny():
    """A few KiB of each kind, to try the bench itself where there is no GPU."""
    return [
        uniform(2, 4, 4, 64, 96, "bhsd"),
        uniform(2, 4, 2, 64, 96),
        uniform(1, 4, 2, 64, 96, seqlen_q=2),
        Shape(4, 2, 64, (5, 96, 40), "b3 4/2 D64 5 to 96"),
        Shape(4, 2, 64, (5, 96, 40), "b3 4/2 D64 5 to 96 page 16", page_size=16),
        Shape(4, 1, 576, (96, 40), "b2 4/1 D576/512 40 to 96", latent_dim=512),
        Shape(4, 2, 64, (96, 40), "b2 4/2 D64 40 to 96 float8", is_float8=True),
    ]


MAIN_SETS = {"seed": seed, "gqa": gqa, "ragged": ragged, "paged": paged, "spec": spec}
SETS = {**MAIN_SETS, "latent": latent, "float8": float8, "versions": versions, "tiny": tiny}


def shapes_of(names):
    """[(set, shape)] of the sets named; "all" stands for the five main ones."""
    if "all" in names:
        names = [*MAIN_SETS, *(name for name in names if name not in MAIN_SETS and name != "all")]
    return [(name, shape) for name in names for shape in SETS[name]()]
