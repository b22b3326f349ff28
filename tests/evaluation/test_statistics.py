import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loki.evaluation.statistics import mean, paired_change, share
from loki.results import Measure

numbers_of_three_decimals = st.integers(-(10**9), 10**9).map(lambda n: n / 1000)
values = st.lists(numbers_of_three_decimals, min_size=2, max_size=20)


def test_mean_by_hand():
    """Squared distances 2.25 + 0.25 + 0.25 + 2.25 = 5; s² = 5/3; standard error √(5/12)."""
    found = mean([1, 2, 3, 4], "nats")
    assert (found.value, found.count, found.unit) == (2.5, 4, "nats")
    assert found.standard_error == pytest.approx(math.sqrt(5 / 12), rel=1e-15)  # one rounding of each operation


@settings(deadline=None)
@given(values)
def test_parity_with_the_standard_library(numbers):
    found = mean(numbers)
    # The mean is rounded in its last bit, so each distance from it is off by about 1e-16 of the largest value.
    scale = max(map(abs, numbers))
    assert found.value == pytest.approx(statistics.fmean(numbers), rel=1e-15)
    expected = statistics.stdev(numbers) / math.sqrt(len(numbers))
    assert found.standard_error == pytest.approx(expected, rel=1e-9, abs=1e-12 * scale)


@settings(deadline=None)
@given(values, st.integers(-1000, 1000))
def test_a_shift_moves_the_mean_and_not_its_error(numbers, shift):
    plain, moved = mean(numbers), mean([number + shift for number in numbers])
    # A shifted number is rounded at the size of the sum, 1e6, to about 1e-10.
    assert moved.value == pytest.approx(plain.value + shift, abs=1e-9)
    assert moved.standard_error == pytest.approx(plain.standard_error, rel=1e-6, abs=1e-9)


def test_large_values_do_not_swallow_small_ones():
    assert mean([1e16, 1.0, -1e16, 1.0]).value == 0.5


def test_a_single_value_has_no_error():
    assert mean([3.5]) == Measure(3.5, None, 1, "")


def test_the_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="mean of no values is undefined"):
        mean([])


def test_share_by_hand():
    """One of four: s² = (75² + 3·25²)/3 = 2500; standard error 50/2."""
    assert share([False, True, False, False]) == Measure(25.0, 25.0, 4, "%")


def test_a_share_of_all_has_no_spread():
    assert share([True, True, True]) == Measure(100.0, 0.0, 3, "%")


def test_paired_change_by_hand():
    """Differences 1, 3: mean 2, s² = 2, standard error 1, although both sides spread far more."""
    assert paired_change([0, 100], [1, 103], "points") == Measure(2.0, 1.0, 2, "points")


@settings(deadline=None)
@given(values)
def test_no_change_is_zero_without_error(numbers):
    found = paired_change(numbers, numbers)
    assert (found.value, found.standard_error) == (0.0, 0.0)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers_of_three_decimals, numbers_of_three_decimals), min_size=2, max_size=9))
def test_swapping_before_and_after_flips_the_sign_only(pairs):
    before, after = zip(*pairs, strict=True)
    there, back = paired_change(before, after), paired_change(after, before)
    assert (there.value, there.standard_error) == (-back.value, back.standard_error)


def test_items_must_be_the_same():
    with pytest.raises(ValueError, match="shorter"):
        paired_change([1.0, 2.0], [1.0])
