"""NaN and Inf: unseen they change nothing, seen they show exactly where they are seen."""

import math

import pytest
import torch
from cases import check, make_case, poison_unseen, run, sharp_dtype
from reference import assert_close, assert_same_bits

pytestmark = pytest.mark.usefixtures("loader")

POISONS = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(
    "options",
    [
        dict(lengths=(0, 1, 63, 65, 127, 129, 200)),
        dict(lengths=(0, 1, 63, 65, 127, 129, 200), dims=(192, 128)),
        dict(lengths=(200, 40, 3), seqlen_q=5),
        dict(lengths=(400, 129, 3), window_left=70),
        dict(lengths=(400, 129, 3), window_left=70, seqlen_q=6),
        dict(lengths=(300, 129, 4), window_left=9, causal=False, seqlen_q=4),
        dict(lengths=(200, 40, 9), query_lengths=(3, 0, 12)),
        dict(lengths=(200, 40, 9), sinks=True, alibi="heads", softcap=4.0),
    ],
    ids=lambda options: "-".join(options),
)
def test_what_no_row_sees_changes_no_bit(options, poison, device, dtype):
    """Beyond the length and before the window a zero weight times NaN would still be NaN; the
    result has the very bits that it has with zeros there."""
    case = make_case(device, dtype, poison=0.0, **options)
    out, lse = check(case)
    poison_unseen(case, poison)
    poisoned_out, poisoned_lse = run(case)
    assert_same_bits(poisoned_out, out)
    assert_same_bits(poisoned_lse, lse)


@pytest.mark.parametrize("units", [1, 3, 64])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_nan_in_a_visible_key(cache, units, device, dtype, force_units):
    """NaN in the rows and heads that see the key and in no others, also where rows that see it
    and rows that do not share a tile, and across a fixup."""
    force_units(units)
    length, seqlen_q = 300, 6
    for position in (0, 64, 200, length - seqlen_q, length - 3, length - 1):
        case = make_case(device, dtype, lengths=(length, 5), seqlen_q=seqlen_q, heads=(6, 2))
        case[cache][0, position, 1] = math.nan
        out, lse = check(case)
        first_row = max(0, position - (length - seqlen_q))
        assert out[0, first_row:, 3:].isnan().all() and not out[0, :first_row].isnan().any()
        assert not out[0, :, :3].isnan().any() and not out[1].isnan().any()
        assert lse[0, first_row:, 3:].isnan().all() == (cache == "k_cache")


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_nan_that_leaves_the_window(cache, device, dtype):
    """The first rows still see the key, the later ones do not."""
    case = make_case(device, dtype, lengths=(300,), seqlen_q=8, window_left=100)
    case[cache][0, 300 - 8 - 100 + 3] = math.nan
    out, _ = check(case)
    assert out[0, :4].isnan().all() and not out[0, 4:].isnan().any()


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_nan_ahead_of_the_right_window(cache, device, dtype):
    """The last rows see the key, the first ones do not."""
    case = make_case(device, dtype, lengths=(300,), seqlen_q=8, causal=False, window_right=2)
    case[cache][0, 300 - 8 + 2 + 3] = math.nan
    out, _ = check(case)
    assert out[0, 3:].isnan().all() and not out[0, :3].isnan().any()


def test_nan_in_one_number_of_a_value(device, dtype):
    """One column of V: that column of out, no other; lse knows nothing of it."""
    case = make_case(device, dtype, lengths=(300,), seqlen_q=4)
    case["v_cache"][0, 298, 0, 5] = math.nan
    out, lse = check(case)
    assert out[0, 2:, :2, 5].isnan().all() and out.isnan().sum() == 4 and lse.isfinite().all()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_in_a_visible_value(value, device, dtype, force_units):
    """Infinite where it is seen, finite where it is not; no inf - inf in the fixup."""
    for units in (1, 5):
        force_units(units)
        case = make_case(device, dtype, lengths=(300,), seqlen_q=4, scale_q=0.3)
        case["v_cache"][0, 298, 1] = value
        out, lse = check(case)
        assert (out[0, 2:, 2:] == value).all() and out[0, :2].isfinite().all()
        assert lse.isfinite().all()


def test_infinities_of_both_signs_give_nan(device):
    """+inf and -inf in one column are a NaN, in the rows that see both."""
    case = make_case(device, sharp_dtype(device), lengths=(300,), seqlen_q=4, scale_q=0.3)
    case["v_cache"][0, 3, 1] = math.inf
    case["v_cache"][0, 298, 1] = -math.inf
    out, _ = check(case)
    assert out[0, 2:, 2:].isnan().all() and (out[0, :2, 2:] == math.inf).all()


def test_logit_of_plus_infinity(device):
    """inf - inf in the exponent: NaN in the rows and heads that see it, as IEEE softmax has it."""
    case = make_case(device, sharp_dtype(device), lengths=(300,), seqlen_q=4)
    case["q"].abs_()
    case["k_cache"][0, 298, 1] = math.inf
    out, _ = run(case)
    assert out[0, 2:, 2:].isnan().all()
    assert out[0, :2].isfinite().all() and out[0, :, :2].isfinite().all()


@pytest.mark.parametrize("position", [0, 150, 256, 299])
def test_logit_of_minus_infinity(position, device, force_units):
    """A visible key without weight, alone in its tile or first of all: no exp(-inf + inf)."""
    for units in (1, 3, 64):
        force_units(units)
        case = make_case(device, sharp_dtype(device), lengths=(300, 257))
        case["q"].abs_()
        case["k_cache"][:, position] = -math.inf
        case["k_cache"][1, 256] = -math.inf
        out, lse = check(case)
        assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("sinks", [False, True])
def test_nan_in_a_value_of_no_weight(sinks, device):
    """A row that sees it is not one without keys, be all scores -inf."""
    case = make_case(device, sharp_dtype(device), lengths=(300, 257), sinks=sinks)
    case["q"].abs_()
    case["k_cache"][0] = -math.inf
    case["v_cache"][0, 7, :, 5] = math.nan
    out, lse = run(case)
    assert out[0, ..., 5].isnan().all() and out.isnan().sum() == out[0, ..., 5].numel()


def test_nan_in_one_query_row(device, dtype):
    """Packed rows share a multiplication: the NaN stays in its row and head."""
    case = make_case(device, dtype, lengths=(300, 7), seqlen_q=5, heads=(6, 2))
    case["q"][0, 2, 4] = math.nan
    out, lse = check(case)
    assert out[0, 2, 4].isnan().all() and lse[0, 2, 4].isnan()
    assert out.isnan().sum() == 64 and lse.isnan().sum() == 1


def test_nan_in_one_ragged_query(device):
    """The same with ragged queries, where rows of two sequences are neighbours in memory."""
    case = make_case(
        device, sharp_dtype(device), lengths=(300, 7, 9), query_lengths=(2, 1, 3), heads=(6, 2)
    )
    case["q"][2, 5] = math.nan
    out, lse = check(case)
    assert out[2, 5].isnan().all() and out.isnan().sum() == 64 and lse.isnan().sum() == 1


def test_nan_in_one_sequence_of_a_batch(device):
    """A unit that does several sequences starts each from a clean state."""
    case = make_case(device, sharp_dtype(device), lengths=(30, 300, 30, 30), heads=(1, 1))
    case["k_cache"][1, 100] = math.nan
    out, _ = check(case)
    assert out[1].isnan().all() and not out[[0, 2, 3]].isnan().any()


def test_nan_does_not_stay_for_the_next_call(device):
    """Shared memory and workspace keep what the last call left there."""
    case = make_case(device, sharp_dtype(device), lengths=(900, 300))
    clean_out, clean_lse = run(case)
    for name in ("q", "k_cache", "v_cache"):
        run({**case, name: torch.full_like(case[name], math.nan)})
        out, lse = run(case)
        assert_same_bits(out, clean_out)
        assert_same_bits(lse, clean_lse)
    assert_close(clean_out, clean_lse, **case)
