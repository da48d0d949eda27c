"""csrc/core/softmax_state.h: a commutative monoid, to rounding, that ends in fp64's softmax.

Scores are in units of log2 here, as in the header.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

WIDTH = 4
LN2 = math.log(2)
LOG2E = 1 / LN2
HUGE = 3e38  # the difference of two of them is no float

examples = settings(deadline=None, derandomize=True, max_examples=100)

SEEDS = st.integers(0, 2**32 - 1)
# Sizes and spreads of the scores: large logits, a large mean, scores that underflow each other.
SPREADS = st.sampled_from([(0, 1), (0, 30), (100, 3), (-5000, 1), (0, 400)])


def draw(seed, n, spread=(0, 1)):
    """Scores [n] and values [n, WIDTH], all representable in fp32."""
    generator = np.random.default_rng(seed)
    mean, deviation = spread
    scores = (mean + deviation * generator.standard_normal(n)).astype(np.float32)
    values = (0.5 + generator.standard_normal((n, WIDTH))).astype(np.float32)
    return scores.astype(np.float64), values.astype(np.float64)


def state_of(headers, scores, values):
    """The state of these keys by its definition, in fp64, rounded once."""
    state = headers.State()
    if len(scores) == 0:
        return state
    state.max = float(max(scores))
    weights = np.exp2(scores - (0 if state.max == -math.inf else state.max))
    state.sum = float(weights.sum())
    state.o = (weights @ values).tolist()
    return state


def make_state(headers, maximum, total, o):
    state = headers.State()
    state.max, state.sum, state.o = maximum, total, o
    return state


def merged(headers, *states, at_once=1):
    """The states merged into the identity in their order, so many at once."""
    result = headers.State()
    identities = [headers.State()] * (-len(states) % at_once)
    states = [*states, *identities]
    for i in range(0, len(states), at_once):
        result.merge(states[i : i + at_once])
    return result


def numbers(state):
    return np.array([state.max, state.sum, *state.o])


def assert_near(a, b, ulps=16):
    """Equal to rounding, max exactly; each number against the largest that went into its sum."""
    a, b = numbers(a), numbers(b)
    assert a[0] == b[0] or np.isnan(a[0]) and np.isnan(b[0])
    np.testing.assert_allclose(a[1:], b[1:], rtol=0, atol=ulps * 2**-24 * max(abs(b[1]), 1) * 4)


def assert_same(a, b):
    np.testing.assert_array_equal(numbers(a), numbers(b))  # NaN equals NaN


def result_of(headers, state):
    """(out, lse) as the kernel writes them."""
    factor = headers.inverse_of(state.sum)
    return np.array(state.o) * factor, headers.lse_of(state.max, state.sum)


def softmax_fp64(scores, values):
    weights = np.exp2(scores - scores.max())
    return weights @ values / weights.sum(), LN2 * (scores.max() + math.log2(weights.sum()))


def assert_is_softmax(headers, state, scores, values):
    out, lse = result_of(headers, state)
    expected, expected_lse = softmax_fp64(scores, values)
    rounding = 2e-6 + len(scores) * 2**-26  # every merge may round
    np.testing.assert_allclose(out, expected, rtol=0, atol=rounding)
    np.testing.assert_allclose(lse, expected_lse, rtol=5e-7, atol=rounding)


# --- The laws ------------------------------------------------------------------------------------


@examples
@given(SEEDS, st.integers(0, 5), SPREADS)
def test_identity(headers, seed, n, spread):
    """An empty partial, or one that is padded in, changes no bit from either side."""
    state = state_of(headers, *draw(seed, n, spread))
    assert_same(merged(headers, state, headers.State()), state)
    assert_same(merged(headers, headers.State(), state), state)
    assert_same(merged(headers, state, at_once=8), state)


def test_empty_with_empty(headers):
    """-inf - -inf is NaN; two partials without a key are still without a key."""
    empty = headers.State()
    assert (empty.max, empty.sum, empty.o) == (-math.inf, 0.0, [0.0] * WIDTH)
    for at_once in (1, 2, 3, 8):
        state = merged(headers, *[headers.State()] * 5, at_once=at_once)
        assert_same(state, empty)
    out, lse = result_of(headers, state)
    assert (out == 0).all() and lse == -math.inf


@examples
@given(SEEDS, st.integers(0, 5), st.integers(0, 5), SPREADS)
def test_commutativity(headers, seed, n, m, spread):
    """Which of two is scaled must follow from the maxima, not from the order."""
    scores, values = draw(seed, n + m, spread)
    a = state_of(headers, scores[:n], values[:n])
    b = state_of(headers, scores[n:], values[n:])
    assert_near(merged(headers, a, b), merged(headers, b, a))


@examples
@given(SEEDS, st.lists(st.integers(0, 5), min_size=3, max_size=3), SPREADS)
def test_associativity(headers, seed, sizes, spread):
    """Any cut of a row's keys among units and warps gives the same."""
    scores, values = draw(seed, sum(sizes), spread)
    ends = np.cumsum(sizes)
    a, b, c = (state_of(headers, scores[e - n : e], values[e - n : e]) for n, e in zip(sizes, ends))
    left = merged(headers, merged(headers, a, b), c)
    right = merged(headers, a, merged(headers, b, c))
    assert_near(left, right)
    assert_near(left, state_of(headers, scores, values))


@examples
@given(SEEDS, st.integers(1, 20), SPREADS)
def test_many_at_once_equals_pairwise(headers, seed, n, spread):
    """One maximum over all of them first: a factor taken against a neighbour's would show."""
    scores, values = draw(seed, n, spread)
    states = [state_of(headers, scores[i : i + 1], values[i : i + 1]) for i in range(n)]
    pairwise = merged(headers, *states)
    for at_once in (2, 3, 8):
        assert_near(merged(headers, *states, at_once=at_once), pairwise)


@examples
@given(SEEDS, st.integers(1, 40), SPREADS, st.randoms(use_true_random=False))
def test_any_tree_is_the_softmax(headers, seed, n, spread, random):
    """Against fp64: keys in any order, merged in any tree."""
    scores, values = draw(seed, n, spread)
    states = [state_of(headers, scores[i : i + 1], values[i : i + 1]) for i in range(n)]
    while len(states) > 1:
        a = states.pop(random.randrange(len(states)))
        b = states.pop(random.randrange(len(states)))
        states.append(merged(headers, a, b, at_once=random.choice([1, 2, 3, 8])))
    assert_is_softmax(headers, states[0], scores, values)


@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
def test_a_thousand_partials(headers, at_once):
    """An item that very many units share: rounding stays small, maxima rising or falling."""
    scores, values = draw(7, 1000, (0, 10))
    for order in (np.argsort(scores), np.argsort(-scores), np.arange(1000)):
        states = [state_of(headers, scores[i : i + 1], values[i : i + 1]) for i in order]
        assert_is_softmax(headers, merged(headers, *states, at_once=at_once), scores, values)


# --- The edges -----------------------------------------------------------------------------------


def test_maxima_far_apart(headers):
    """The difference of two maxima overflows to -inf, its exponential is 0, and nothing is NaN."""
    low = make_state(headers, -HUGE, 2.0, [1.0] * WIDTH)
    high = make_state(headers, HUGE, 3.0, [4.0] * WIDTH)
    for a, b in itertools.permutations([low, high]):
        assert_same(merged(headers, a, b), high)
        assert_same(merged(headers, a, b, at_once=2), high)


def test_key_of_minus_infinity(headers):
    """A visible key without weight: alone it is as good as none, beside others it adds 0."""
    nothing = state_of(headers, np.array([-math.inf]), np.ones((1, WIDTH)))
    assert_same(nothing, headers.State())
    assert headers.rescale_factor(-math.inf, -math.inf) == 0.0
    assert headers.rescale_factor(-math.inf, 5.0) == 0.0
    assert headers.exponent_base(-math.inf) == 0.0 and headers.exponent_base(-3.0) == -3.0


def all_merges(headers, special, other):
    """Both orders, alone and beside identities."""
    for a, b in itertools.permutations([special, other]):
        for at_once in (1, 2, 3, 8):
            yield merged(headers, a, b, at_once=at_once)


def test_nan_score_spreads(headers):
    """fmax drops a NaN, so it lives on in sum and o and must outlast every later maximum."""
    nan = make_state(headers, -math.inf, math.nan, [math.nan] * WIDTH)
    for other in (
        headers.State(),
        nan,
        make_state(headers, 100.0, 3.0, [1.0] * WIDTH),
        make_state(headers, HUGE, 3.0, [1.0] * WIDTH),
    ):
        for state in all_merges(headers, nan, other):
            assert math.isnan(state.sum) and np.isnan(state.o).all()
            assert state.max == other.max
            out, lse = result_of(headers, state)
            assert np.isnan(out).all() and math.isnan(lse)


@pytest.mark.parametrize("maximum", [-50.0, 1.0, 50.0])
def test_nan_in_one_element_of_a_value(headers, maximum):
    """It stays in its column and does not touch the sum."""
    nan = make_state(headers, maximum, 1.0, [1.0, math.nan, 1.0, 1.0])
    for state in all_merges(headers, nan, make_state(headers, 1.0, 2.0, [1.0] * WIDTH)):
        assert np.isnan(state.o).tolist() == [False, True, False, False]
        assert math.isfinite(state.sum)


def test_infinite_values(headers):
    """Infinity stays infinite in its column, and both signs in one column are NaN."""
    plus = make_state(headers, 0.0, 1.0, [math.inf, 1.0, math.inf, 0.0])
    minus = make_state(headers, 1.0, 1.0, [1.0, -math.inf, -math.inf, 0.0])
    for state in all_merges(headers, plus, minus):
        np.testing.assert_array_equal(state.o, [math.inf, -math.inf, math.nan, 0.0])
        assert state.sum == 1.5 and headers.lse_of(state.max, state.sum) > 0


def test_score_of_plus_infinity(headers):
    """inf - inf: NaN, as IEEE's softmax has it, and never a silent 0 or 1."""
    infinite = make_state(headers, math.inf, 1.0, [1.0] * WIDTH)
    for other in (headers.State(), infinite, make_state(headers, 2.0, 3.0, [1.0] * WIDTH)):
        for state in all_merges(headers, infinite, other):
            assert state.max == math.inf and math.isnan(state.sum) and np.isnan(state.o).all()


# --- Sink, lse, output ---------------------------------------------------------------------------


@examples
@given(SEEDS, st.integers(0, 10), st.floats(-60, 60, width=32))
def test_sink_is_one_more_logit(headers, seed, n, sink):
    """In the denominator and in lse, with no value; natural units, unlike the scores."""
    scores, values = draw(seed, n, (0, 10))
    state = state_of(headers, scores, values)
    state.merge_sink(sink)
    scores = np.append(scores, sink * LOG2E)
    values = np.concatenate([values, np.zeros((1, WIDTH))])
    out, lse = result_of(headers, state)
    expected, expected_lse = softmax_fp64(scores, values)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)  # sink * log2(e) is rounded
    np.testing.assert_allclose(lse, expected_lse, rtol=5e-7, atol=2e-6)


def test_sink_alone(headers):
    """A row that sees no key: out 0, lse the sink."""
    for sink in (0.0, -3.5, 88.0, 5000.0, -5000.0):
        state = headers.State()
        state.merge_sink(sink)
        out, lse = result_of(headers, state)
        assert (out == 0).all()
        np.testing.assert_allclose(lse, sink, rtol=2.5e-7)


def test_sink_of_minus_infinity_is_none(headers):
    """-inf - -inf again, on a row without keys."""
    for n in (0, 3):
        state = state_of(headers, *draw(1, n))
        before = numbers(state)
        state.merge_sink(-math.inf)
        np.testing.assert_array_equal(numbers(state), before)


def test_sink_of_nan_shows(headers):
    """fmax drops it from the maximum; it must not vanish."""
    for n in (0, 3):
        state = state_of(headers, *draw(1, n))
        state.merge_sink(math.nan)
        assert math.isnan(state.sum)
    out, _ = result_of(headers, state)
    assert np.isnan(out).all()


def test_lse(headers):
    """Natural log; -inf where nothing was seen, NaN where a NaN was."""
    assert headers.lse_of(-math.inf, 0.0) == -math.inf
    assert math.isnan(headers.lse_of(-math.inf, math.nan))
    assert headers.lse_of(0.0, 1.0) == 0.0
    for maximum, total in [(0.0, 2.0), (10.0, 1.0), (-300.0, 77.0), (1e4, 1e6)]:
        expected = LN2 * (maximum + math.log2(total))
        assert headers.lse_of(maximum, total) == pytest.approx(expected, rel=5e-7)


def test_inverse(headers):
    """0 / 0 is what a row without keys must not become; NaN must stay."""
    assert headers.inverse_of(0.0) == 0.0
    assert headers.inverse_of(4.0) == 0.25
    assert math.isnan(headers.inverse_of(math.nan))
