"""csrc/plan/cost_model.h: which layout is chosen, and that nothing it knows of would be faster."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# What an H200 says: 132 SMs, 4.8 TB/s, clusters of 2 to 8 CTAs at once.
H200 = (132, 4.8e6, [0, 0, 66, 42, 32, 24, 20, 16, 15])
TILE = 65536.0  # 128 tokens of K and V, D = 128, 16-bit
PARTIAL = 8 * 128 * 4.0


@pytest.fixture
def machine(headers):
    return headers.Machine(*H200)


def choose(headers, machine, count, tiles, tile_bytes=TILE):
    return headers.choose_layout(headers.Items(count, tiles, tile_bytes, PARTIAL), machine)


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
    items = headers.Items(count, tiles, tile_bytes, PARTIAL)
    chosen = headers.choose_layout(items, machine)
    others = [headers.stream_k(items, machine)] + [
        headers.teams(items, machine, size, clustered)
        for clustered in (False, True)
        for size in range(1, 133)
        if headers.fits(items, machine, size, clustered)
    ]
    assert chosen.us <= 1.05 * min(other.us for other in others)
    assert chosen.layout.slack_tiles >= 0
    if chosen.layout.items_per_team:
        teams = chosen.layout.num_units // chosen.layout.team_size
        assert (teams - 1) * chosen.layout.items_per_team < count
        assert count <= teams * chosen.layout.items_per_team


def test_no_tile_and_no_item(headers, machine):
    for count, tiles in ((0, 4), (4, 0), (0, 0)):
        assert choose(headers, machine, count, tiles).layout.num_units >= 1


@pytest.mark.parametrize(
    "count, tiles, tile_bytes, units, team_size, items_per_team",
    [
        (160, 32, TILE, 80, 1, 2),  # b16 40/10 s4096: 80.4 us, stream-K 87.4
        (1024, 8, TILE, 128, 1, 8),  # b128 32/8 s1024: 127 us, stream-K 135
        (8, 8, TILE, 64, 8, 1),  # b1 32/8 s1024: 6.0 us, teams of 8 7.6
    ],
)
def test_what_an_h200_was_fastest_with(
    headers, machine, count, tiles, tile_bytes, units, team_size, items_per_team
):
    layout = choose(headers, machine, count, tiles, tile_bytes).layout
    assert (layout.num_units, layout.team_size, layout.items_per_team) == (
        units,
        team_size,
        items_per_team,
    )


def test_long_items_of_few_heads_go_to_more_sms_than_a_cluster_has(headers, machine):
    choice = choose(headers, machine, 4, 1024)  # b1 28/4 s131072
    assert not choice.is_clustered
    assert choice.layout.num_units > 4 * 8
