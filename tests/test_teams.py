"""Every layout of the work on the GPU: stream-K, whole items, teams of CTAs, clusters.

`LEANATTN_LAYOUT` forces one for all lengths; without it the cost model chooses, and the device may
still take stream-K where lengths differ.
"""

import pytest
import torch
from cases import check, int32, make_case, run
from paging import paginate
from reference import assert_close, assert_same_bits
from test_needles import needle_case, tile_edges

import leanattn

LAYOUTS = ["stream_k", "teams:1", "teams:3", "teams:16", "clusters:2", "clusters:3",
           "clusters:8", "clusters:2*3", "clusters:4*8"]  # fmt: skip
CASES = {
    "uniform": dict(lengths=None, batch=3, capacity=1000),
    "one-sequence": dict(lengths=(1500,)),
    "ragged": dict(lengths=(5, 900, 128, 0, 2000)),
    "all-empty": dict(lengths=(0, 0)),
    "many-short": dict(lengths=tuple(range(1, 200))),
    "window": dict(lengths=(900, 100, 3000), window_left=300, seqlen_q=2),
    "row-blocks": dict(lengths=(400, 1200), heads=(71, 1), seqlen_q=2),
    "more-queries-than-keys": dict(lengths=(3, 700), seqlen_q=9, heads=(8, 2)),
    "sinks": dict(lengths=(640, 129), sinks=True, heads=(16, 1)),
}

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("loader")]


@pytest.fixture(params=LAYOUTS)
def layout(request, device, monkeypatch):
    if torch.cuda.get_device_capability()[0] < 9 and request.param.startswith("clusters"):
        pytest.skip("needs clusters")
    monkeypatch.setenv("LEANATTN_LAYOUT", request.param)
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_against_fp64(name, layout, device):
    for dims in ((64, 64), (128, 128), (192, 256)):
        check(make_case(device, torch.float16, dims=dims, **CASES[name]))


@pytest.mark.parametrize("dims", [(64, 64), (192, 128)], ids=["128-token-tile", "64-token-tile"])
def test_needle_at_every_tile_edge(dims, layout, device):
    check(needle_case(device, torch.float16, tile_edges(777), 777, dims=dims))


@pytest.mark.parametrize("group_size", [1, 8, 16, 32, 64])
def test_every_row_tile(group_size, layout, device):
    for dims in ((64, 64), (128, 128), (256, 256)):
        check(make_case(device, torch.bfloat16, heads=(2 * group_size, 2), dims=dims,
                        lengths=(1000, 300)))  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        dict(lengths=None, batch=3, capacity=500),
        dict(lengths=(5, 900, 32, 0)),
        dict(lengths=(1500,)),
    ],
)
def test_latent(options, layout, device, dtype):
    check(make_case(device, dtype, heads=(16, 1), dims=(576, 512), values_in_keys=True, **options))


@pytest.mark.parametrize("name", ["uniform", "ragged", "row-blocks"])
def test_same_bits_in_every_run_and_counters_stay_zero(name, layout, device, repeats):
    case = make_case(device, torch.bfloat16, dims=(128, 128), **CASES[name])
    counters = leanattn.counters(torch.device(device), 4096)
    out, lse = run(case)
    for _ in range(repeats):
        again, lse_again = run(case, counters=counters)
        assert_same_bits(again, out)
        assert_same_bits(lse_again, lse)
    assert not counters.any()


def test_graph_replays_with_other_lengths(layout, device):
    case = make_case(device, torch.bfloat16, lengths=(2000, 2000, 2000), poison=None)
    leanattn.warmup(device)
    run(case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(case)
    for lengths in ((2000, 2000, 2000), (1, 0, 1999), (0, 0, 0), (640, 650, 660), (2000, 5, 5)):
        case["cache_seqlens"].copy_(int32(lengths, device))
        graph.replay()
        assert_close(out, lse, **case)


@pytest.mark.parametrize("heads", [(32, 8), (16, 16), (64, 1), (40, 10), (71, 1)])
@pytest.mark.parametrize("lengths", [(3000,) * 2, (3000, 10, 2900), (700,) * 16])
def test_chosen_layouts(lengths, heads, device):
    """No layout forced: what a user gets, with lengths and without."""
    case = make_case(device, torch.bfloat16, heads=heads, dims=(128, 128), lengths=lengths)
    check(case)
    if len(set(lengths)) == 1:
        for name in ("k_cache", "v_cache"):
            case[name] = case[name][:, : lengths[0]]
        del case["cache_seqlens"]
        check(case)


@pytest.mark.parametrize("group_size", [1, 12])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
def test_batch_invariant_under_every_layout(dims, group_size, device, monkeypatch):
    """Long items: their tree has more levels than shared memory holds."""
    case = make_case(device, torch.bfloat16, heads=(3 * group_size, 3), dims=dims, lengths=None,
                     batch=2, capacity=17000, scale_q=2.0)  # fmt: skip
    results = []
    for layout in ("stream_k", "teams:1", "teams:5"):
        monkeypatch.setenv("LEANATTN_LAYOUT", layout)
        results.append(check(case, batch_invariant=True))
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])
    monkeypatch.setenv("LEANATTN_LAYOUT", "clusters:2")
    message = "LEANATTN_LAYOUT.*(batch_invariant|on a GPU that has them)"
    with pytest.raises(RuntimeError, match=message):
        run(case, batch_invariant=True)


def test_paged_caches_of_whole_items(device, monkeypatch):
    """The walk that fetches page ids ahead asks for segments when there are none left."""
    monkeypatch.setenv("LEANATTN_LAYOUT", "teams:1")
    case = make_case(device, torch.bfloat16, lengths=(300, 0, 450, 0, 0))
    check_paged = paginate(case, 64)
    out, lse = run(check_paged)
    assert_close(out, lse, **case)
    empty = {**check_paged, "block_table": check_paged["block_table"][:, :0]}
    out, lse = run(empty)
    assert not out.any() and (lse == -torch.inf).all()


def test_ragged_queries_go_by_stream_k_alone(device, monkeypatch):
    case = make_case(device, torch.float16, lengths=(640, 129, 77), query_lengths=(3, 0, 5))
    monkeypatch.setenv("LEANATTN_LAYOUT", "stream_k")
    check(case)
    for text in ("teams:1", "clusters:2", "whole"):
        monkeypatch.setenv("LEANATTN_LAYOUT", text)
        with pytest.raises(RuntimeError, match=f"LEANATTN_LAYOUT.*cu_seqlens_q.*'{text}'"):
            run(case)


def test_wrong_layouts_are_refused(device, monkeypatch):
    case = make_case(device, torch.float16)
    for text in ("clusters:1", "clusters:9", "teams:0", "teams:", "whole", "teams:4x", "teams:2*2",
                 "clusters:2*", "clusters:2*0"):  # fmt: skip
        monkeypatch.setenv("LEANATTN_LAYOUT", text)
        with pytest.raises(RuntimeError, match="LEANATTN_LAYOUT"):
            run(case)
