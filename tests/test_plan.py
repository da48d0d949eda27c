"""csrc/plan/plan_decode.h: what the host decides of a decode, with a device made here, no tensors
and no GPU. What the cost model prefers is test_cost_model.py's."""

from pathlib import Path

import pytest
from conftest import native_folder

# An H200's: 132 SMs, clusters of 2 to 8 CTAs at once.
H200 = dict(capability=90, row_counts=[8, 16, 32, 64, 128], num_sms=132,
            max_clusters=[0, 0, 66, 42, 30, 24, 20, 15, 15])  # fmt: skip
A100 = dict(capability=80, row_counts=[8, 16, 32, 64], num_sms=108, max_clusters=[])
KNOBS = ["LEANATTN_LAYOUT", "LEANATTN_NUM_UNITS", "LEANATTN_HEAD_PAIRS"]


@pytest.fixture(scope="session")
def planner(request):
    from native.build import load_module

    source = Path(__file__).parent / "native" / "planner.cpp"
    return load_module(source, native_folder(request.config))


@pytest.fixture(autouse=True)
def no_knobs(monkeypatch):
    for knob in KNOBS:
        monkeypatch.delenv(knob, raising=False)


@pytest.fixture
def plan(planner):
    """A function that plans a decode: of device's description, and of Params' arguments."""

    def run(device=H200, batch=1, num_heads_kv=8, group_size=4, capacity=8192, **options):
        sizes = dict(batch=batch, num_heads_kv=num_heads_kv, group_size=group_size)
        params = planner.Params(**sizes, capacity=capacity, **options)
        return planner.plan_decode(params, planner.Device(**device))

    return run


@pytest.mark.parametrize("group_size, seqlen_q, rows, row_blocks",
                         [(1, 1, 8, 1), (8, 1, 8, 1), (9, 1, 16, 1), (8, 4, 32, 1), (71, 1, 128, 1),
                          (16, 9, 128, 2), (128, 2, 128, 2)])  # fmt: skip
def test_rows_of_an_item(group_size, seqlen_q, rows, row_blocks, plan):
    planned = plan(group_size=group_size, seqlen_q=seqlen_q)
    assert (planned.rows_per_item, planned.row_blocks) == (rows, row_blocks)


def test_rows_of_ragged_queries_are_those_of_an_average_sequence(plan):
    assert plan(batch=4, total_q=10, group_size=4).rows_per_item == 16  # ceil(10 / 4) * 4 = 12


def test_rows_of_a_batch_invariant_item_do_not_depend_on_the_queries(plan):
    for seqlen_q in (1, 5):
        assert plan(group_size=4, seqlen_q=seqlen_q, batch_invariant=True).rows_per_item == 8
    assert plan(group_size=71, batch_invariant=True).rows_per_item == 16


def test_few_items_go_by_clusters_where_there_are_any(plan):
    planned = plan()
    assert planned.cluster_size == planned.team_size > 1 and planned.items_per_team == 1
    assert planned.num_units == 8 * planned.team_size
    assert plan(batch_invariant=True).cluster_size == 1  # a fixed tree is not folded in clusters
    assert plan(device=A100).cluster_size == 1


def test_a_launch_whose_sequences_are_alike_knows_its_line(plan):
    planned = plan()
    assert planned.is_uniform and planned.num_tiles == 8 * 8192 // 128
    for unknown in (dict(with_lengths=True), dict(total_q=1)):
        assert not plan(**unknown).is_uniform


def test_lengths_on_the_device_keep_room_for_stream_k(plan):
    """All SMs, as far as whole teams go, for more than one sequence; one is alike to itself."""
    assert plan(batch=8, capacity=4096, with_lengths=True).num_units >= 128
    one = plan(with_lengths=True)
    assert one.num_units == 8 * one.team_size


def test_units_are_no_more_than_tiles(plan, monkeypatch):
    monkeypatch.setenv("LEANATTN_LAYOUT", "stream_k")
    assert plan(num_heads_kv=3, capacity=300).num_units == 9
    assert plan(capacity=8192).num_units == 132


def test_pairs_of_heads(plan, planner, monkeypatch):
    """Read as one of twice the head dim: where that is expected to be faster, or where forced."""
    large = dict(batch=64, num_heads_kv=16, group_size=1, head_dim=64, capacity=8192)
    paired = plan(**large)
    assert paired.head_pairs and paired.num_heads_kv == 8 and paired.head_dim == 128
    assert not plan(device=A100, **large).head_pairs  # not known to be faster
    assert not plan(**large | dict(group_size=16)).head_pairs  # too many rows
    assert not plan(**large | dict(num_heads_kv=15)).head_pairs
    monkeypatch.setenv("LEANATTN_HEAD_PAIRS", "0")
    assert not plan(**large).head_pairs
    monkeypatch.setenv("LEANATTN_HEAD_PAIRS", "1")
    assert plan(device=A100, **large).head_pairs
    # Planned twice, and each time the device is asked for the rows that there are then.
    device = planner.Device(**H200)
    planner.plan_decode(planner.Params(**large | dict(group_size=8)), device)
    assert device.asked_rows == [8, 16]


@pytest.mark.parametrize(
    "text, team_size, cluster_size",
    [("teams:1", 1, 1), ("teams:5", 5, 1), ("clusters:4", 4, 4), ("clusters:2*3", 6, 2)],
)
def test_a_forced_layout(text, team_size, cluster_size, plan, monkeypatch):
    monkeypatch.setenv("LEANATTN_LAYOUT", text)
    planned = plan()
    assert (planned.team_size, planned.cluster_size) == (team_size, cluster_size)


def test_a_forced_number_of_units(plan, planner, monkeypatch):
    monkeypatch.setenv("LEANATTN_NUM_UNITS", "7")
    for planned in (plan(), plan(total_q=1)):
        assert planned.num_units == 7 and planned.items_per_team == 0
    params = planner.Params(batch=1, num_heads_kv=8, group_size=4, capacity=8192)
    assert planner.plan_decode_on_cpu(params, 3).num_units == 7


def test_on_the_cpu_units_are_threads(planner):
    params = planner.Params(batch=2, num_heads_kv=8, group_size=4, capacity=8192)
    planned = planner.plan_decode_on_cpu(params, 3)
    assert planned.num_units == 3 and planned.rows_per_item == 64


@pytest.mark.parametrize("knobs, message, options", [
    (dict(LEANATTN_LAYOUT="rows"),
     "LEANATTN_LAYOUT must be 'stream_k', 'teams:N', 'clusters:N' or 'clusters:N*M', got 'rows'",
     {}),
    (dict(LEANATTN_LAYOUT="teams:x"),
     "LEANATTN_LAYOUT must hold a number from 1 to 65536, got 'x'", {}),
    (dict(LEANATTN_LAYOUT="clusters:9"),
     "LEANATTN_LAYOUT must name clusters of 2 to 8 CTAs on a GPU that has them, got 'clusters:9'",
     {}),
    (dict(LEANATTN_LAYOUT="clusters:2"),
     "LEANATTN_LAYOUT must name clusters of 2 to 8 CTAs on a GPU that has them, got 'clusters:2'",
     dict(device=A100)),
    (dict(LEANATTN_LAYOUT="clusters:2"),
     "LEANATTN_LAYOUT must not name clusters with batch_invariant, got 'clusters:2'",
     dict(batch_invariant=True)),
    (dict(LEANATTN_LAYOUT="teams:65536"),
     "LEANATTN_LAYOUT must ask for fewer than 2^31 units, got 'teams:65536'",
     dict(batch=65536, capacity=1)),
    (dict(LEANATTN_LAYOUT="teams:2"),
     "LEANATTN_LAYOUT must be 'stream_k' or unset with cu_seqlens_q, got 'teams:2'",
     dict(total_q=3)),
    (dict(LEANATTN_LAYOUT="teams:2", LEANATTN_NUM_UNITS="3"),
     "LEANATTN_LAYOUT must be 'stream_k' or unset with LEANATTN_NUM_UNITS, got 'teams:2'", {}),
    (dict(LEANATTN_NUM_UNITS="0"),
     "LEANATTN_NUM_UNITS must hold a number from 1 to 65536, got '0'", {}),
    (dict(LEANATTN_HEAD_PAIRS="yes"),
     "LEANATTN_HEAD_PAIRS must be '0', '1' or unset, got 'yes'", {}),
    ({}, "k_cache must hold at most 2147483646 tiles of 128 tokens over all heads, got 17179869184",
     dict(batch=1024, num_heads_kv=1, capacity=2**31 - 1)),
])  # fmt: skip
def test_what_cannot_be_planned(knobs, message, options, plan, planner, monkeypatch):
    for knob, value in knobs.items():
        monkeypatch.setenv(knob, value)
    with pytest.raises(planner.PlanError) as error:
        plan(**options)
    assert str(error.value) == message
