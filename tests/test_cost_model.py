"""csrc/plan/cost_model.h: which layout is chosen, and that nothing it knows of would be faster."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"

# An H200: 132 SMs, 4.8 TB/s, clusters of 2 to 8 CTAs at once. It said 15 of 7 and of 8, and 32 of 4
# did not run at once; the others are guesses.
H200 = (132, 4.8e6, [0, 0, 66, 42, 30, 24, 20, 15, 15])
TILE = 65536.0  # 128 tokens of K and V, D = 128, 16-bit
ROWS = 8
PARTIAL = ROWS * 128 * 4.0


@pytest.fixture
def machine(headers):
    return headers.Machine(*H200)


def choose(headers, machine, count, tiles, tile_bytes=TILE):
    return headers.choose_layout(headers.Items(count, tiles, ROWS, tile_bytes, PARTIAL), machine)


@pytest.mark.parametrize("count", [128, 132, 256, 512])
def test_items_that_fill_the_machine_stay_whole(headers, machine, count):
    choice = choose(headers, machine, count, 32)
    assert choice.layout.team_size == 1
    assert choice.layout.items_per_team == -(-count // 132)
    assert choice.layout.num_units == -(-count // choice.layout.items_per_team)


@pytest.mark.parametrize("count", [8, 16, 32])
def test_few_items_go_to_clusters(headers, machine, count):
    choice = choose(headers, machine, count, 64)
    assert choice.is_clustered
    assert choice.layout.items_per_team == 1
    assert choice.layout.num_units == count * choice.layout.team_size
    assert count <= H200[2][choice.layout.team_size]


def test_large_items_that_do_not_fit_go_to_stream_k(headers, machine):
    choice = choose(headers, machine, 80, 512)
    assert choice.layout.items_per_team == 0
    assert choice.layout.num_units == 132


def test_no_clusters_where_the_device_has_none(headers):
    a100 = headers.Machine(108, 1.9e6, [])
    for count in (1, 8, 16, 27, 54, 100):
        assert not choose(headers, a100, count, 64).is_clustered


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.integers(1, 600),
    st.sampled_from([1, 2, 3, 4, 7, 8, 16, 64, 1000]),
    st.sampled_from([32768.0, TILE]),
)
def test_nothing_that_fits_is_thought_faster(headers, count, tiles, tile_bytes):
    machine = headers.Machine(*H200)
    items = headers.Items(count, tiles, ROWS, tile_bytes, PARTIAL)
    chosen = headers.choose_layout(items, machine)
    others = [headers.stream_k(items, machine)] + [
        headers.teams(items, machine, size, clustered)
        for clustered in (False, True)
        for size in range(1, 133)
        if headers.fits(items, machine, size, clustered)
    ]
    # Of teams only every second size is looked at: of all these items two lose more than 5%.
    assert chosen.us <= 1.08 * min(other.us for other in others)
    assert chosen.layout.slack_tiles >= 0
    if chosen.layout.items_per_team:
        teams = chosen.layout.num_units // chosen.layout.team_size
        assert (teams - 1) * chosen.layout.items_per_team < count
        assert count <= teams * chosen.layout.items_per_team


def test_no_tile_and_no_item(headers, machine):
    for count, tiles in ((0, 4), (4, 0), (0, 0)):
        assert choose(headers, machine, count, tiles).layout.num_units >= 1


def tuned():
    """(name, items, {layout: us}) of the plain shapes that bench.tune measured on an H200."""
    shapes = {}
    for path in RESULTS.glob("2026-11-28-h200-tune-*.txt"):
        for line in path.read_text().splitlines():
            match = re.match(r"(b(\d+) (\d+)/(\d+) D(\d+) s(\d+) \w+): loss .*: chosen (.*)", line)
            if not match:
                continue
            name, batch, heads_q, heads_kv, dim, tokens = match[1], *map(int, match.groups()[1:6])
            rows = next(n for n in (8, 16, 32, 64, 128) if heads_q // heads_kv <= n)
            tile = 128 if dim <= 128 else 64
            items = batch * heads_kv, -(-tokens // tile), rows, 4.0 * tile * dim, 4.0 * rows * dim
            times = {k: float(us) for k, us in re.findall(r"layout=(\S+) ([\d.]+)", match[7])}
            shapes[name] = (name, items, times)
    return shapes.values()


def test_what_an_h200_was_fastest_with(headers, machine):
    """As many of those shapes as bench/VERSIONS.md says, v12, lose to another layout."""
    shapes = tuned()
    assert len(shapes) == 119
    losses, untried = {}, []
    for name, items, times in shapes:
        choice = headers.choose_layout(headers.Items(*items), machine)
        size = choice.layout.team_size
        if choice.layout.items_per_team == 0:
            layout = "stream_k"
        else:
            layout = f"{'clusters' if choice.is_clustered else 'teams'}:{size}"
        if layout not in times:  # a team of a size that the sweep has not tried
            untried.append(name)
            continue
        loss = times[layout] / min(times.values()) - 1
        if loss > 0.03:
            losses[name] = loss
    assert len(untried) <= 6
    assert len(losses) <= 3
    assert max(losses.values()) < 0.06


@pytest.mark.parametrize("count, clustered, own", [(256, False, 0.0), (8, True, 0.1),
                                                   (4, False, 5.0)])  # fmt: skip
def test_unequal_lengths_stay_whole_as_far_as_cutting_them_would_cost_more(
    headers, machine, count, clustered, own
):
    choice = choose(headers, machine, count, 64 if clustered else 1024)
    assert choice.is_clustered == clustered
    tile_us = TILE * 132 / H200[1]
    assert choice.layout.slack_tiles == int((5.5 - own) / tile_us)


def test_long_items_of_few_heads_go_to_more_sms_than_a_cluster_has(headers, machine):
    choice = choose(headers, machine, 4, 1024)  # b1 28/4 s131072
    assert not choice.is_clustered
    assert choice.layout.num_units > 4 * 8
