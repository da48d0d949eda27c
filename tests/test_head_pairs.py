"""Two KV heads with short rows read as one, on the GPU, which LEANATTN_HEAD_PAIRS forces.

test_emulated_kernel.py has the same without a GPU.
"""

import math

import pytest
import torch
from cases import check, make_case, run
from paging import LAYOUTS, paginate
from reference import assert_close, assert_same_bits
from test_needles import needle_case, tile_edges

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("loader")]


@pytest.fixture(params=["0", "1"], ids=["single", "pairs"])
def pairs(request, monkeypatch):
    monkeypatch.setenv("LEANATTN_HEAD_PAIRS", request.param)
    return request.param


@pytest.mark.parametrize("units", [1, 3, 64, None])
@pytest.mark.parametrize("heads", [(2, 2), (16, 16), (12, 4), (32, 8), (16, 2), (6, 3), (64, 4)])
def test_heads(heads, units, pairs, device, dtype, force_units):
    """The last two are no pairs: an odd number of heads, and too many rows."""
    if units is not None:
        force_units(units)
    check(make_case(device, dtype, heads=heads, lengths=(1000, 5, 0, 300)))
    check(make_case(device, dtype, heads=heads, lengths=None, batch=3, capacity=700))


@pytest.mark.parametrize("layout", ["stream_k", "teams:1", "teams:3", "clusters:2", "clusters:8"])
def test_layouts(layout, pairs, device, dtype, monkeypatch):
    if torch.cuda.get_device_capability()[0] < 9 and layout.startswith("clusters"):
        pytest.skip("needs clusters")
    monkeypatch.setenv("LEANATTN_LAYOUT", layout)
    for heads in ((8, 4), (16, 2)):
        check(make_case(device, dtype, heads=heads, lengths=(1500, 900)))


@pytest.mark.parametrize("seqlen_q", [2, 4])
def test_several_queries(seqlen_q, pairs, device, dtype):
    options = dict(heads=(4, 2), seqlen_q=seqlen_q, lengths=(1000, 3, 129))
    check(make_case(device, dtype, **options))
    check(make_case(device, dtype, window_left=100, **options))
    check(make_case(device, dtype, heads=(4, 2), lengths=(640, 129, 77), query_lengths=(3, 0, 5)))


def test_everything_that_happens_to_scores(pairs, device, dtype):
    check(make_case(device, dtype, heads=(8, 4), lengths=(700, 129), softcap=5.0, alibi="batch",
                    sinks=True))  # fmt: skip


@pytest.mark.parametrize("page_layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16, 24, 256])
def test_pages(page_size, page_layout, pairs, device, dtype):
    case = make_case(device, dtype, heads=(8, 4), lengths=(1000, 5, 129))
    assert_close(*run(paginate(case, page_size, layout=page_layout)), **case)


def test_needle_at_every_tile_edge(pairs, device, dtype):
    check(needle_case(device, dtype, tile_edges(777), 777))


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
@pytest.mark.parametrize("head", [0, 1])
def test_nan_stays_with_its_head(head, cache, pairs, device, dtype):
    case = make_case(device, dtype, heads=(8, 2), lengths=(300, 130))
    case[cache][0, 290, head, 5] = math.nan
    out, lse = check(case)
    others = [4, 5, 6, 7] if head == 0 else [0, 1, 2, 3]
    assert out[0, 0, others].isfinite().all() and lse[0, 0, others].isfinite().all()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_float8_heads_have_a_scale_each(cache, dim, pairs, device, dtype):
    for scales in ("one", "heads", "batch"):
        check(make_case(device, dtype, heads=(8, 4), dims=(dim, dim), lengths=(300, 5, 0, 700),
                        cache_dtype=cache, scales=scales))  # fmt: skip


def test_same_bits_in_every_run(pairs, device, dtype, repeats):
    case = make_case(device, dtype, heads=(16, 16), lengths=(5000, 300))
    out, lse = run(case)
    for _ in range(repeats):
        again, lse_again = run(case)
        assert_same_bits(again, out)
        assert_same_bits(lse_again, lse)


def test_batch_invariant_bits_know_no_pairs(device, dtype, monkeypatch):
    case = make_case(device, dtype, heads=(8, 4), lengths=(900, 133))
    results = []
    for value in ("0", "1"):
        monkeypatch.setenv("LEANATTN_HEAD_PAIRS", value)
        results.append(check(case, batch_invariant=True))
    for a, b in zip(*results):
        assert_same_bits(a, b)


def test_a_wrong_value_is_refused(device, monkeypatch):
    monkeypatch.setenv("LEANATTN_HEAD_PAIRS", "yes")
    case = make_case(device, torch.float16)
    with pytest.raises(RuntimeError, match="LEANATTN_HEAD_PAIRS must be '0', '1' or unset.*'yes'"):
        run(case)
