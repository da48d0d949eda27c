"""Every key counts once: needles at the boundaries, and a census of all keys.

A needle is one key with about half of all the weight and a value unlike the others: to lose it or
to count it twice moves out and lse by far more than any tolerance. In a census all keys weigh the
same and each value is a unit vector, so that out is a histogram of the keys that were counted.
"""

import math

import pytest
import torch
from cases import check, int32, make_case, offsets, sharp_dtype

pytestmark = pytest.mark.usefixtures("loader")

UNIT_COUNTS = [1, 2, 3, 5, 16, 64, 1000]
LENGTH = 777


def tile_edges(length):
    """First and last key, and the keys on both sides of every edge of a 16-token warp share (near
    the ends), a 64-token tile and a 128-token tile."""
    steps = [*range(0, length, 64), 16, 32, 48, length - length % 16]
    edges = {edge + side for edge in steps for side in (-1, 0, 1)} | {length - 2, length - 1}
    return sorted(edge for edge in edges if 0 <= edge < length)


def needle_case(device, dtype, positions, length, *, seqlen_q=1, dims=(64, 64), group_size=2,
                ragged=False, **options):  # fmt: skip
    """One needle for each position, each in a (sequence, KV head) of its own."""
    heads_kv = 4
    batch = math.ceil(len(positions) / heads_kv)
    case = make_case(
        device, dtype, heads=(group_size * heads_kv, heads_kv), dims=dims,
        lengths=(length,) * batch, seqlen_q=seqlen_q, softmax_scale=1.0, scale_q=0.05, **options,
    )  # fmt: skip
    case["q"][..., 0] = 1.0
    case["k_cache"][..., 0] *= 0.05
    case["v_cache"] *= 0.05
    for i, position in enumerate(positions):
        key = (i // heads_kv, position, i % heads_kv)
        case["k_cache"][key] = 0.0
        case["k_cache"][(*key, 0)] = math.log(length)
        case["v_cache"][key] = torch.arange(dims[1], device=device) % 7 - 4.5
    if ragged:
        case["q"] = case["q"].flatten(0, 1)
        case["cu_seqlens_q"] = offsets([seqlen_q] * batch, device)
    return case


@pytest.mark.parametrize("dims", [(64, 64), (192, 128)], ids=["128-token-tile", "64-token-tile"])
@pytest.mark.parametrize("units", UNIT_COUNTS)
def test_needle_at_every_tile_and_unit_edge(units, dims, device, dtype, force_units):
    """The first or last key of a tile, a warp's share or a unit's share lost or taken twice."""
    force_units(units)
    check(needle_case(device, dtype, tile_edges(LENGTH), LENGTH, dims=dims))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 131])
def test_needle_at_the_ends_of_short_sequences(length, device):
    """One tile, full, nearly full and just overfull."""
    positions = sorted({0, length // 2, max(0, length - 2), length - 1})
    check(needle_case(device, sharp_dtype(device), positions, length))


@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
def test_needle_at_the_diagonal(ragged, device):
    """With several queries the needle is seen by the rows from its own position on, not before."""
    length, seqlen_q = 200, 9
    positions = range(length - seqlen_q - 2, length)
    case = needle_case(
        device, sharp_dtype(device), positions, length, seqlen_q=seqlen_q, ragged=ragged
    )
    check(case)


@pytest.mark.parametrize("window_left", [0, 1, 63, 64, 65, 127, 128, 129, 200])
def test_needle_at_the_left_edge_of_the_window(window_left, device):
    """The key at p - window_left counts, the one before it does not, for each row by itself."""
    length, seqlen_q = 300, 3
    begin = length - seqlen_q - window_left
    positions = range(max(0, begin - 2), begin + seqlen_q + 2)
    positions = [position for position in positions if position < length]
    case = needle_case(
        device, sharp_dtype(device), positions, length, seqlen_q=seqlen_q,
        window_left=window_left, poison=None,
    )  # fmt: skip
    check(case)


@pytest.mark.parametrize("window_right", [0, 1, 5, 64])
def test_needle_at_the_right_edge_of_the_window(window_right, device):
    """The key at p + window_right counts, the one after it does not."""
    length, seqlen_q = 140, 70
    end = length - seqlen_q + window_right
    positions = [position for position in range(end - 2, end + 4) if position < length]
    case = needle_case(
        device, sharp_dtype(device), positions, length, seqlen_q=seqlen_q, causal=False,
        window_right=window_right, group_size=1, poison=None,
    )  # fmt: skip
    check(case)


def test_needle_beyond_the_length_does_not_count(device):
    """A finite key just after the last one, in the same tile and in the next."""
    for length in (100, 127, 128, 129, 256):
        case = needle_case(
            device, sharp_dtype(device), [length, length + 1, length + 20], length, poison=None
        )
        check(case)


def test_needle_in_a_neighbour_does_not_count(device):
    """A tile that ends a sequence must not go on into the next sequence or the next head."""
    case = needle_case(device, sharp_dtype(device), [0, 99], 100, capacity=100, poison=None)
    case["k_cache"] = torch.cat([case["k_cache"]] * 2)
    case["v_cache"] = torch.cat([case["v_cache"]] * 2)
    case["q"] = torch.cat([case["q"]] * 2)
    case["cache_seqlens"] = int32([93, 100], device)
    case["k_cache"][1, 0, :, 0] = 30.0
    check(case)


def census_case(device, dtype, lengths, *, heads=(4, 2), dims=(64, 72), **options):
    """q = 0: all visible keys weigh the same. Each value is a unit vector of random direction."""
    case = make_case(device, dtype, heads=heads, dims=dims, lengths=lengths, **options)
    case["q"].zero_()
    generator = torch.Generator().manual_seed(5)
    shape = case["v_cache"].shape
    columns = torch.randint(shape[-1], shape[:-1], generator=generator).to(device)
    unit_vectors = torch.nn.functional.one_hot(columns, shape[-1]).to(dtype)
    case["v_cache"] = torch.where(case["v_cache"].isnan(), torch.nan, unit_vectors)
    return case


@pytest.mark.parametrize("units", UNIT_COUNTS)
def test_census(units, device, dtype, force_units):
    """Each key is counted once and in its place: a lost, doubled or exchanged key or tile."""
    force_units(units)
    lengths = (LENGTH, 0, 1, 64, 128, 300, 65)
    check(census_case(device, dtype, lengths))
    check(census_case(device, dtype, lengths, seqlen_q=3))
    check(census_case(device, dtype, lengths, dims=(256, 256), heads=(3, 1)))
    check(census_case(device, dtype, lengths, dims=(576, 512), heads=(3, 1)))


@pytest.mark.parametrize(
    "options",
    [
        dict(window_left=100, seqlen_q=4),
        dict(window_left=64, window_right=2, causal=False, seqlen_q=4),
        dict(causal=False, seqlen_q=7),
        dict(query_lengths=(5, 0, 3, 40)),
        dict(query_lengths=(5, 0, 3, 40), window_left=33),
        dict(seqlen_q=30),
    ],
    ids=lambda options: "-".join(options),
)
def test_census_under_a_mask(options, device, force_units):
    """The mask by its number of keys, row by row, wherever units are cut."""
    for units in (1, 3, 16):
        force_units(units)
        check(census_case(device, sharp_dtype(device), (LENGTH, 3, 128, 39), **options))


def test_census_of_every_short_length(device):
    """All lengths from 0 to 300 in one batch: every remainder of every tile."""
    lengths = range(301)
    check(census_case(device, sharp_dtype(device), lengths, heads=(1, 1), dims=(16, 64)))


def test_needles_of_a_long_sequence(device, force_units):
    """The ends and the middle of a sequence so long that every unit has a part of it."""
    length = 20_000 if device == "cpu" else 300_000
    positions = [0, 1, 127, 128, length // 2 - 1, length // 2, length - 129, length - 1]
    case = needle_case(device, sharp_dtype(device), positions, length)
    check(case)
    force_units(7)
    check(case)
