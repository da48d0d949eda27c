"""The numbers: every shape and option of the contract against fp64, edges by name.

Every key that no query may see is NaN in all of these inputs (see `make_case`).
"""

import math

import pytest
import torch
from cases import check, int32, make_case, run, sharp_dtype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import assert_close, assert_same_bits

import leanattn

pytestmark = pytest.mark.usefixtures("loader")

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
UNIT_COUNTS = [1, 2, 3, 5, 16, 64, 1000]

CASES = {
    # lengths; a tile has 128 tokens up to head dim 128 and 64 above
    "one-token": dict(lengths=(1,)),
    "lengths-at-64-token-tiles": dict(lengths=(0, 1, 63, 64, 65, 127, 128, 129), dims=(192, 192)),
    "lengths-at-128-token-tiles": dict(lengths=(0, 1, 127, 128, 129, 255, 256, 257)),
    "prime-lengths": dict(lengths=(2, 3, 17, 101, 257, 499)),
    "no-cache-seqlens": dict(lengths=None, batch=2, capacity=150),
    "length-is-capacity": dict(lengths=(131, 131), capacity=131),
    "capacity-of-one-token": dict(lengths=(1, 0, 1), capacity=1),
    "one-long-many-short": dict(lengths=(1500, 1, 2, 3, 0, 5, 64, 7)),
    # query rows; a block of packed rows holds group_size x Sq of them
    "q-without-a-seqlen-dim": dict(seqlen_q=None),
    "2-query-rows": dict(seqlen_q=2),
    "5-query-rows": dict(seqlen_q=5, heads=(6, 2)),
    "16-query-rows": dict(seqlen_q=16),
    "17-query-rows": dict(seqlen_q=17, heads=(2, 2)),
    "63-query-rows": dict(seqlen_q=63, heads=(2, 1), lengths=(63, 64, 200)),
    "64-query-rows": dict(seqlen_q=64, heads=(2, 2), lengths=(64, 128, 129)),
    "200-query-rows": dict(seqlen_q=200, heads=(2, 1), lengths=(200, 333)),
    "more-queries-than-keys": dict(seqlen_q=9, lengths=(0, 1, 8, 9, 10)),
    "more-queries-than-keys-not-causal": dict(seqlen_q=9, lengths=(0, 1, 8, 9), causal=False),
    "71-heads-a-group-3-query-rows": dict(heads=(71, 1), seqlen_q=3),
    "64-heads-a-group-5-query-rows": dict(heads=(64, 1), seqlen_q=5),
    "64-heads-a-group-64-query-rows": dict(heads=(64, 1), seqlen_q=64, lengths=(70, 9)),
    "many-kv-heads": dict(heads=(34, 17), lengths=(65, 3)),
    # ragged queries
    "ragged-queries": dict(query_lengths=(1, 7, 3), lengths=(5, 200, 77)),
    "ragged-queries-some-empty": dict(query_lengths=(0, 4, 0, 1, 0), lengths=(9, 130, 0, 0, 64)),
    "ragged-queries-all-single": dict(query_lengths=(1, 1, 1), lengths=(5, 200, 77)),
    "ragged-queries-longer-than-keys": dict(query_lengths=(6, 2, 40), lengths=(3, 0, 39)),
    "ragged-queries-no-lengths": dict(
        query_lengths=(2, 66), lengths=None, batch=2, capacity=140, heads=(3, 1)
    ),
    "ragged-queries-long": dict(query_lengths=(150, 1), lengths=(150, 290), heads=(2, 1)),
    # options one by one
    "scale": dict(softmax_scale=0.31),
    "scale-zero-weighs-all-keys-alike": dict(softmax_scale=0.0, seqlen_q=3),
    "scale-negative": dict(softmax_scale=-0.5, seqlen_q=3),
    "softcap": dict(softcap=2.0),
    "softcap-small": dict(softcap=0.05),
    "softcap-large-needs-an-exact-tanh": dict(softcap=20_000.0),
    "softcap-saturated": dict(softcap=8.0, softmax_scale=20.0),
    "softcap-ragged": dict(softcap=5.0, query_lengths=(3, 1, 8)),
    "not-causal": dict(causal=False, seqlen_q=5),
    "window-of-one-key": dict(window_left=0, seqlen_q=3),
    "window-left": dict(window_left=30, seqlen_q=5),
    "window-left-at-a-tile": dict(window_left=128, lengths=(127, 128, 129, 130, 257, 400)),
    "window-left-longer-than-all": dict(window_left=10_000, seqlen_q=2),
    "window-left-wider-than-a-tile": dict(window_left=150, seqlen_q=20, lengths=(500, 171, 20)),
    "window-right-zero-under-causal": dict(window_right=0, seqlen_q=4),
    "window-right": dict(causal=False, window_right=2, seqlen_q=6),
    "window-right-zero": dict(causal=False, window_right=0, seqlen_q=6),
    "window-both": dict(causal=False, window_left=20, window_right=3, seqlen_q=8),
    "window-both-more-queries-than-keys": dict(
        causal=False, window_left=2, window_right=3, seqlen_q=12, lengths=(0, 4, 11, 12, 40)
    ),
    "window-left-not-causal": dict(causal=False, window_left=9, seqlen_q=8),
    "window-ragged": dict(window_left=17, query_lengths=(3, 0, 40), lengths=(300, 4, 90)),
    "sinks": dict(sinks=True),
    "sinks-with-empty-rows": dict(sinks=True, seqlen_q=4, lengths=(0, 2, 90)),
    "alibi": dict(alibi="heads", seqlen_q=4),
    "alibi-per-sequence": dict(alibi="batch", seqlen_q=4),
    "alibi-ahead-of-the-query": dict(alibi="batch", causal=False, seqlen_q=9, lengths=(4, 60, 9)),
    "alibi-ragged": dict(alibi="batch", query_lengths=(2, 1, 6)),
    # options together
    "softcap-window-sinks-alibi": dict(
        softcap=3.0, window_left=70, sinks=True, alibi="heads", seqlen_q=5, heads=(6, 2)
    ),
    "all-options-not-causal-ragged": dict(
        softcap=3.0, window_left=50, window_right=1, sinks=True, alibi="batch", causal=False,
        softmax_scale=0.2, query_lengths=(4, 0, 7), dims=(72, 40),
    ),
    "window-and-sinks-wide-head": dict(window_left=65, sinks=True, dims=(256, 256), heads=(8, 1)),
    # values
    "mean-half": dict(mean=0.5, seqlen_q=2),
    "mean-two": dict(mean=2.0, seqlen_q=2, dims=(128, 128)),
    "large-logits": dict(scale_q=8.0, seqlen_q=2),
    "very-large-logits": dict(scale_q=40.0, seqlen_q=2, dims=(128, 128)),
    "inf-beside-the-visible-keys": dict(poison=torch.inf, seqlen_q=3, window_left=40),
    "minus-inf-beside-the-visible-keys": dict(poison=-torch.inf, seqlen_q=3, window_left=40),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_named_case(name, device, dtype):
    """Each edge of shapes and options by itself, then together."""
    check(make_case(device, dtype, **CASES[name]))


@pytest.mark.parametrize("group_size", [1, 3, 5, 7, 8, 16, 64, 71])
def test_group_size(group_size, device, dtype):
    """A group that does not fill, or overfills, the 16 packed rows; two KV heads beside each other
    so that a head taken from the neighbour shows."""
    check(make_case(device, dtype, heads=(2 * group_size, 2), lengths=(130, 61), seqlen_q=2))


@pytest.mark.parametrize("dim", range(8, 257, 8))
def test_head_dim(dim, device, dtype):
    """Padding of a head dim to the next compiled one must not change a bit of the sum."""
    check(make_case(device, dtype, dims=(dim, dim), lengths=(140, 33), seqlen_q=2))


@pytest.mark.parametrize(
    "dims", [(192, 128), (64, 256), (128, 64), (8, 256), (256, 8), (72, 80), (80, 72), (96, 136)]
)
def test_value_head_dim_of_its_own(dims, device, dtype):
    """Dv taken for D somewhere: in a stride, a copy's bytes, the width of out."""
    check(make_case(device, dtype, dims=dims, lengths=(140, 65), seqlen_q=2, heads=(6, 2)))


@pytest.mark.parametrize("units", UNIT_COUNTS)
def test_forced_unit_count(units, device, dtype, force_units):
    """No fixup, one partner, many partners, idle units: all of them on one ragged batch."""
    force_units(units)
    lengths = (0, 700, 1, 129, 0, 64, 333, 0)
    check(make_case(device, dtype, lengths=lengths))
    check(make_case(device, dtype, lengths=lengths, heads=(20, 1), seqlen_q=3, dims=(192, 128)))
    check(make_case(device, dtype, lengths=lengths, window_left=100, sinks=True, alibi="heads"))
    check(make_case(device, dtype, lengths=(1500,), heads=(8, 1)))


def test_query_rows_1_to_64(device):
    """The number of packed rows against every block of rows that a kernel may choose."""
    for seqlen_q in (1, 2, 3, 4, 7, 8, 9, 15, 16, 31, 32, 33, 48, 64):
        check(make_case(device, sharp_dtype(device), seqlen_q=seqlen_q, lengths=(90,)))


@pytest.mark.parametrize("name", ["int32-min", "minus-one", "above", "int32-max"])
@pytest.mark.parametrize("query_lengths", [None, (2, 0, 3)], ids=["", "ragged"])
def test_lengths_are_clamped(name, query_lengths, device):
    """A length outside [0, S] must not be read past, wrapped around or overflow in `+ tile - 1`."""
    length = {"int32-min": INT32_MIN, "minus-one": -1, "above": 101, "int32-max": INT32_MAX}[name]
    lengths = (length, 50, length)
    case = make_case(
        device, sharp_dtype(device), lengths=lengths, capacity=100, query_lengths=query_lengths
    )
    out, lse = check(case)
    if length < 0:
        assert (out[0] == 0).all() and (lse[0] == -math.inf).all()


CLAMPED = {
    "plain": dict(),
    "ragged": dict(query_lengths=(2, 0, 3, 1, 1, 2)),
    "not-causal": dict(seqlen_q=4, causal=False, window_right=1),
    "window": dict(seqlen_q=4, window_left=30),
    "alibi": dict(seqlen_q=2, alibi="batch", sinks=True),
    "wide-heads": dict(dims=(192, 128)),
}


@pytest.mark.parametrize("units", [1, 5, 64])
@pytest.mark.parametrize("name", CLAMPED)
def test_bad_lengths_have_the_bits_of_clamped_ones(name, units, device, force_units):
    """Whatever is made of a length, shares, masks, positions, is made of the clamped one; around
    the caches lies NaN, so that one token too many shows."""
    force_units(units)
    lengths = (INT32_MAX, INT32_MIN, 131, 130, -1, 2**30 + 7)
    case = make_case(
        device, sharp_dtype(device), lengths=lengths, capacity=130, heads=(4, 2), **CLAMPED[name]
    )
    for cache in ("k_cache", "v_cache"):
        batch, capacity, *rest = case[cache].shape
        memory = case[cache].new_full((batch + 2, capacity + 300, *rest), math.nan)
        memory[1:-1, 20 : 20 + capacity] = case[cache]
        case[cache] = memory[1:-1, 20 : 20 + capacity]
    out, lse = check(case)
    clamped = {**case, "cache_seqlens": case["cache_seqlens"].clamp(0, 130)}
    for actual, expected in zip((out, lse), run(clamped)):
        assert_same_bits(actual, expected)
    assert not out.isnan().any() and not lse.isnan().any()


@pytest.mark.parametrize(
    "entries",
    [
        (0, 3, 2, 7),  # goes back: sequence 1 is empty, 2 starts where 0 ended
        (0, 3, 5, 1000),  # ends beyond total_q
        (0, INT32_MAX, 3, 7),
        (0, INT32_MIN, 3, 7),
        (-5, 2, 4, 7),  # begins before the first row
        (2, 3, 4, 5),  # rows 0, 1 and 5, 6 belong to nobody
        (5, 5, 5, 5),
        (INT32_MAX, INT32_MIN, 0, 1),
        (0, 0, 0, 0),
    ],
)
def test_query_offsets_are_clamped(entries, device):
    """Offsets into q are device data: [previous, total_q] whatever they say, and the rows that no
    sequence covers give out 0 and lse -inf."""
    case = make_case(device, sharp_dtype(device), query_lengths=(3, 2, 2), poison=None)
    case["cu_seqlens_q"] = int32(entries, device)
    check(case)


def test_uncovered_rows_have_no_sink_and_no_nan(device):
    """A row that belongs to no sequence is not a row that sees no key: its lse is -inf even with
    sinks; what q holds there is not read."""
    case = make_case(device, sharp_dtype(device), query_lengths=(3, 2, 2), sinks=True, poison=None)
    case["cu_seqlens_q"] = int32((2, 3, 4, 5), device)
    case["q"][:2] = torch.nan
    case["q"][5:] = torch.nan
    out, lse = check(case)
    assert (out[:2] == 0).all() and (lse[5:] == -math.inf).all()


def test_rows_that_see_no_key(device):
    """Exactly 0 and -inf, never 0/0; with sinks lse is the sink, to the bit."""
    for options in (dict(seqlen_q=4), dict(seqlen_q=4, causal=False, window_right=0)):
        case = make_case(device, sharp_dtype(device), lengths=(0, 2), **options)
        case["q"][0] = torch.nan
        out, lse = run(case)
        assert (out[0] == 0).all() and (lse[0] == -math.inf).all()
        assert (out[1, :2] == 0).all() and (lse[1, :2] == -math.inf).all()
        sinks = torch.tensor([0.1, -3.0, 50.0, -math.inf], device=device)
        out, lse = check({**case, "sinks": sinks})
        assert (out[0] == 0).all() and (lse[0] == sinks).all() and (lse[1, :2] == sinks).all()


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_no_key_is_0_whatever_sink_and_scale(batch_invariant, device):
    """Also in a sequence of which other rows see keys: 0 times NaN is NaN."""
    case = make_case(
        device, torch.float16, lengths=(2,), seqlen_q=4, cache_dtype=torch.float8_e4m3fn
    )
    options = dict(batch_invariant=batch_invariant)
    for value in (math.nan, math.inf):
        out, lse = run({**case, "v_scale": torch.full((1,), value, device=device)}, **options)
        assert (out[0, :2] == 0).all() and (lse[0, :2] == -math.inf).all()
        assert not out[0, 2:].isfinite().any()
    case = make_case(device, torch.float16, lengths=(2,), seqlen_q=4)
    case["sinks"] = torch.full((case["q"].shape[-2],), math.nan, device=device)
    out, lse = run(case, **options)
    assert (out[0, :2] == 0).all() and lse.isnan().all() and out[0, 2:].isnan().all()


@pytest.mark.parametrize("value", [-math.inf, -1e30, -100.0, 0.0, 100.0])
def test_sinks_of_any_size(value, device):
    """-inf is no sink at all; a large one takes all the weight, in out as in lse; neither may
    break the running maximum."""
    case = make_case(device, sharp_dtype(device), lengths=(5, 200, 0), sinks=True)
    case["sinks"][1] = value
    check(case)


def test_weights_below_2_to_the_minus_126(device, dtype):
    """256 keys of weight exp(-sink) each: they may all come out as 0 where that is no normal number
    of fp32, though their sum is one; before that they count."""
    case = make_case(device, dtype, lengths=(256,), heads=(16, 1))
    case["q"].zero_()
    case["v_cache"].fill_(1)
    case["sinks"] = torch.linspace(60, 95, 16, device=device)
    out, _ = check(case)
    if dtype != torch.float16:
        assert (out[..., case["sinks"] < 87, :] > 0).all()


def test_sinks_count_once_whatever_the_split(device, force_units):
    """A sink added by every unit that holds a piece of the head would count many times."""
    case = make_case(device, sharp_dtype(device), lengths=(1000, 3), sinks=True)
    case["sinks"] += 6
    for units in UNIT_COUNTS:
        force_units(units)
        check(case)


@pytest.mark.parametrize("width", [2**31 - 1, 2**31, 2**32, 2**32 + 5, 2**62, 2**63 - 1])
def test_huge_windows_are_no_limit(width, device):
    """A window narrowed to 32 bits, or a position minus a huge window, wraps around."""
    for causal in (True, False):
        case = make_case(
            device, sharp_dtype(device), seqlen_q=5, lengths=(2, 200), causal=causal,
            window_left=width, window_right=-1 if causal else width,
        )  # fmt: skip
        check(case)


@pytest.mark.parametrize("scale", [1e7, 1e10, 1e20, 1e31])
def test_logits_below_any_sentinel(scale, device, force_units):
    """Logits of -1e33 are still the largest there are: a finite stand-in for -inf beats them, and
    the rounding of score * scale, left in an exponent, is a number without bounds."""
    lengths = (70, 130)
    case = make_case(device, sharp_dtype(device), lengths=lengths, seqlen_q=3, softmax_scale=scale)
    case["q"].fill_(1.0)
    for sequence, length in enumerate(lengths):
        case["k_cache"][sequence, :length] = -2.0
    for units in (1, 5):
        force_units(units)
        check(case)


def test_scores_beyond_the_range_of_fp16(device):
    """q . k of 900 000 is no infinity before the scale makes it small."""
    case = make_case(
        device, sharp_dtype(device), dims=(256, 256), lengths=(100,), softmax_scale=1e-4
    )
    case["q"] += 60
    case["k_cache"] += 60
    check(case)


def test_values_at_the_end_of_the_range(device, dtype):
    """A weighted mean cannot be larger than its terms, nor may its unfinished sum overflow."""
    case = make_case(device, dtype, lengths=(300,), scale_q=0.1)
    case["v_cache"][:, :300] = torch.finfo(dtype).max / 2 if dtype == torch.float16 else 1e30
    check(case)


def test_alibi_steep_and_negative(device):
    """Steep slopes make all but the last keys vanish; negative ones prefer the first."""
    for slopes in ([50.0, -50.0, 0.0, 1e-3], [1000.0, -0.5, 2.0, -2.0]):
        case = make_case(device, sharp_dtype(device), lengths=(300, 65), seqlen_q=3)
        case["alibi_slopes"] = torch.tensor(slopes, device=device)
        check(case)


def empty_case(device, batch=2, seqlen_q=3, capacity=10, ragged=False, **options):
    """A case one of whose sizes is 0."""
    query_lengths = [seqlen_q] * batch if ragged else None
    return make_case(
        device, sharp_dtype(device), lengths=(capacity,) * batch, capacity=capacity,
        seqlen_q=seqlen_q, query_lengths=query_lengths, dims=(64, 32), **options,
    )  # fmt: skip


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "no-lengths"])
@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
@pytest.mark.parametrize("size", ["batch", "seqlen_q", "capacity"])
def test_zero_sizes(size, ragged, lengths, device):
    """B, Sq, total_q or S of 0: a result of the right shape, no launch of an empty grid."""
    case = empty_case(device, ragged=ragged, sinks=True, **{size: 0})
    if not lengths:
        del case["cache_seqlens"]
    out, lse = check(case)
    assert out.shape == (*case["q"].shape[:-1], 32)
    if size == "capacity":
        assert (out == 0).all() and (lse == case["sinks"]).all()


def test_zero_batch_with_query_rows(device):
    """No sequence covers any row: out 0, lse -inf, written although nothing is launched."""
    case = empty_case(device, batch=0, ragged=True)
    case["q"] = torch.ones(5, 4, 64, device=device, dtype=sharp_dtype(device))
    out, lse = check(case)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_empty_batch_of_real_size(device, force_units):
    """Every sequence empty: no tile at all for any unit."""
    for units in (1, 3, 64):
        force_units(units)
        out, lse = check(make_case(device, sharp_dtype(device), lengths=(0,) * 7, capacity=100))
        assert (out == 0).all() and (lse == -math.inf).all()


def test_batch_of_4096_short_sequences(device):
    """More sequences than units; the first, the last and every empty one in between."""
    lengths = [(7 * i) % 10 for i in range(4096)]
    check(make_case(device, sharp_dtype(device), heads=(2, 1), dims=(16, 16), lengths=lengths))


def test_batch_of_20011_sequences(device):
    """More lengths than fit at once where their prefix sum is made. With q = 0 every key weighs
    the same, so lse and out are known without a reference."""
    lengths = (torch.arange(20_011, device=device) * 5) % 8
    capacity = 8
    k = torch.zeros(20_011, capacity, 1, 8, device=device, dtype=sharp_dtype(device))
    v = torch.arange(20_011, device=device).remainder(64).view(-1, 1, 1, 1).expand(-1, 8, 1, 8)
    v = v.to(k.dtype).contiguous()
    unseen = torch.arange(capacity, device=device) >= lengths[:, None]
    k[unseen] = v[unseen] = torch.nan
    out, lse = torch.ops.leanattn.decode_with_lse(
        torch.zeros(20_011, 1, 8, device=device, dtype=k.dtype), k, v, lengths.int()
    )
    torch.testing.assert_close(lse[:, 0], lengths.float().log(), rtol=0, atol=2e-5)
    expected = torch.where(lengths > 0, torch.arange(20_011, device=device) % 64, 0)
    torch.testing.assert_close(out[:, 0, 0].float(), expected.float(), rtol=1e-3, atol=0)


def test_one_long_sequence(device, force_units):
    """20 000 tokens on the CPU and 1 000 000 on CUDA, whole and ending inside a tile."""
    length = 20_000 if device == "cpu" else 1_000_000
    for lengths in ((length,), (length - 77, 3)):
        check(make_case(device, sharp_dtype(device), lengths=lengths, dims=(128, 128)))
    for units in (1, 64):
        force_units(units)
        check(make_case(device, sharp_dtype(device), lengths=(length,), heads=(8, 1), seqlen_q=4))


def test_long_sums_do_not_drift(device, force_units):
    """Values of mean 2, one unit: an fp32 sum that grows key by key loses a digit in the end."""
    force_units(1)
    for length in (20_000, 100_000):
        case = make_case(device, sharp_dtype(device), lengths=(length,), heads=(2, 1), scale_q=0.05)
        case["v_cache"] += 2
        check(case)


@pytest.mark.parametrize("units", [1, 7])
def test_sums_are_wider_than_the_dtype(units, device, dtype, force_units):
    """Each of the three sums where one kept in fp16 or bf16 stops to grow: of the weights and of
    the weighted values at 2048 or 256 ones, of q . k beside one product as large as that."""
    force_units(units)
    length, large = 5000, 2048 if dtype == torch.float16 else 256
    case = make_case(device, dtype, lengths=(length,), dims=(256, 64))
    case["q"].zero_()
    case["v_cache"][:, :length] = 1.0
    out, lse = check(case)
    assert (out == 1.0).all()
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(length)), rtol=0, atol=2e-5)

    for first in (large, -large):
        case["q"].fill_(1.0)
        case["k_cache"][:, :length] = 0.5
        case["k_cache"][:, :length, :, 0] = first
        out, lse = check(case)
        expected = math.log(length) + (first + 255 * 0.5) / 16
        torch.testing.assert_close(lse, torch.full_like(lse, expected), rtol=2e-5, atol=2e-5)


def test_same_bits_for_any_number_of_threads(force_units):
    """On the CPU threads take the shares in any order; the merge has an order of its own."""
    force_units(7)
    case = make_case("cpu", torch.float32, lengths=(900, 33, 0, 517), heads=(8, 2), scale_q=3.0)
    out, lse = run(case)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for actual, expected in zip(run(case), (out, lse)):
                assert_same_bits(actual, expected)
    finally:
        torch.set_num_threads(before)


FAR = 2**31
FAR_VIEWS = {
    "sequences": ((2, 70, 1, 128), (FAR, 128, 128, 1), (70, 65)),
    "tokens": ((1, FAR // 128 + 300, 1, 128), (FAR, 128, 128, 1), (FAR // 128 + 295,)),
    "heads": ((1, 70, 2, 128), (FAR, 128, FAR, 1), (65,)),
}


@pytest.mark.parametrize("name", FAR_VIEWS)
def test_offsets_beyond_2_to_the_31_elements(name, device):
    """The last sequence, token or head of a cache of more than 2^31 elements: a 32-bit offset
    lands elsewhere. Only what the window shows is written or read; K and V are one memory."""
    shape, strides, lengths = FAR_VIEWS[name]
    try:
        memory = torch.empty(FAR + 2**16, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("not enough memory for a cache of 2^31 elements")
    cache = memory.as_strided(shape, strides)
    window_left = 200 if name == "tokens" else 50
    for sequence, length in enumerate(lengths):
        seen = cache[sequence, max(0, length - 1 - window_left) : length]
        seen.copy_(torch.randn(seen.shape))
    q = torch.randn(len(lengths), 1, 4, 128).half().to(device)
    check(dict(q=q, k_cache=cache, v_cache=cache, cache_seqlens=int32(lengths, device),
               window_left=window_left))  # fmt: skip


@pytest.mark.parametrize("units", [None, 2, 7, 64])
def test_same_bits_in_every_run(units, device, force_units, repeats):
    """Whoever arrives last merges: the order of the merge must not depend on who that is."""
    if units is not None:
        force_units(units)
    case = make_case(
        device, sharp_dtype(device), lengths=(900, 33, 0, 517), heads=(8, 2), scale_q=3.0
    )
    out, lse = check(case)
    for _ in range(repeats):
        again_out, again_lse = run(case)
        assert_same_bits(again_out, out)
        assert_same_bits(again_lse, lse)


@pytest.mark.parametrize("hint", [0, 1, 7, 8, 1000, 2**40])
def test_max_seqlen_q_is_only_a_hint(hint, device):
    """Too small, right, too large: the bits are those without it."""
    case = make_case(
        device, sharp_dtype(device), query_lengths=(1, 7, 0, 3), lengths=(5, 200, 9, 77)
    )
    out, lse = check(case)
    hinted_out, hinted_lse = run(case, max_seqlen_q=hint)
    assert_same_bits(hinted_out, out)
    assert_same_bits(hinted_lse, lse)


def test_the_four_ops_give_the_same_bits(device):
    """decode, decode_with_lse, decode_out and decode_with_lse_out are one computation."""
    case = make_case(device, sharp_dtype(device), seqlen_q=2, dims=(64, 32), window_left=99)
    ops = torch.ops.leanattn
    out, lse = check(case)
    assert_same_bits(ops.decode(**case), out)
    into, into_lse = torch.full_like(out, 7.0), torch.full_like(lse, 7.0)
    assert ops.decode_out(**case, out=into) is None
    assert_same_bits(into, out)
    into.fill_(7.0)
    assert ops.decode_with_lse_out(**case, out=into, lse=into_lse) is None
    assert_same_bits(into, out)
    assert_same_bits(into_lse, lse)


@pytest.mark.parametrize("q_rank", [3, 4])
def test_out_of_any_stride_and_nothing_beside_it(q_rank, device):
    """out is a slice of a larger buffer: each element lands in its place, no other is touched."""
    case = make_case(
        device, sharp_dtype(device), seqlen_q=2 if q_rank == 4 else None,
        lengths=(5, 0, 200), dims=(64, 32),
    )  # fmt: skip
    expected, expected_lse = check(case)
    shape = expected.shape
    big = torch.full((shape[0] + 2, *shape[1:-1], 3, 48), 7.0, device=device, dtype=expected.dtype)
    out = big[1:-1, ..., 1, 8:40]
    lse = torch.empty_like(expected_lse)
    torch.ops.leanattn.decode_with_lse_out(**case, out=out, lse=lse)
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)
    out.fill_(7.0)
    assert (big == 7.0).all()


def test_out_with_heads_before_rows(device):
    """out as a transposed view, the layout that a projection after the attention may want."""
    case = make_case(device, sharp_dtype(device), seqlen_q=3)
    expected, _ = check(case)
    out = torch.empty_like(expected.transpose(1, 2).contiguous()).transpose(1, 2)
    torch.ops.leanattn.decode_out(**case, out=out)
    assert_same_bits(out, expected)


def test_out_rows_without_keys_are_written(device):
    """An out buffer holds old values: empty sequences, uncovered rows and S=0 still write 0."""
    cases = [
        make_case(device, sharp_dtype(device), lengths=(0, 3, 0)),
        make_case(device, sharp_dtype(device), lengths=(0, 0), capacity=0),
        make_case(device, sharp_dtype(device), query_lengths=(2, 3), lengths=(4, 9)),
    ]
    cases[2]["cu_seqlens_q"] = int32((1, 2, 3), device)
    for case in cases:
        out = torch.full_like(case["q"], torch.nan)
        lse = torch.full(out.shape[:-1], torch.nan, device=device)
        torch.ops.leanattn.decode_with_lse_out(**case, out=out, lse=lse)
        assert_close(out, lse, **case)


@pytest.mark.parametrize(
    "rows",
    [dict(seqlen_q=2), dict(seqlen_q=None), dict(query_lengths=(2, 0, 3))],
    ids=["4d", "3d", "ragged"],
)
def test_lse_of_any_strides_and_nothing_beside_it(rows, device, force_units):
    """A column of wider memory, and heads before rows: filled in its places and nowhere else."""
    case = make_case(device, sharp_dtype(device), **rows)
    for units in (1, 5):
        force_units(units)
        expected, expected_lse = check(case)
        wide = torch.full((*expected_lse.shape, 3), 7.0, device=device)
        heads_first = torch.full_like(expected_lse.transpose(-1, -2).contiguous(), 7.0)
        for lse in (wide[..., 1], heads_first.transpose(-1, -2)):
            out = torch.empty_like(expected)
            torch.ops.leanattn.decode_with_lse_out(**case, out=out, lse=lse)
            assert_same_bits(lse, expected_lse)
            assert_same_bits(out, expected)
        assert (wide[..., 0] == 7.0).all() and (wide[..., 2] == 7.0).all()


def test_counters_stay_zero_and_change_no_bit(device, force_units):
    """The caller's counters are as they were after every call, also when the next call has other
    shapes and another number of units."""
    counters = leanattn.counters(torch.device(device), 256)
    assert counters.dtype == torch.int32 and counters.device.type == torch.device(device).type
    assert (counters == 0).all()
    for units in (2, 64, 3):
        force_units(units)
        for heads, lengths in (((8, 2), (900, 33, 517)), ((4, 1), (0, 2000)), ((2, 2), (1,))):
            case = make_case(device, sharp_dtype(device), heads=heads, lengths=lengths)
            out, lse = run(case)
            for _ in range(3):
                counted_out, counted_lse = run(case, counters=counters)
                assert (counters == 0).all()
                assert_same_bits(counted_out, out)
                assert_same_bits(counted_lse, lse)


def test_inputs_are_left_alone(device):
    """Inference or not, the op writes to its outputs only."""
    case = make_case(
        device, sharp_dtype(device), query_lengths=(1, 4, 2), sinks=True, alibi="batch"
    )
    before = {name: value.clone() for name, value in case.items()}
    run(case)
    for name, value in case.items():
        assert_same_bits(value, before[name])


def test_python_decode(device):
    """The wrapper: the op's arguments, positions included, plus return_lse and out."""
    case = make_case(device, sharp_dtype(device), seqlen_q=2, softcap=3.0)
    out, lse = check(case)
    assert_same_bits(leanattn.decode(**case), out)
    tensors = [case[name] for name in ("q", "k_cache", "v_cache", "cache_seqlens")]
    assert_same_bits(leanattn.decode(*tensors, None, softcap=3.0), out)
    with_lse = leanattn.decode(**case, return_lse=True)
    assert_same_bits(with_lse[0], out)
    assert_same_bits(with_lse[1], lse)


def test_python_decode_into_out(device):
    """out= is filled and handed back, with and without the lse."""
    case = make_case(device, sharp_dtype(device), seqlen_q=2)
    expected, expected_lse = check(case)
    out = torch.zeros_like(expected)
    assert leanattn.decode(**case, out=out) is out
    assert_same_bits(out, expected)
    out.zero_()
    returned, lse = leanattn.decode(**case, out=out, return_lse=True)
    assert returned is out
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)


@pytest.mark.parametrize("sink", [2.4e38, 3.4e38, math.inf, -math.inf, -3e38, 1e30, 1e7])
def test_any_sink(sink, device, dtype):
    """Also where its score in units of log2 is beyond fp32."""
    case = make_case(device, dtype, heads=(4, 2))
    case["sinks"] = torch.full((4,), sink, device=device)
    out, lse = run(case)
    assert not out.isnan().any()
    if sink > 0:
        assert (out == 0).all()
        torch.testing.assert_close(lse, case["sinks"].expand_as(lse))
    else:
        assert_same_bits(out, run({k: v for k, v in case.items() if k != "sinks"})[0])


@pytest.mark.parametrize("tokens", [32, 64, 96, 128, 129, 257, 520])
def test_fp32_is_as_good_as_torch(tokens):
    """Where torch happens to be accurate, and where most keys and values are zero."""
    for seed in range(10):
        case = make_case("cpu", torch.float32, heads=(4, 2), dims=(16, 16), lengths=(tokens,),
                         capacity=tokens, seed=seed, poison=None)  # fmt: skip
        check(case)
        zero = torch.rand(tokens) < 0.9
        case["k_cache"][:, zero] = case["v_cache"][:, zero] = 0
        check(case)


def test_is_supported_without_values():
    """Fake and meta tensors, as under torch.compile and torch.export."""
    case = make_case("cpu", torch.float16, poison=None)
    meta = {name: tensor.to("meta") for name, tensor in case.items()}
    assert leanattn.is_supported(**meta) == (True, "")
    assert not leanattn.is_supported(**{**meta, "k_cache": case["k_cache"]})[0]

    def either(q, k, v):
        return leanattn.decode(q, k, v) if leanattn.is_supported(q, k, v)[0] else q * 0

    arguments = [case[name] for name in ("q", "k_cache", "v_cache")]
    compiled = torch.compile(either, backend="eager", fullgraph=True)
    assert_same_bits(compiled(*arguments), leanattn.decode(*arguments))


def test_warmup_and_counters_without_cuda(monkeypatch):
    leanattn.warmup("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="warmup: device must be cpu or cuda, got cuda"):
        leanattn.warmup()
    with pytest.raises(RuntimeError, match="counters: device must be cpu or cuda, got meta"):
        leanattn.counters("meta")


def test_is_supported(device):
    """The answer that a router needs, with the reason in words and without an exception."""
    case = make_case(device, sharp_dtype(device), seqlen_q=2, sinks=True)
    supported, reason = leanattn.is_supported(**case)
    assert supported is True and isinstance(reason, str)
    supported, reason = leanattn.is_supported(**case, softcap=-1.0)
    assert supported is False and "softcap" in reason
    out = torch.empty_like(case["q"])
    assert leanattn.is_supported(**case, out=out, return_lse=True) == (True, "")
    supported, reason = leanattn.is_supported(**case, out=out[:1])
    assert supported is False and "decode: out must have shape" in reason


@st.composite
def random_options(draw):
    """Any combination of shapes, lengths, offsets and options, small."""
    batch = draw(st.integers(0, 4))
    heads_kv = draw(st.sampled_from([1, 2, 3]))
    causal = draw(st.booleans())
    window = st.sampled_from([-1, -1, 0, 1, 5, 63, 64, 100, 1000])
    any_length = st.one_of(st.integers(0, 300), st.integers(INT32_MIN, INT32_MAX))
    per_sequence = st.lists(any_length, min_size=batch, max_size=batch)
    options = dict(
        batch=batch,
        capacity=draw(st.integers(0, 300)),
        heads=(heads_kv * draw(st.sampled_from([1, 2, 5, 8, 17])), heads_kv),
        dims=(8 * draw(st.integers(1, 32)), 8 * draw(st.integers(1, 32))),
        lengths=draw(st.one_of(st.none(), per_sequence)),
        causal=causal,
        window_left=draw(window),
        window_right=draw(st.sampled_from([-1, 0]) if causal else window),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0, 30.0])),
        softmax_scale=draw(st.sampled_from([None, None, 0.3, -0.1])),
        alibi=draw(st.sampled_from([None, None, "heads", "batch"])),
        sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    if draw(st.booleans()):
        query_length = st.integers(0, 12)
        options["query_lengths"] = draw(
            st.lists(query_length, min_size=batch, max_size=batch).map(tuple)
        )
    else:
        options["seqlen_q"] = draw(st.sampled_from([None, 0, 1, 2, 9, 20]))
    return options, draw(st.sampled_from([None, 1, 2, 3, 7, 100])), draw(st.booleans())


@settings(
    max_examples=80, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(drawn=random_options())
def test_random_combinations(device, monkeypatch, drawn):
    """What nobody thought of combining, wrong query offsets among it."""
    options, units, wrong_offsets = drawn
    monkeypatch.delenv("LEANATTN_NUM_UNITS", raising=False)
    if units is not None:
        monkeypatch.setenv("LEANATTN_NUM_UNITS", str(units))
    case = make_case(device, sharp_dtype(device), poison=None, **options)
    if wrong_offsets and "cu_seqlens_q" in case:
        case["cu_seqlens_q"] = case["cu_seqlens_q"].flip(0) - 2
    check(case)
