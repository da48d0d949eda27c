"""csrc/core/mask.h against the visibility rule, key by key."""

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

INT_MAX = 2**31 - 1

WINDOWS = st.one_of(st.integers(-1, 8), st.integers(-1, INT_MAX), st.integers(INT_MAX - 8, INT_MAX))
LENGTHS = st.one_of(st.integers(0, 8), st.integers(0, INT_MAX), st.integers(INT_MAX - 8, INT_MAX))


def sees(window_left, window_right, length, p, j):
    """The rule itself: does the query at position p see key j?"""
    return (
        0 <= j < length
        and (window_left < 0 or j >= p - window_left)
        and (window_right < 0 or j <= p + window_right)
    )


def test_every_key_of_short_sequences(headers):
    """Off by one at the length, at the diagonal, or at either edge of the window."""
    windows = range(-1, 6)
    for left, right, length in itertools.product(windows, windows, range(7)):
        for p in range(-7, 10):  # from more queries than tokens to beyond the last token
            begin, end = headers.visible_keys(left, right, length, p)
            expected = [j for j in range(-3, 12) if sees(left, right, length, p, j)]
            assert list(range(begin, end)) == expected, (left, right, length, p)


def test_causal_is_a_right_window_of_zero(headers):
    """The contract's causal rule, which the mask does not know by that name."""
    for length, p, left in itertools.product(range(6), range(-6, 6), range(-1, 4)):
        expected = [
            j for j in range(length) if j <= p and (left < 0 or j >= p - left)
        ]  # j <= p is the whole of causal
        assert list(range(*headers.visible_keys(left, 0, length, p))) == expected


def test_a_row_that_sees_nothing_has_both_ends_at_zero(headers):
    """item_keys takes the ends of the first and the last row, so an empty range must not lie
    beyond the keys that later rows see."""
    for left, right, length in itertools.product(range(-1, 4), range(-1, 4), range(5)):
        for p in range(-6, length):  # all positions that queries have
            keys = headers.visible_keys(left, right, length, p)
            assert keys[0] < keys[1] or keys == (0, 0), (left, right, length, p)


def test_both_ends_only_move_up(headers):
    """The first and the last row of an item tell for all between them."""
    for left, right, length in itertools.product(range(-1, 4), range(-1, 4), range(6)):
        ranges = [headers.visible_keys(left, right, length, p) for p in range(-6, length)]
        for earlier, later in itertools.pairwise(ranges):
            assert earlier[0] <= later[0] and earlier[1] <= later[1]


@settings(deadline=None, derandomize=True, max_examples=300)
@given(WINDOWS, WINDOWS, LENGTHS, st.integers(0, INT_MAX))
@example(INT_MAX, INT_MAX, INT_MAX, 0)  # position + window beyond 2^31
@example(INT_MAX, INT_MAX, 0, INT_MAX)  # position - window below -2^31
@example(INT_MAX, 0, INT_MAX, 0)
@example(0, 0, INT_MAX, 0)
@example(0, INT_MAX, INT_MAX, INT_MAX)
@example(0, INT_MAX, 1, INT_MAX)
@example(-1, INT_MAX, 0, INT_MAX)
def test_extremes(headers, left, right, length, distance):
    """32-bit overflow of position + window + 1 or position - window."""
    p = length - 1 - distance
    if p < -INT_MAX:
        p = -INT_MAX  # 0 tokens and INT_MAX queries
    begin, end = headers.visible_keys(left, right, length, p)

    def visible(j):
        return sees(left, right, length, p, j)

    assert 0 <= begin <= end <= length
    if begin < end:
        # The rule leaves one stretch of keys, so its two ends settle it.
        assert visible(begin) and visible(end - 1)
        assert not visible(begin - 1) and not visible(end)
    else:
        # Any stretch that is left would begin at 0 or at the left edge.
        assert not visible(0) and not visible(p - left)


def test_contains_is_half_open(headers):
    """The end is not in the range."""
    assert [j for j in range(-1, 9) if headers.contains(2, 5, j)] == [2, 3, 4]
    assert not any(headers.contains(3, 3, j) for j in range(9))
