"""Caches of more than 2^32 elements a tensor, 8 GiB each of K and V: offsets of 32 bits, signed or
not, in elements or in bytes, lead elsewhere, and there lies NaN.

Only what a test's queries see is written, next to 2^31 and 2^32 elements and at the far end.
"""

import math

import pytest
import torch
from cases import int32, run
from paging import gather_pages
from reference import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("loader")]

HEADS, DIM = 8, 128
ELEMENTS = 2**32 + 2**24
TOKEN = HEADS * DIM
EDGES = (0, 2**30, 2**31, 2**32, ELEMENTS)  # in elements: 2^31 bytes, then 2^31 and 2^32 elements


@pytest.fixture
def memory(device):
    """(K, V), `[ELEMENTS]` of bf16 NaN each."""
    needed = 2 * 2 * ELEMENTS + 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    yield [torch.full((ELEMENTS,), math.nan, dtype=torch.bfloat16, device=device) for _ in "kv"]
    torch.cuda.empty_cache()


def queries(*leading):
    return torch.randn(*leading, 2 * HEADS, DIM, device="cuda").bfloat16()


def write_randomly(caches, index):
    for cache in caches:
        cache[index] = torch.randn(cache[index].shape, device=cache.device).to(cache.dtype)


def test_many_sequences(memory):
    """The sequences on both sides of each edge, long and short; all others are empty."""
    capacity = 1024
    caches = [x.view(-1, capacity, HEADS, DIM) for x in memory]
    batch = caches[0].shape[0]
    edges = [edge // (capacity * TOKEN) for edge in EDGES]
    chosen = sorted({edge + side for edge in edges for side in (-1, 0)} & set(range(batch)))
    lengths = torch.zeros(batch, dtype=torch.int32, device="cuda")
    for sequence in chosen:
        lengths[sequence] = capacity - sequence % 200
        write_randomly(caches, (sequence, slice(0, int(lengths[sequence]))))
    q = queries(batch, 2)
    out, lse = run(dict(q=q, k_cache=caches[0], v_cache=caches[1], cache_seqlens=lengths))
    assert_close(out[chosen], lse[chosen], q=q[chosen], k_cache=caches[0][chosen],
                 v_cache=caches[1][chosen], cache_seqlens=lengths[chosen])  # fmt: skip
    empty = lengths == 0
    assert (out[empty] == 0).all() and (lse[empty] == -math.inf).all()


@pytest.mark.parametrize("layout", ["tokens-first", "heads-first"])
def test_window_on_one_long_sequence(layout, memory):
    """The last keys of a length next to each edge, all before them NaN."""
    if layout == "tokens-first":
        caches = [x.view(1, -1, HEADS, DIM) for x in memory]
        edges = [edge // TOKEN for edge in EDGES[1:]]
    else:
        # Seven heads lie before the last one's tokens.
        caches = [x.view(1, HEADS, -1, DIM).transpose(1, 2) for x in memory]
        edges = [2000, caches[0].shape[1] // 2, caches[0].shape[1]]
    for edge in edges:
        for length in {edge - 1, edge, min(edge + 300, caches[0].shape[1])}:
            write_randomly(caches, (0, slice(length - 1100, length)))
            case = dict(q=queries(1, 3), k_cache=caches[0], v_cache=caches[1],
                        cache_seqlens=int32([length], "cuda"), window_left=1000)  # fmt: skip
            assert_close(*run(case), **case)
            for cache in caches:
                cache[0, length - 1100 : length] = math.nan


@pytest.mark.parametrize("units", [None, 1000])
def test_needles_in_one_whole_sequence(units, memory, force_units):
    """16 GiB read in one call. K and V are 0 but for needles next to each edge, each with as much
    weight as all other keys together, so that lse and out are known."""
    if units is not None:
        force_units(units)
    for x in memory:
        x.zero_()
    k, v = (x.view(1, -1, HEADS, DIM) for x in memory)
    length = k.shape[1]
    edges = [edge // TOKEN for edge in EDGES]
    needles = sorted({edge + side for edge in edges for side in (-1, 0)} & set(range(length)))
    q = torch.zeros(1, 1, HEADS, DIM, device="cuda").bfloat16()
    q[..., 0] = 1.0
    score = 15.25  # a bf16 number, as are 1 and the values
    for column, token in enumerate(needles):
        k[0, token, :, 0] = score
        v[0, token, :, column] = 1.0
    out, lse = run(dict(q=q, k_cache=k, v_cache=v, softmax_scale=1.0))
    total = length - len(needles) + len(needles) * math.exp(score)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(total)), rtol=2e-5, atol=0)
    expected = torch.zeros_like(out, dtype=torch.float32)
    expected[..., : len(needles)] = math.exp(score) / total
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("page_size", [1, 16, 24, 256])
def test_pages_at_the_far_end(page_size, memory):
    """Pages next to each edge and the last ones of all, in any order; K and V apart, then beside
    each other in one page of one tensor, every second page of which is V."""
    page = page_size * TOKEN
    usable = [x[: ELEMENTS // (2 * page) * 2 * page] for x in memory]
    apart = [x.view(-1, page_size, HEADS, DIM) for x in usable]
    together = usable[0].view(-1, 2, page_size, HEADS, DIM).unbind(1)
    for k_cache, v_cache in (apart, together):
        num_pages = k_cache.shape[0]
        edges = [edge // k_cache.stride(0) for edge in EDGES]
        around = {edge + side for edge in edges for side in range(-300 // page_size, 301)}
        ids = torch.tensor(sorted(around & set(range(num_pages))), device="cuda")
        ids = ids[torch.randperm(len(ids), device="cuda")]
        max_pages = min(len(ids) // 2, -(-1200 // page_size))
        table = ids[: 2 * max_pages].view(2, max_pages).int()
        write_randomly((k_cache, v_cache), ids[: 2 * max_pages])
        lengths = int32([max_pages * page_size, max_pages * page_size - 5], "cuda")
        case = dict(q=queries(2, 2), k_cache=k_cache, v_cache=v_cache, cache_seqlens=lengths)
        out, lse = run(case, block_table=table)
        gathered = {name: gather_pages(case[name], table) for name in ("k_cache", "v_cache")}
        assert_close(out, lse, **{**case, **gathered})
        for cache in (k_cache, v_cache):
            cache[ids] = math.nan
