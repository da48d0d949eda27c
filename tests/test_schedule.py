"""csrc/core/schedule.h against a line of tiles made here, key by key, from the visibility rule."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import leanattn  # noqa: F401  (registers torch.ops.leanattn)

INT_MAX = 2**31 - 1

examples = settings(deadline=None, derandomize=True, max_examples=150)


def int32(values):
    return None if values is None else np.array(values, dtype=np.int32)


def make_problem(headers, case):
    arrays = {name: int32(case[name]) for name in ("cache_seqlens", "cu_seqlens_q")}
    return headers.Problem(**{**case, **arrays})


def make_case(
    cache_seqlens=None, cu_seqlens_q=None, batch=None, num_heads_kv=2, group_size=1, seqlen_q=1,
    total_q=0, capacity=None, tile_tokens_log2=2, rows_per_item=16, window_left=-1, window_right=0,
):  # fmt: skip
    """The arguments of a Problem. Tiles are small, so that short sequences have many."""
    if batch is None:
        batch = len(cache_seqlens)
    if capacity is None:
        capacity = max([0, *cache_seqlens])
    return dict(
        cache_seqlens=cache_seqlens, cu_seqlens_q=cu_seqlens_q, batch=batch,
        num_heads_kv=num_heads_kv, group_size=group_size, seqlen_q=seqlen_q, total_q=total_q,
        capacity=capacity, tile_tokens_log2=tile_tokens_log2, rows_per_item=rows_per_item,
        window_left=window_left, window_right=window_right,
    )  # fmt: skip


# Drawn from lists rather than ranges where hypothesis would fall back on 0 too often.
WINDOWS = st.sampled_from([-1, -1, 0, 1, 2, 3, 4, 7, 8, 15, 30, 60, INT_MAX])


@st.composite
def offsets(draw, batch):
    """(cu_seqlens_q, total_q): in order and, half the time, anything that the device may hold."""
    counts = draw(st.lists(st.sampled_from([1, 2, 3, 7, 0]), min_size=batch, max_size=batch))
    entries = np.cumsum([draw(st.sampled_from([0, 0, 2])), *counts]).tolist()
    total_q = entries[-1] + draw(st.sampled_from([0, 0, 3]))
    if draw(st.booleans()):
        place = draw(st.integers(0, batch))
        entries[place] = draw(st.integers(-3, total_q + 3))
    return entries, total_q


@st.composite
def cases(draw):
    """Lengths uniform, ragged, empty and out of range; queries even and ragged; any mask."""
    batch = draw(st.integers(1, 6))
    capacity = draw(st.sampled_from([100, 120, 97, 64, 61, 33, 16, 4, 1, 0]))
    length = st.sampled_from([capacity, 50, 64, 65, 12, 9, 5, 3, 1, 0, -1, INT_MAX])
    lengths = st.lists(length, min_size=batch, max_size=batch)
    ragged_queries = draw(st.sampled_from([False, False, True]))
    cu_seqlens_q, total_q = draw(offsets(batch)) if ragged_queries else (None, 0)
    return make_case(
        cache_seqlens=draw(st.one_of(lengths, lengths, st.none())),
        cu_seqlens_q=cu_seqlens_q,
        batch=batch,
        num_heads_kv=draw(st.integers(1, 4)),
        group_size=draw(st.sampled_from([1, 2, 3, 4, 7, 8])),
        seqlen_q=draw(st.sampled_from([1, 1, 2, 3, 5, 8, 12, 0])),
        total_q=total_q,
        capacity=capacity,
        tile_tokens_log2=draw(st.integers(0, 3)),
        rows_per_item=draw(st.sampled_from([16, 8, 64, 1, 2, 3, 5])),
        window_left=draw(WINDOWS),
        window_right=draw(st.one_of(st.just(0), WINDOWS)),
    )


UNITS = st.sampled_from([3, 1, 2, 4, 5, 7, 11, 20, 33, 64, 132, 1000]) | st.integers(1, 1000)


# --- What is expected ----------------------------------------------------------------------------


def clamp(x, low, high):
    return min(max(x, low), high)


def sequences(case):
    """(length, first query row, number of queries) of each sequence, clamped by the contract."""
    begin = 0
    if case["cu_seqlens_q"] is not None:
        begin = clamp(case["cu_seqlens_q"][0], 0, case["total_q"])
    for seq in range(case["batch"]):
        length = case["capacity"]
        if case["cache_seqlens"] is not None:
            length = clamp(case["cache_seqlens"][seq], 0, case["capacity"])
        if case["cu_seqlens_q"] is None:
            yield length, 0, case["seqlen_q"]
        else:
            end = clamp(case["cu_seqlens_q"][seq + 1], begin, case["total_q"])
            yield length, begin, end - begin
            begin = end


def seen_by_rows(case, length, num_queries):
    """[queries * group_size, length] of bool: the visibility rule, row by row and key by key."""
    p = length - num_queries + np.arange(num_queries)[:, None]
    j = np.arange(length)[None, :]
    seen = np.ones((num_queries, length), dtype=bool)
    if case["window_left"] >= 0:
        seen &= j >= p - case["window_left"]
    if case["window_right"] >= 0:
        seen &= j <= p + case["window_right"]
    return seen.repeat(case["group_size"], axis=0)


def row_blocks(case):
    """(seq, row block, which keys its rows see [rows, length]) of all sequences."""
    for seq, (length, _, num_queries) in enumerate(sequences(case)):
        seen = seen_by_rows(case, length, num_queries)
        for block, first in enumerate(range(0, len(seen), case["rows_per_item"])):
            yield seq, block, seen[first : first + case["rows_per_item"]]


def expected_line(case):
    """(seq, head, row block, tile) of every tile of which some row of the item sees a key."""
    tiles = [[] for _ in range(case["batch"])]
    for seq, block, seen in row_blocks(case):
        keys = np.flatnonzero(seen.any(axis=0))
        tiles[seq] += [(block, tile) for tile in np.unique(keys >> case["tile_tokens_log2"])]
    return [
        (seq, head, block, int(tile))
        for seq in range(case["batch"])
        for head in range(case["num_heads_kv"])
        for block, tile in tiles[seq]
    ]


# --- What the headers say ------------------------------------------------------------------------


def schedule(headers, case, units):
    """(problem, line, table): table holds a row a segment, in the order of the units."""
    problem = make_problem(headers, case)
    line = headers.HostLine(problem, units)
    return problem, line, headers.table(problem, line)


def expand(table):
    """The segments' tiles, like expected_line."""
    return [
        (int(s["seq"]), int(s["head"]), int(s["row_block"]), tile)
        for s in table
        for tile in range(s["tile_begin"], s["tile_end"])
    ]


def item_of(segment):
    return int(segment["seq"]), int(segment["head"]), int(segment["row_block"])


def cut_items(table):
    """The segments of each item that is not done by one unit alone."""
    items = {}
    for segment in table[~table["whole"]]:
        items.setdefault(item_of(segment), []).append(segment)
    return items


def sizes(table):
    return (table["tile_end"] - table["tile_begin"]).astype(np.int64)


# --- Every tile once, in equal shares ------------------------------------------------------------


@examples
@given(cases(), UNITS)
def test_every_tile_that_some_row_sees_once_and_no_other(headers, case, units):
    """A tile that nobody does, or that two do; one that no row sees; one out of order."""
    _, line, table = schedule(headers, case, units)
    expected = expected_line(case)
    assert line.shares.num_tiles == len(expected)
    assert expand(table) == expected


@examples
@given(cases(), UNITS)
def test_shares_are_equal(headers, case, units):
    """A unit that does two tiles more than another sets the time of all."""
    _, line, table = schedule(headers, case, units)
    shares = line.shares
    assert shares.num_units == min(units, shares.num_tiles)
    loads = np.zeros(shares.num_units, dtype=np.int64)
    np.add.at(loads, table["unit"], sizes(table))
    assert loads.tolist() == [shares.end(u) - shares.begin(u) for u in range(shares.num_units)]
    assert len(loads) == 0 or 1 <= loads.max() <= loads.min() + 1


@examples
@given(cases(), UNITS)
def test_units_beyond_the_tiles_idle(headers, case, units):
    """More units than tiles: those without a share must not do somebody else's."""
    problem, line, table = schedule(headers, case, units)
    assert (np.diff(table["unit"]) >= 0).all()
    assert np.unique(table["unit"]).tolist() == list(range(line.shares.num_units))
    for unit in (line.shares.num_units, units, units + 1, 65535):
        if unit >= line.shares.num_units:
            assert len(headers.walk(problem, line, unit)) == 0


@settings(examples, max_examples=400)
@given(st.one_of(st.integers(0, 50), st.integers(0, INT_MAX)), st.integers(1, 65536), st.data())
@example(INT_MAX, 1, None)
@example(INT_MAX, 65536, None)
@example(INT_MAX, 132, None)
def test_unit_of_is_the_inverse_of_begin(headers, num_tiles, units, data):
    """Off by one where the larger shares end, or overflow near 2^31: a partial is never merged."""
    shares = headers.make_shares(num_tiles, units)
    assert shares.num_units == min(units, num_tiles)
    if num_tiles == 0:
        return
    last = shares.num_units - 1
    assert shares.begin(0) == 0 and shares.end(last) == num_tiles
    tiles, chosen = {0, num_tiles - 1}, {0, last // 2, last}
    if data:
        tiles.add(data.draw(st.integers(0, num_tiles - 1)))
        chosen.add(data.draw(st.integers(0, last)))
    for unit in chosen:
        tiles |= {shares.begin(unit), shares.end(unit) - 1}
        assert shares.unit_of(shares.begin(unit)) == unit
        assert shares.unit_of(shares.end(unit) - 1) == unit
    for tile in tiles:
        unit = shares.unit_of(tile)
        assert shares.begin(unit) <= tile < shares.end(unit)
        assert shares.end(unit) - shares.begin(unit) in (num_tiles // units, num_tiles // units + 1)


def test_no_cut_where_shares_end_with_items(headers):
    """Equal items and as many units: nothing to fix up, and no partial."""
    for heads, units in [(4, 4), (4, 2), (4, 1), (6, 3)]:
        case = make_case([37, 37, 37], num_heads_kv=heads)
        _, _, table = schedule(headers, case, 3 * units)
        assert table["whole"].all() and len(table) == 3 * heads
        assert (table["first_unit"] == table["last_unit"]).all()


# --- The fixup's part ----------------------------------------------------------------------------


@examples
@given(cases(), UNITS)
def test_at_most_two_unfinished_items_a_unit(headers, case, units):
    """The workspace has two slots a unit; a third partial would overwrite one."""
    _, _, table = schedule(headers, case, units)
    for _, group in itertools.groupby(table, key=lambda s: s["unit"]):
        whole = [bool(s["whole"]) for s in group]
        assert all(whole[1:-1]), "only the first and the last segment may be unfinished"


@examples
@given(cases(), UNITS)
def test_whole_means_all_tiles_of_the_item(headers, case, units):
    """A segment taken for whole would be written out without its partners' tiles."""
    _, _, table = schedule(headers, case, units)
    counts = {}
    for item in (item_of(s) for s in table):
        counts[item] = counts.get(item, 0) + 1
    assert [counts[item_of(s)] == 1 for s in table] == table["whole"].tolist()


@examples
@given(cases(), UNITS)
def test_partial_slots_do_not_collide(headers, case, units):
    """Two partials in one slot, or one outside the workspace of two slots a unit."""
    _, line, table = schedule(headers, case, units)
    partials = table[~table["whole"]]
    # 0 for the item that the share begins in, 1 for any other.
    share_begins = np.array([line.shares.begin(unit) for unit in partials["unit"]], dtype=int)
    assert np.array_equal(partials["slot"] == 0, share_begins >= partials["item_line"])
    assert np.isin(partials["slot"], [0, 1]).all()
    assert (partials["partial"] == 2 * partials["unit"] + partials["slot"]).all()
    assert len(np.unique(partials["partial"])) == len(partials)
    assert (partials["partial"] < 2 * line.shares.num_units).all()


@examples
@given(cases(), UNITS)
def test_every_partner_knows_all_partners_and_their_slots(headers, case, units):
    """The last one to arrive counts and reads by this: one too few loses keys, one too many waits
    for a ticket that never comes."""
    _, line, table = schedule(headers, case, units)
    for segments in cut_items(table).values():
        doers = [int(s["unit"]) for s in segments]
        assert len(doers) >= 2
        assert all([*range(s["first_unit"], s["last_unit"] + 1)] == doers for s in segments)
        stored = [int(s["partial"]) for s in segments]
        for unit in {doers[0], doers[-1]}:
            assert stored in headers.partials_to_merge(line, unit)
    for s in table[table["whole"]]:
        assert s["first_unit"] == s["last_unit"] == s["unit"]


@examples
@given(cases(), UNITS)
def test_unit_order_is_token_order(headers, case, units):
    """The merge order: partials in the order of the units are the item's tokens in their order."""
    _, _, table = schedule(headers, case, units)
    for segments in cut_items(table).values():
        assert segments[0]["tile_begin"] == segments[0]["item_begin"]
        assert segments[-1]["tile_end"] == segments[-1]["item_end"]
        for earlier, later in itertools.pairwise(segments):
            assert later["unit"] == earlier["unit"] + 1
            assert later["tile_begin"] == earlier["tile_end"]


@examples
@given(cases(), UNITS)
def test_counters_of_different_items_differ(headers, case, units):
    """Two items on one counter: the ticket that says "last" would come too early."""
    _, _, table = schedule(headers, case, units)
    items = cut_items(table)
    for numbering in ("counter_of_unit", "counter_of_item"):
        if numbering == "counter_of_item" and case["cu_seqlens_q"] is not None:
            continue  # items cannot be numbered without reading all lengths
        counters = [{int(s[numbering]) for s in segments} for segments in items.values()]
        assert all(len(c) == 1 for c in counters), "partners must agree"
        assert len(set().union(*counters)) == len(items)
        blocks = -(-case["seqlen_q"] * case["group_size"] // case["rows_per_item"])
        allocated = {
            "counter_of_unit": units,
            "counter_of_item": case["batch"] * case["num_heads_kv"] * blocks,
        }[numbering]
        assert all(0 <= c < allocated for (c,) in counters)


# --- The walker ----------------------------------------------------------------------------------


@examples
@given(cases(), UNITS)
def test_a_unit_does_its_slice_of_the_whole_walk(headers, case, units):
    """A unit finds its first tile by itself and must land where one that does all would be."""
    problem, line, _ = schedule(headers, case, units)
    _, _, whole = schedule(headers, case, 1)
    all_tiles = expand(whole)
    for unit in range(min(line.shares.num_units, 40)):
        slice_ = all_tiles[line.shares.begin(unit) : line.shares.end(unit)]
        assert expand(headers.walk(problem, line, unit)) == slice_


@examples
@given(cases(), UNITS)
def test_the_walk_from_the_sequence_that_holds_its_first_tile(headers, case, units):
    """As the kernel finds it, by other sums than the host's."""
    problem, line, _ = schedule(headers, case, units)
    starts, position = [], 0
    for seq in range(case["batch"]):
        sequence = line.sequence(seq)
        starts.append((seq, sequence.query_begin, position))
        position += case["num_heads_kv"] * headers.tiles_per_head(problem, sequence)
    assert position == line.shares.num_tiles
    for unit in range(line.shares.num_units):
        # Sequences without tiles begin where the next one does.
        start = [s for s in starts if s[2] <= line.shares.begin(unit)][-1]
        walked = headers.walk_from(problem, line.shares, unit, *start)
        assert np.array_equal(walked, headers.walk(problem, line, unit))


@st.composite
def team_layouts(draw):
    """A case without ragged queries, the items a team takes, and the units of a team."""
    case = draw(cases().filter(lambda c: c["cu_seqlens_q"] is None and c["seqlen_q"] > 0))
    team_size = draw(st.sampled_from([1, 2, 3, 4, 5, 8]))
    items_per_team = draw(st.sampled_from([1, 2, 3, 7])) if team_size == 1 else 1
    return case, items_per_team, team_size


def items_in_order(case):
    """Every item, those without tiles too."""
    blocks = -(-case["seqlen_q"] * case["group_size"] // case["rows_per_item"])
    return [
        (seq, head, block)
        for seq in range(case["batch"])
        for head in range(case["num_heads_kv"])
        for block in range(blocks)
    ]


@examples
@given(team_layouts(), st.sampled_from([0, 1, 5]))
def test_a_team_shares_out_its_items_alone(headers, layout, idle_teams):
    case, items_per_team, team_size = layout
    items = items_in_order(case)
    num_teams = -(-len(items) // items_per_team)
    units = (num_teams + idle_teams) * team_size
    problem = make_problem(headers, case)
    table = headers.walk_teams(problem, headers.Layout(units, items_per_team, team_size), False)
    assert expand(table) == expected_line(case)
    for segment in table:
        assert items.index(item_of(segment)) // items_per_team == segment["unit"] // team_size
    if team_size == 1:
        assert table["whole"].all()
    if case["cache_seqlens"] is None:
        uniform = headers.walk_teams(
            problem, headers.Layout(units, items_per_team, team_size), True
        )
        # Shares count from the team's first item, without the host's help or with it.
        assert np.array_equal(table, uniform)


@examples
@given(team_layouts(), st.sampled_from([0, 1, 5]))
def test_a_team_may_take_its_items_by_steps(headers, layout, idle_teams):
    """So that neighbouring teams are at neighbouring items."""
    case, items_per_team, team_size = layout
    assume(team_size == 1)
    items = items_in_order(case)
    num_teams = -(-len(items) // items_per_team)
    table = headers.walk_teams(
        make_problem(headers, case),
        headers.Layout(num_teams + idle_teams, items_per_team, 1, num_teams, by_steps=True), False,
    )  # fmt: skip
    walked = [items.index(item_of(segment)) for segment in table]
    contiguous = headers.walk_teams(
        make_problem(headers, case), headers.Layout(num_teams, items_per_team, 1), False
    )
    assert sorted(walked) == [items.index(item_of(segment)) for segment in contiguous]
    # Each team's come by steps; the teams, if they are spread, in order.
    expected = [i for team in range(num_teams) for i in range(team, len(items), num_teams)]
    assert walked == [item for item in expected if item in set(walked)]


@examples
@given(team_layouts(), st.integers(0, 40))
def test_teams_are_spread_over_more_units(headers, layout, idle_teams):
    """In order, as evenly as can be, and each team's units side by side."""
    case, items_per_team, team_size = layout
    items = items_in_order(case)
    num_teams = -(-len(items) // items_per_team)
    slots = num_teams + idle_teams
    table = headers.walk_teams(
        make_problem(headers, case),
        headers.Layout(slots * team_size, items_per_team, team_size, num_teams), False,
    )  # fmt: skip
    of_team = {}
    for segment in table:
        team = items.index(item_of(segment)) // items_per_team
        of_team.setdefault(team, set()).add(segment["unit"] // team_size)
    places = [min(of_team[team]) for team in sorted(of_team)]
    assert all(len(slots_of) == 1 for slots_of in of_team.values())
    assert places == sorted(set(places)) and all(place < slots for place in places)
    for team, place in zip(sorted(of_team), places):
        assert team * slots // num_teams <= place <= -(-(team + 1) * slots // num_teams)


@examples
@given(team_layouts())
def test_a_team_is_evenly_loaded_and_its_partials_have_places(headers, layout):
    case, items_per_team, team_size = layout
    assume(team_size > 1)
    num_teams = len(items_in_order(case))
    layout = headers.Layout(num_teams * team_size, 1, team_size)
    table = headers.walk_teams(make_problem(headers, case), layout, False)
    for item in {item_of(s) for s in table}:
        segments = [s for s in table if item_of(s) == item]
        tiles = [s["tile_end"] - s["tile_begin"] for s in segments]
        assert max(tiles) - min(tiles) <= 1
        assert len(segments) == min(team_size, segments[0]["item_end"] - segments[0]["item_begin"])
        units = [s["unit"] for s in segments]
        assert units == [*range(segments[0]["first_unit"], segments[0]["last_unit"] + 1)]
        assert len({s["partial"] for s in segments}) == len(segments)


@examples
@given(cases(), UNITS)
def test_a_uniform_batch_needs_no_walk_to_its_places(headers, case, units):
    """Without lengths on the device the host divides: every unit must land where a walk would."""
    case = {**case, "cache_seqlens": None, "cu_seqlens_q": None}
    problem, line, table = schedule(headers, case, units)
    uniform = headers.UniformLine(problem, units)
    assert uniform.shares.num_units == line.shares.num_units
    assert uniform.shares.num_tiles == line.shares.num_tiles
    for unit in range(min(line.shares.num_units + 1, 40)):
        walked = headers.walk_uniform(problem, uniform, unit)
        assert np.array_equal(walked, table[table["unit"] == unit])


@settings(examples, max_examples=500)
@given(
    st.integers(1, 300) | st.integers(1, INT_MAX),
    st.integers(0, 5) | st.integers(0, INT_MAX),
    st.integers(-1, 1),
)
@example(1, INT_MAX, 0)
@example(2, INT_MAX, 0)
@example(3, INT_MAX, 0)
@example(INT_MAX, 1, 0)
@example(INT_MAX, 1, -1)
@example(2**30 + 1, 1, -1)
@example(2**30, 2, -1)
def test_fast_divisor_divides(headers, divisor, multiple, offset):
    """The multiplication for a division: off by one just at or below a multiple."""
    n = min(max(multiple % (INT_MAX // divisor + 1) * divisor + offset, 0), INT_MAX)
    assert headers.divide(n, divisor) == divmod(n, divisor)


# --- Items ---------------------------------------------------------------------------------------


@examples
@given(cases())
def test_item_keys_are_those_of_its_rows(headers, case):
    """The loader copies by `any` and the main loop masks by `all`: both come from two rows only."""
    problem = make_problem(headers, case)
    line = headers.HostLine(problem, 1)
    for seq, block, seen in row_blocks(case):
        sequence = line.sequence(seq)
        assert headers.item_rows(problem, sequence, block) == len(seen)
        any_keys, all_keys, alike = headers.item_keys(problem, sequence, block)
        assert list(range(*any_keys)) == np.flatnonzero(seen.any(axis=0)).tolist()
        assert list(range(*all_keys)) == np.flatnonzero(seen.all(axis=0)).tolist()
        # Rows that are alike are not masked one by one.
        assert not alike or (seen == seen[0]).all()
        assert alike or not any_keys[0] < any_keys[1] or not (seen == seen[0]).all()


@examples
@given(cases(), UNITS)
def test_items_without_tiles_are_named(headers, case, units):
    """Their rows are in nobody's share: not named they stay unwritten, named too often they would
    overwrite a result."""
    problem, line, table = schedule(headers, case, units)
    in_a_share = {(seq, block) for seq, _, block in (item_of(s) for s in table)}
    empty = {(seq, block) for seq, block, _ in row_blocks(case)} - in_a_share
    for seq in range(case["batch"]):
        sequence = line.sequence(seq)
        blocks = headers.end_of_empty_items(problem, sequence)
        assert {(seq, block) for block in range(blocks)} == {e for e in empty if e[0] == seq}


@examples
@given(cases())
def test_line_is_never_longer_than_the_host_thinks(headers, case):
    """The host picks the units and refuses too long lines without knowing any length."""
    problem = make_problem(headers, case)
    assert headers.HostLine(problem, 1).shares.num_tiles <= headers.max_tiles(problem)


def test_row_blocks_of_almost_2_to_the_31_rows(headers):
    """decode takes up to 2^31 - 1 query rows; rounding up to whole items must not overflow."""
    case = make_case([9], seqlen_q=INT_MAX, rows_per_item=64)
    problem = make_problem(headers, case)
    assert headers.num_row_blocks(problem, headers.load_sequence(problem, 0, 0)) == 2**25


def test_max_tiles_in_64_bits(headers):
    """The bound itself must not overflow where it says that the line would."""
    case = make_case(batch=100_000, num_heads_kv=128, capacity=INT_MAX, tile_tokens_log2=7)
    assert headers.max_tiles(make_problem(headers, case)) == 100_000 * 128 * 2**24
    case = make_case(
        batch=1, num_heads_kv=1, capacity=129, tile_tokens_log2=7, seqlen_q=3, group_size=5,
        rows_per_item=8,
    )  # fmt: skip
    assert headers.max_tiles(make_problem(headers, case)) == 2 * 2


def test_cut_points_depend_on_the_head_dim_alone(headers):
    """A sequence's tiles must not move with the batch around it; 128 tokens up to D = 128."""
    assert [headers.tile_tokens_log2_for(d) for d in (8, 64, 128, 136, 256)] == [7, 7, 7, 6, 6]


# --- What lies on the device ---------------------------------------------------------------------


@examples
@given(cases())
def test_lengths_and_offsets_are_clamped(headers, case):
    """Any int32 on the device: no sequence longer than the cache, no query row outside q, and
    every covered row in one sequence only."""
    problem = make_problem(headers, case)
    line = headers.HostLine(problem, 3)
    expected = list(sequences(case))
    got = [line.sequence(seq) for seq in range(case["batch"])]
    assert [(s.length, s.query_begin, s.num_queries) for s in got] == expected
    if case["cu_seqlens_q"] is not None:
        end = headers.first_query_row(problem)
        for s in got:
            assert s.query_begin == end and s.num_queries >= 0
            end += s.num_queries
        assert 0 <= headers.first_query_row(problem) <= end <= case["total_q"]
        assert line.query_end == end


@pytest.mark.parametrize(
    "entries, expected",
    [
        ([0, 3, 5, 8], [(0, 3), (3, 2), (5, 3)]),
        ([2, 3, 5, 7], [(2, 1), (3, 2), (5, 2)]),  # rows before the first and after the last
        ([0, 5, 3, 8], [(0, 5), (5, 0), (5, 3)]),  # falls
        ([0, 3, 99, 8], [(0, 3), (3, 5), (8, 0)]),  # beyond total_q
        ([-7, -1, 4, 8], [(0, 0), (0, 4), (4, 4)]),  # below 0
        ([99, 0, 4, 8], [(8, 0), (8, 0), (8, 0)]),  # begins at the end
        ([INT_MAX, -INT_MAX - 1, INT_MAX, 0], [(8, 0), (8, 0), (8, 0)]),
        ([-INT_MAX - 1, INT_MAX, 0, 4], [(0, 8), (8, 0), (8, 0)]),
    ],
)
def test_bad_cu_seqlens(headers, entries, expected):
    """Each entry to [the one before, total_q], by name."""
    case = make_case([9, 9, 9], entries, total_q=8)
    line = headers.HostLine(make_problem(headers, case), 1)
    got = [line.sequence(seq) for seq in range(3)]
    assert [(s.query_begin, s.num_queries) for s in got] == expected


def test_extreme_lengths(headers):
    """INT32_MIN and INT32_MAX as lengths: clamped before anything is added to them."""
    case = make_case([INT_MAX, -INT_MAX - 1, 9, -1], capacity=20)
    _, line, table = schedule(headers, case, 3)
    assert [line.sequence(seq).length for seq in range(4)] == [20, 0, 9, 0]
    assert expand(table) == expected_line(case)


def test_strided_lengths(headers):
    """A column of a larger tensor is a legal cache_seqlens or cu_seqlens_q."""
    case = make_case([9, 0, 30, 4], [0, 2, 3, 3, 8], total_q=8, rows_per_item=2)
    padded = np.full((5, 3), 77, dtype=np.int32)
    padded[:4, 0], padded[:, 2] = case["cache_seqlens"], case["cu_seqlens_q"]
    problem = headers.Problem(
        **{**case, "cache_seqlens": padded[:4, 0], "cu_seqlens_q": padded[:, 2]}
    )
    line = headers.HostLine(problem, 5)
    assert expand(headers.table(problem, line)) == expected_line(case)


# --- Sizes ---------------------------------------------------------------------------------------


def assert_partition(headers, case, units, items):
    """The same properties where tiles are too many to list. `items`: (seq, head, row_block,
    item_begin, item_end) of each item with tiles, in order."""
    problem, line, table = schedule(headers, case, units)
    items = np.array(items, dtype=np.int64)
    item_sizes = items[:, 4] - items[:, 3]
    item_lines = np.cumsum(item_sizes) - item_sizes
    total = int(item_sizes.sum())
    shares = line.shares
    assert shares.num_tiles == total and shares.num_units == min(units, total)
    # Segment after segment the line is walked without a gap, each within its item.
    begins = np.cumsum(sizes(table)) - sizes(table)
    assert sizes(table).min() > 0 and sizes(table).sum() == total
    owner = np.searchsorted(item_lines, begins, side="right") - 1
    for column, name in enumerate(["seq", "head", "row_block", "item_begin", "item_end"]):
        assert np.array_equal(table[name], items[owner, column])
    assert np.array_equal(table["item_line"], item_lines[owner])
    assert np.array_equal(table["tile_begin"] - table["item_begin"], begins - item_lines[owner])
    assert (table["tile_end"] <= table["item_end"]).all()
    # Shares.
    loads = np.zeros(shares.num_units, dtype=np.int64)
    np.add.at(loads, table["unit"], sizes(table))
    assert loads.max() <= loads.min() + 1
    # Who shares an item, and through which slot and counter.
    share_begins = np.array([shares.begin(unit) for unit in range(shares.num_units)])
    first = np.searchsorted(share_begins, item_lines, side="right") - 1
    last = np.searchsorted(share_begins, item_lines + item_sizes - 1, side="right") - 1
    assert np.array_equal(table["first_unit"], first[owner])
    assert np.array_equal(table["last_unit"], last[owner])
    assert np.array_equal(table["whole"], (first == last)[owner])
    partials = table[~table["whole"]]
    assert len(np.unique(partials["partial"])) == len(partials)
    for numbering in ("counter_of_unit", "counter_of_item"):
        pairs = np.unique(np.stack([partials[numbering], owner[~table["whole"]]]), axis=1)
        assert pairs.shape[1] == (first < last).sum() == len(np.unique(pairs[0]))
    return table


@pytest.mark.parametrize("units", [1, 7, 132, 1000])
def test_4096_sequences(headers, units):
    """More sequences than units, with runs of empty ones at both ends and between."""
    lengths = np.random.default_rng(5).integers(0, 3000, 4096)
    lengths[:100] = lengths[2000:2300] = lengths[-50:] = 0
    lengths[::7] = 1
    heads = 3
    case = make_case(lengths.tolist(), num_heads_kv=heads, group_size=4, tile_tokens_log2=7)
    items = [
        (seq, head, 0, 0, (length + 127) // 128)
        for seq, length in enumerate(lengths)
        for head in range(heads)
        if length
    ]
    assert_partition(headers, case, units, items)


@pytest.mark.parametrize("units", [1, 2, 132, 1000])
@pytest.mark.parametrize("heads", [1, 8])
def test_one_sequence_of_a_million_tokens(headers, heads, units):
    """One item over very many units, or few over many."""
    case = make_case([1_000_000], num_heads_kv=heads, tile_tokens_log2=7)
    table = assert_partition(headers, case, units, [(0, h, 0, 0, 7813) for h in range(heads)])
    assert len(table) <= units + heads - 1


@pytest.mark.parametrize("units", [1, 2, 132, 65536])
def test_a_line_near_2_to_the_31(headers, units):
    """Tiles are counted in int: nothing may overflow on the longest line that the host allows."""
    case = make_case(batch=1, num_heads_kv=127, capacity=INT_MAX, tile_tokens_log2=7)
    assert headers.max_tiles(make_problem(headers, case)) == 127 * 2**24 <= INT_MAX
    assert_partition(headers, case, units, [(0, h, 0, 0, 2**24) for h in range(127)])


@examples
@given(
    st.lists(st.integers(0, INT_MAX) | st.integers(0, 100_000), min_size=1, max_size=5),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from([-1, 0, 1000, 2**20, INT_MAX]),
    st.integers(0, 1000),
    UNITS,
)
def test_huge_lengths(headers, lengths, heads, seqlen_q, window_left, window_right, units):
    """Any length that an int holds, where no product of tokens may be formed in 32 bits."""
    case = make_case(
        lengths, num_heads_kv=heads, seqlen_q=seqlen_q, group_size=2, tile_tokens_log2=7,
        window_left=window_left, window_right=window_right,
    )  # fmt: skip
    items = []
    for seq, length in enumerate(lengths):
        first = length - seqlen_q  # where the first query stands
        begin = max(0, first - window_left) if window_left >= 0 else 0
        if length > 0:  # the last query sees at least its own token
            tiles = begin // 128, (length - 1) // 128 + 1
            items += [(seq, head, 0, *tiles) for head in range(heads)]
    assume(items)
    assert_partition(headers, case, units, items)


def test_a_window_on_a_million_tokens(headers):
    """Tiles before the window are nobody's work."""
    case = make_case(
        [1_000_000, 50], num_heads_kv=2, seqlen_q=4, tile_tokens_log2=7, window_left=4095
    )
    first = (1_000_000 - 4 - 4095) // 128
    items = [(0, h, 0, first, 7813) for h in range(2)] + [(1, h, 0, 0, 1) for h in range(2)]
    assert_partition(headers, case, 10, items)


@pytest.mark.parametrize("cu_seqlens_q", [None, [0], [3]])
@pytest.mark.parametrize("units", [1, 5])
def test_no_sequence_at_all(headers, cu_seqlens_q, units):
    """B = 0: no share and no segment; rows of q that nobody covers are still known."""
    case = make_case([], cu_seqlens_q, total_q=7)
    _, line, table = schedule(headers, case, units)
    assert len(table) == 0 and line.shares.num_units == 0
    assert line.query_end == (cu_seqlens_q[0] if cu_seqlens_q else 0)


# --- The op --------------------------------------------------------------------------------------

OP_COLUMNS = [
    "unit", "seq", "head", "row_block", "tile_begin", "tile_end", "item_begin", "item_end",
    "first_unit", "last_unit",
]  # fmt: skip


def op_table(case, units, head_dim):
    cu_seqlens_q = case["cu_seqlens_q"]
    return torch.ops.leanattn.schedule(
        torch.tensor(case["cache_seqlens"], dtype=torch.int32),
        case["num_heads_kv"],
        case["group_size"],
        case["capacity"],
        head_dim,
        units,
        case["rows_per_item"],
        case["seqlen_q"],
        None if cu_seqlens_q is None else torch.tensor(cu_seqlens_q, dtype=torch.int32),
        causal=case["window_right"] == 0,
        window_left=case["window_left"],
        window_right=case["window_right"],
    ).numpy()


@examples
@given(cases(), UNITS, st.sampled_from([64, 192]))
def test_the_op_gives_the_same_table(headers, case, units, head_dim):
    """What tools and pictures show must be what the kernels do."""
    assume(case["cache_seqlens"] is not None)
    offsets = case["cu_seqlens_q"]
    stretch = 40  # the op's tiles have their real size
    lengths = [clamp(n, -9, 10**6) * stretch for n in case["cache_seqlens"]]
    case = {
        **case,
        "cache_seqlens": lengths,
        "capacity": case["capacity"] * stretch,
        "tile_tokens_log2": 7 if head_dim <= 128 else 6,
        "total_q": max(0, offsets[-1]) if offsets else 0,
    }
    _, _, table = schedule(headers, case, units)
    expected = np.stack([table[name] for name in OP_COLUMNS], axis=1)
    assert np.array_equal(op_table(case, units, head_dim), expected)


def test_op_refuses_more_rows_than_an_int_counts():
    """2^31 query rows or more must not wrap around to an empty table."""
    lengths = torch.from_numpy(int32([5]))
    with pytest.raises(RuntimeError, match="group_size.*10000000000"):
        torch.ops.leanattn.schedule(lengths, 1, 100_000, 100, 64, 3, 64, 100_000)
