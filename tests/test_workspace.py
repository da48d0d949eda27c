"""csrc/plan/workspace.h: a launch has memory for every partial that its layout can leave, and none
for what it cannot use."""

import math

import pytest
from hypothesis import given
from test_schedule import (
    UNITS,
    cases,
    examples,
    items_in_order,
    make_case,
    make_problem,
    schedule,
    team_layouts,
)  # fmt: skip

HEADS, CAPACITY = 2, 37  # 10 tiles of 4 tokens
UNIFORM = make_case(batch=3, num_heads_kv=HEADS, capacity=CAPACITY)
ONE_SEQUENCE = make_case([CAPACITY], num_heads_kv=HEADS)
RAGGED = make_case([CAPACITY, 5, 9], num_heads_kv=HEADS)
NODES = 2 * (1 + math.ceil(math.log2(10)))


def plan(headers, case, layout, **options):
    return headers.plan_workspace(
        make_problem(headers, case), headers.Layout(*layout),
        is_uniform=case["cache_seqlens"] is None and case["cu_seqlens_q"] is None, **options,
    )  # fmt: skip


def parts(plan):
    return plan.counters, plan.partial_stats, plan.partial_o, plan.fold_states


WHOLE_FOR_SURE = {
    "uniform, whole items": (UNIFORM, (6, 1, 1)),
    "uniform, two items a unit": (UNIFORM, (3, 2, 1)),
    "one sequence, whole items": (ONE_SEQUENCE, (2, 1, 1)),
    "one unit": (RAGGED, (1, 0, 1)),
}
MAYBE_CUT = {
    "stream-K": (UNIFORM, (7, 0, 1)),
    "teams of three": (UNIFORM, (18, 1, 3)),
    "whole items, unless the device finds them unlike": (RAGGED, (6, 1, 1)),
}


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("name", [*WHOLE_FOR_SURE, *MAYBE_CUT])
def test_only_what_is_used(name, batch_invariant, headers):
    """A fixed tree that nobody cuts needs its waiting states alone."""
    case, layout = {**WHOLE_FOR_SURE, **MAYBE_CUT}[name]
    counters, stats, o, fold = parts(plan(headers, case, layout, batch_invariant=batch_invariant))
    units, nodes = layout[0], NODES if batch_invariant else 1
    rows = units * 2 * nodes * case["rows_per_item"]
    # [units, nodes / 2, rows_per_item, 128 / 4] states of six floats.
    assert fold == (units * (nodes // 2) * case["rows_per_item"] * 32 * 24 if nodes > 1 else 0)
    if name in WHOLE_FOR_SURE:
        assert (counters, stats, o) == (0, 0, 0)
    else:
        assert counters == 256
        assert rows * 8 <= stats < rows * 8 + 256
        assert rows * 128 * 4 <= o < rows * 128 * 4 + 256


def test_a_cluster_merges_in_its_own_memory(headers):
    """Where it is sure to be one; else stream-K may take its place."""
    assert plan(headers, UNIFORM, (12, 1, 2), cluster_size=2).size() == 0
    assert plan(headers, ONE_SEQUENCE, (4, 1, 2), cluster_size=2).size() == 0
    assert min(parts(plan(headers, RAGGED, (12, 1, 2), cluster_size=2))[:3]) > 0
    # Several meet in global memory.
    assert min(parts(plan(headers, UNIFORM, (24, 1, 4), cluster_size=2))[:3]) > 0


def test_what_the_caller_or_the_cpu_has_itself(headers):
    layout = MAYBE_CUT["stream-K"][1]
    options = dict(batch_invariant=True)
    all_parts = parts(plan(headers, UNIFORM, layout, **options))
    assert min(all_parts) > 0
    assert parts(plan(headers, UNIFORM, layout, owns_counters=False, **options)) == (
        0, *all_parts[1:],
    )  # fmt: skip
    assert parts(plan(headers, UNIFORM, layout, on_cuda=False, **options)) == (*all_parts[:3], 0)


@pytest.mark.parametrize("dims, padded", [((8, 64), 64), ((72, 40), 128), ((128, 136), 256)])
def test_waiting_states_are_as_wide_as_the_kernel(dims, padded, headers):
    case, layout = MAYBE_CUT["stream-K"]
    options = dict(head_dim=dims[0], head_dim_v=dims[1], batch_invariant=True)
    fold = plan(headers, case, layout, **options).fold_states
    assert fold == 7 * NODES // 2 * case["rows_per_item"] * padded // 4 * 24


def assert_has_room(headers, case, layout, table):
    """For tickets and partials of all segments that are not whole, in rows of 128 floats."""
    cut = table[~table["whole"]]
    if len(cut) == 0:
        return
    room = plan(headers, case, layout)
    rows = (cut["partial"].max() + 1) * case["rows_per_item"]
    assert room.partial_stats >= rows * 8
    assert room.partial_o >= rows * 128 * 4
    few_items = case["cu_seqlens_q"] is None and len(items_in_order(case)) <= layout[0]
    numbers = cut["counter_of_item" if few_items else "counter_of_unit"]
    assert room.counters >= 4 * (numbers.max() + 1)


@examples
@given(cases(), UNITS)
def test_every_partial_of_stream_k_has_room(headers, case, units):
    _, _, table = schedule(headers, case, units)
    assert_has_room(headers, case, (units, 0, 1), table)


@examples
@given(team_layouts())
def test_every_partial_of_a_team_has_room(headers, layout):
    case, items_per_team, team_size = layout
    num_teams = -(-len(items_in_order(case)) // items_per_team)
    layout = (num_teams * team_size, items_per_team, team_size)
    table = headers.walk_teams(make_problem(headers, case), headers.Layout(*layout), False)
    assert_has_room(headers, case, layout, table)
