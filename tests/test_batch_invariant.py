"""batch_invariant=True: a sequence's (out, lse) has the same bits in whatever company it is.

Each test computes one thing in two ways and compares bits; test_against_fp64 holds one of the ways
to the reference.
"""

import math

import pytest
import torch
from cases import check, int32, make_case, offsets, poison_unseen, run, sharp_dtype
from paging import cut_into_pages
from reference import assert_same_bits
from test_layouts import CACHE_LAYOUTS

import leanattn

pytestmark = pytest.mark.usefixtures("loader", "several_units")

UNIT_COUNTS = [1, 2, 3, 5, 16, 64, 1000]

# One long sequence of several chunks, whatever a chunk is; ends next to tiles; nothing; one token.
LENGTHS = (700, 0, 129, 1, 2500, 64, 513, 1024)

OPTIONS = {
    "mha": dict(heads=(2, 2)),
    "gqa": dict(heads=(8, 2)),
    "71-heads-a-group": dict(heads=(71, 1), dims=(16, 16)),
    "narrow-values": dict(heads=(2, 1), dims=(192, 128)),
    "several-queries": dict(heads=(8, 2), seqlen_q=5),
    "not-causal": dict(heads=(4, 2), seqlen_q=3, causal=False),
    "ragged-queries": dict(heads=(4, 1), query_lengths=(3, 1, 0, 2, 7, 1, 16, 4)),
    "window": dict(heads=(4, 2), seqlen_q=3, window_left=400),
    "sinks": dict(heads=(4, 2), sinks=True),
    "all-options": dict(heads=(6, 2), seqlen_q=2, window_left=600, sinks=True, softcap=5.0,
                        alibi="batch", softmax_scale=0.2),
}  # fmt: skip
FEW = ["gqa", "several-queries", "ragged-queries", "window", "sinks"]
PER_SEQUENCE = ("q", "k_cache", "v_cache", "cache_seqlens")


@pytest.fixture
def several_units(device, force_units):
    """On the CPU there may be one unit by default, and with one everything is invariant."""
    if device == "cpu":
        force_units(7)


def invariant_case(device, dtype, name, lengths=LENGTHS, **more):
    """Strong scores, so that another order of the same sum has other bits."""
    return make_case(
        device, dtype, lengths=lengths, scale_q=2.0, batch_invariant=True, **OPTIONS[name], **more
    )


def rows_of(case, sequence):
    """The rows of q, out and lse that belong to one sequence."""
    if "cu_seqlens_q" not in case:
        return slice(sequence, sequence + 1)
    begin, end = case["cu_seqlens_q"][sequence : sequence + 2].tolist()
    return slice(begin, end)


def select(case, sequences):
    """A batch of these sequences of a case, in this order."""
    chosen = dict(case)
    index = torch.tensor(sequences, dtype=torch.long, device=case["q"].device)
    for name in PER_SEQUENCE:
        chosen[name] = case[name] if name == "q" else case[name][index]
    if "cu_seqlens_q" in case:
        rows = [case["q"][rows_of(case, sequence)] for sequence in sequences]
        chosen["q"] = torch.cat(rows)
        chosen["cu_seqlens_q"] = offsets([len(part) for part in rows], case["q"].device)
    else:
        chosen["q"] = case["q"][index]
    if case.get("alibi_slopes") is not None and case["alibi_slopes"].dim() == 2:
        chosen["alibi_slopes"] = case["alibi_slopes"][index]
    return chosen


def assert_same_result(case, changed):
    """The same sequences in the same order: all bits of out and lse."""
    for actual, expected in zip(run(changed), run(case)):
        assert_same_bits(actual, expected)


def assert_same_sequences(case, result, chosen, sequences):
    """`chosen` holds these sequences of `case`, whose result is given."""
    for actual, expected in zip(run(chosen), result):
        for place, sequence in enumerate(sequences):
            assert_same_bits(actual[rows_of(chosen, place)], expected[rows_of(case, sequence)])


@pytest.mark.parametrize("name", OPTIONS)
def test_against_fp64(name, device, dtype, force_units):
    """Invariant and wrong would pass every other test of this file."""
    for units in (1, 64):
        force_units(units)
        case = invariant_case(device, dtype, name)
        del case["batch_invariant"]
        check(case, batch_invariant=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_alone_and_in_a_batch(name, device):
    """A batch of one is given more units a sequence than a batch of eight."""
    case = invariant_case(device, sharp_dtype(device), name)
    result = run(case)
    for sequence in range(len(LENGTHS)):
        assert_same_sequences(case, result, select(case, [sequence]), [sequence])


@pytest.mark.parametrize("name", FEW)
def test_any_place_in_the_batch(name, device):
    """Backwards, and shifted by one: every sequence in another place, beside others."""
    case = invariant_case(device, sharp_dtype(device), name)
    result = run(case)
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [1, 2, 3, 4, 5, 6, 7, 0], [4, 4, 0, 4]):
        assert_same_sequences(case, result, select(case, order), order)


@pytest.mark.parametrize("copies", [1, 5, 40])
def test_any_company(copies, device):
    """Many short ones around a long one, or many as long: what a share of the work is changes."""
    case = invariant_case(device, sharp_dtype(device), "gqa")
    result = run(case)
    for other in (3, 0):
        sequences = [other] * copies + [4] + [other] * (copies // 2)
        assert_same_sequences(case, result, select(case, sequences), sequences)


@pytest.mark.parametrize("name", OPTIONS)
def test_any_number_of_units(name, device, force_units):
    """Cuts through a sequence fall elsewhere, its sums may not."""
    case = invariant_case(device, sharp_dtype(device), name)
    out, lse = run(case)
    for units in UNIT_COUNTS:
        force_units(units)
        again_out, again_lse = run(case)
        assert_same_bits(again_out, out)
        assert_same_bits(again_lse, lse)


def test_alone_under_many_units_is_in_a_batch_under_few(device, force_units):
    """Company and units together: one sequence spread over all, eight on one."""
    case = invariant_case(device, sharp_dtype(device), "several-queries")
    force_units(1)
    result = run(case)
    for units in (3, 64, 1000):
        force_units(units)
        for sequence in (0, 4, 6):
            assert_same_sequences(case, result, select(case, [sequence]), [sequence])


@pytest.mark.parametrize("name", FEW)
def test_any_capacity(name, device):
    """None of the free room behind a sequence counts."""
    case = invariant_case(device, sharp_dtype(device), name)
    longer = dict(case)
    for cache in ("k_cache", "v_cache"):
        room = torch.full_like(case[cache][:, :500], torch.nan)
        longer[cache] = torch.cat([case[cache], room], 1)
    assert_same_result(case, longer)


@pytest.mark.parametrize("name", ["gqa", "several-queries", "ragged-queries"])
@pytest.mark.parametrize("length", [1, 128, 513])
def test_length_given_or_not(name, length, device):
    """A full cache without cache_seqlens."""
    case = invariant_case(device, sharp_dtype(device), name, (length,) * 8, capacity=length)
    without = {name: value for name, value in case.items() if name != "cache_seqlens"}
    assert_same_result(case, without)


def paged(case, page_size, order=None):
    k_and_v, table = cut_into_pages([case["k_cache"], case["v_cache"]], page_size, order)
    return {**case, "k_cache": k_and_v[0], "v_cache": k_and_v[1], "block_table": table}


@pytest.mark.parametrize("page_size", [1, 3, 8, 16, 24, 64, 256, 4096])
def test_any_page_size_and_permutation(page_size, device, dtype):
    """Pages in order or not; NaN in those that nobody has."""
    case = invariant_case(device, dtype, "several-queries")
    pages = paged(case, page_size)["k_cache"].shape[0]
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(page_size))
    for changed in (paged(case, page_size), paged(case, page_size, order)):
        assert_same_result(case, changed)


@pytest.mark.parametrize("name", OPTIONS)
def test_paged_is_contiguous(name, device):
    case = invariant_case(device, sharp_dtype(device), name)
    assert_same_result(case, paged(case, 16))


def test_pages_under_any_number_of_units(device, force_units):
    """A unit that starts in the middle of a sequence, of a chunk and of a page."""
    case = invariant_case(device, sharp_dtype(device), "gqa")
    for units in UNIT_COUNTS:
        force_units(units)
        assert_same_result(case, paged(case, 16))


def test_shared_pages(device):
    """A prefix in pages that two sequences share, and in pages of their own."""
    case = invariant_case(device, sharp_dtype(device), "gqa", (1500, 1400), poison=None)
    for cache in ("k_cache", "v_cache"):
        case[cache][1, :1024] = case[cache][0, :1024]
    shared = paged(case, 64)
    shared["block_table"][1, :16] = shared["block_table"][0, :16]
    assert_same_result(case, shared)


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_any_layout(layout, device):
    """Strides choose the loader, and that chooses nothing else."""
    case = invariant_case(device, sharp_dtype(device), "gqa")
    strided = {name: layout(case[name]) for name in ("k_cache", "v_cache")}
    assert_same_result(case, {**case, **strided})


@pytest.mark.gpu
def test_any_loader(device, monkeypatch):
    """Copies by tensor maps and by cp.async bring the same tiles."""
    case = invariant_case(device, sharp_dtype(device), "several-queries")
    results = []
    for name in ("tma", "cp_async"):
        monkeypatch.setenv("LEANATTN_LOADER", name)
        results += [run(case), run(paged(case, 64))]
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_queries_ragged_or_not(rows, device):
    """[B, Sq, Hq, D] and the same rows as [B * Sq, Hq, D], beside sequences of more and of fewer
    rows: the packing of rows depends on dtype and head dim alone."""
    lengths = (1500, 40, 777)
    case = make_case(device, sharp_dtype(device), heads=(8, 2), seqlen_q=rows, lengths=lengths,
                     scale_q=2.0, batch_invariant=True)  # fmt: skip
    out, lse = run(case)
    ragged = {**case, "q": case["q"].flatten(0, 1), "cu_seqlens_q": offsets([rows] * 3, device)}
    ragged_out, ragged_lse = run(ragged)
    assert_same_bits(ragged_out, out.flatten(0, 1))
    assert_same_bits(ragged_lse, lse.flatten(0, 1))

    other_rows = (rows, 1, 30)
    first_row = case["q"][0]
    others = torch.randn_like(case["q"][:1, :1]).expand(1, 31, -1, -1)[0]
    mixed = {**ragged, "q": torch.cat([first_row, others])}
    mixed["cu_seqlens_q"] = offsets(other_rows, device)
    mixed_out, mixed_lse = run(mixed)
    assert_same_bits(mixed_out[:rows], out[0])
    assert_same_bits(mixed_lse[:rows], lse[0])


@pytest.mark.parametrize("name", FEW)
def test_what_no_row_sees_changes_no_bit(name, device):
    """NaN and zeros behind a sequence and before its window."""
    case = invariant_case(device, sharp_dtype(device), name, poison=0.0)
    out, lse = run(case)
    poison_unseen(case, torch.nan)
    poisoned_out, poisoned_lse = run(case)
    assert_same_bits(poisoned_out, out)
    assert_same_bits(poisoned_lse, lse)


def test_counters_change_no_bit(device, force_units):
    """With the caller's counters and without, which are zero again after each call."""
    case = invariant_case(device, sharp_dtype(device), "gqa")
    counters = leanattn.counters(torch.device(device), 1024)
    for units in (2, 64, 3):
        force_units(units)
        assert_same_result(case, {**case, "counters": counters})
        assert (counters == 0).all()


def test_same_bits_in_every_run(device, force_units, repeats):
    """The merge does not depend on who arrives first."""
    force_units(64)
    case = invariant_case(device, sharp_dtype(device), "several-queries")
    out, lse = run(case)
    for _ in range(repeats):
        again_out, again_lse = run(case)
        assert_same_bits(again_out, out)
        assert_same_bits(again_lse, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("counted", [False, True], ids=["", "counters"])
@pytest.mark.parametrize("pages", [None, 16], ids=["contiguous", "paged"])
def test_graph_replays_are_eager_calls_alone(pages, counted, device, loader):
    """One graph, other lengths in each replay: the bits of an eager call of each sequence alone."""
    lengths = (3000, 3000, 3000, 3000)
    case = make_case(device, torch.bfloat16, heads=(8, 2), seqlen_q=2, lengths=lengths,
                     scale_q=2.0, poison=None, batch_invariant=True)  # fmt: skip
    called = dict(case) if pages is None else paged(case, pages)
    if counted:
        called["counters"] = leanattn.counters(torch.device(device), 1024)
    leanattn.warmup(device)
    run(called)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(called)
    for lengths in ((3000, 1, 0, 129), (64, 2048, 1500, 3000), (0, 0, 0, 0), (777, 777, 777, 777)):
        case["cache_seqlens"].copy_(int32(lengths, device))
        graph.replay()
        for sequence in range(4):
            alone_out, alone_lse = run(select(case, [sequence]))
            assert_same_bits(out[sequence], alone_out[0])
            assert_same_bits(lse[sequence], alone_lse[0])


def bytes_asked_for(call):
    """Of GPU memory, while `call` runs. What torch's allocator gives for them may be a MiB more a
    tensor, as its blocks are."""

    def bytes_now(kind):
        return torch.cuda.memory_stats()[f"requested_bytes.all.{kind}"]

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = bytes_now("current")
    call()
    return bytes_now("peak") - before


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [1, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_batch_invariant_workspace(head_dim, group_size, device):
    """The bound of docs/semantics.md, with a counter a unit and each part on 256 bytes."""
    capacity = 20000
    shape = (3, capacity, 2, head_dim)
    q = torch.zeros(3, 2 * group_size, head_dim, dtype=torch.bfloat16, device=device)
    k, v = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(q)
    lengths = int32([capacity, 5, 777], device)
    used = bytes_asked_for(lambda: leanattn.decode(q, k, v, lengths, batch_invariant=True, out=out))
    units = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = -(-capacity // (128 if head_dim <= 128 else 64 if head_dim <= 256 else 32))
    nodes = 2 * (1 + math.ceil(math.log2(tiles)))
    rows = 8 if group_size <= 8 and head_dim <= 256 else 16
    assert 0 < used <= units * nodes * rows * (11 * head_dim + 16) + 4096


@pytest.mark.gpu
def test_whole_items_take_memory_for_waiting_states_alone(device, monkeypatch):
    """Six items that nobody cuts, on six units: neither partials nor tickets."""
    monkeypatch.setenv("LEANATTN_LAYOUT", "teams:1")
    q = torch.zeros(3, 2, 128, dtype=torch.bfloat16, device=device)
    k, v = (torch.zeros(3, 20000, 2, 128, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(q)
    used = bytes_asked_for(lambda: leanattn.decode(q, k, v, batch_invariant=True, out=out))
    levels = 1 + math.ceil(math.log2(157))
    assert 0 < used <= 6 * levels * 8 * 128 // 4 * 24 + 512
