"""Many query rows a KV head on the GPU: by wgmma where that is, else by mma."""

import math

import pytest
from cases import check, make_case, poison_unseen, run
from paging import paginate
from reference import assert_close, assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("loader")]

ROWS = [17, 31, 32, 33, 48, 63, 64, 65, 71, 127, 128, 129, 200]
DIMS = [(64, 64), (128, 128), (40, 64), (104, 72), (256, 256), (192, 136)]


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows, dims, device, dtype):
    check(make_case(device, dtype, heads=(2 * rows, 2), dims=dims, lengths=(1000, 0, 129)))


@pytest.mark.parametrize("seqlen_q", [2, 5, 16])
@pytest.mark.parametrize("window_left", [-1, 0, 100])
def test_several_queries(seqlen_q, window_left, device, dtype):
    for dims in ((64, 64), (128, 128), (256, 256)):
        check(make_case(device, dtype, heads=(16, 2), dims=dims, seqlen_q=seqlen_q,
                        window_left=window_left, lengths=(1000, 3, 129)))  # fmt: skip


def test_everything_that_happens_to_scores(device, dtype):
    for dims in ((64, 64), (128, 128), (256, 256)):
        check(make_case(device, dtype, heads=(40, 1), dims=dims, seqlen_q=3, lengths=(700, 129),
                        softcap=5.0, alibi="batch", sinks=True))  # fmt: skip


@pytest.mark.parametrize("units", [1, 7, 64])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_no_row_sees_changes_no_bit(poison, units, device, dtype, force_units):
    force_units(units)
    for dims in ((64, 64), (128, 128), (256, 256)):
        for rows in (20, 50, 100):
            case = make_case(device, dtype, heads=(rows, 1), dims=dims, seqlen_q=2, poison=0.0,
                             window_left=300, lengths=(1000, 5, 129))  # fmt: skip
            out, lse = check(case)
            poison_unseen(case, poison)
            poisoned_out, poisoned_lse = run(case)
            assert_same_bits(poisoned_out, out)
            assert_same_bits(poisoned_lse, lse)


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_nan_shows_only_where_it_is_seen(cache, device, dtype):
    """At the mask's edge and the window's, where rows of one item see different keys."""
    for dims in ((64, 64), (128, 128), (256, 256)):
        for rows in (20, 50, 100):
            case = make_case(device, dtype, heads=(rows, 1), dims=dims, seqlen_q=3,
                             window_left=150, lengths=(300, 130))  # fmt: skip
            for key in (299, 298, 300 - 3 - 150 + 1):
                case[cache][0, key, 0, key % dims[1]] = math.nan
            check(case)


@pytest.mark.parametrize("page_size", [1, 16, 256])
def test_pages(page_size, device, dtype):
    for dims in ((64, 64), (128, 128), (256, 256)):
        case = make_case(device, dtype, heads=(71, 1), dims=dims, lengths=(1000, 5, 129))
        assert_close(*run(paginate(case, page_size)), **case)


def test_same_bits_in_every_run(device, dtype, repeats):
    case = make_case(device, dtype, heads=(64, 1), dims=(128, 128), lengths=(5000, 300))
    out, lse = run(case)
    for _ in range(repeats):
        again, lse_again = run(case)
        assert_same_bits(again, out)
        assert_same_bits(lse_again, lse)
