from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loki.errors import InputError
from loki.selection.quota import format_quota, parse_quota, rows_for_quota


@pytest.mark.parametrize(
    ("quota", "exact"),
    [
        ("10", Fraction(10)),
        (10, Fraction(10)),
        (0.1, Fraction(1, 10)),
        (" 33.3 ", Fraction(333, 10)),
        ("1e-1", Fraction(1, 10)),
        (100, Fraction(100)),
        (Fraction(100, 3), Fraction(100, 3)),
    ],
)
def test_a_quota_is_what_was_written(quota, exact):
    assert parse_quota(quota) == exact


@pytest.mark.parametrize("quota", ["", "ten", "10%", "1/0", "nan", float("nan"), float("inf"), None, True, "1,5"])
def test_what_is_no_number_is_refused(quota):
    with pytest.raises(InputError, match="is not a number: give a percentage above 0 and up to 100"):
        parse_quota(quota)


@pytest.mark.parametrize("quota", [0, "0", -1, "100.0001", 101, Fraction(-1, 3)])
def test_a_quota_outside_the_range_is_refused_with_its_value(quota):
    with pytest.raises(InputError, match=r"is outside \(0, 100\]") as caught:
        parse_quota(quota)
    assert f"quota {quota} " in str(caught.value)


@pytest.mark.parametrize(
    ("quota", "num_rows", "expected"),
    [(10, 576, 57), ("0.5", 576, 2), (30, 4096, 1228), (100, 7, 7), ("99.999", 1000, 999), ("33.4", 3, 1)],
)
def test_rows_by_hand(quota, num_rows, expected):
    assert rows_for_quota(quota, num_rows) == expected


@pytest.mark.parametrize(
    ("quota", "num_rows", "expected"),
    [
        ("0.29", 10_000, 29),
        ("0.57", 10_000, 57),
        ("33.3", 1000, 333),
        ("29", 100, 29),
        ("58", 50, 29),
        ("57", 5000, 2850),
    ],
)
@pytest.mark.parametrize("written_as", [str, float])
def test_no_row_is_lost_where_binary_floats_lose_one(quota, num_rows, expected, written_as):
    value = float(quota)
    assert expected - 1 in (int(value / 100 * num_rows), int(value * num_rows / 100)), "a case that floats get wrong"
    assert rows_for_quota(written_as(quota), num_rows) == expected


@settings(deadline=None)
@given(digits=st.integers(1, 10**7), places=st.integers(0, 5), num_rows=st.integers(1, 10**6))
def test_rows_are_the_floor_in_whole_numbers(digits, places, num_rows):
    quota, scale = f"{digits}e-{places}", 100 * 10**places
    if digits > scale:
        with pytest.raises(InputError, match="outside"):
            rows_for_quota(quota, num_rows)
    elif digits * num_rows < scale:
        with pytest.raises(InputError, match=f"gives no row out of {num_rows}"):
            rows_for_quota(quota, num_rows)
    else:
        assert rows_for_quota(quota, num_rows) == digits * num_rows // scale


@settings(deadline=None)
@given(num_rows=st.integers(1, 10**6))
def test_the_remedy_for_too_small_a_quota_works(num_rows):
    with pytest.raises(InputError, match="give at least") as caught:
        rows_for_quota(Fraction(100, num_rows + 1), num_rows)
    assert rows_for_quota(str(caught.value).rsplit(" ", 1)[1], num_rows) == 1


@pytest.mark.parametrize(
    ("quota", "text"),
    [("10", "10"), ("10.0", "10"), ("100", "100"), ("0.50", "0.5"), ("33.3", "33.3"), ("0.0001", "0.0001")],
)
def test_text_of_a_quota(quota, text):
    assert format_quota(parse_quota(quota)) == text


@pytest.mark.parametrize(("quota", "text"), [(Fraction(100, 3), "33.3334"), (Fraction(100, 576), "0.1737")])
def test_an_endless_fraction_is_rounded_up(quota, text):
    assert format_quota(quota) == text


@settings(deadline=None)
@given(digits=st.integers(1, 10**6), places=st.integers(0, 4))
def test_the_text_of_a_quota_of_four_decimals_is_the_quota(digits, places):
    quota = Fraction(digits, 10**places)
    assert Fraction(format_quota(quota)) == quota


@pytest.mark.parametrize("quota", ["12.34567", "0.00001"])
def test_the_text_of_a_longer_quota_is_the_quota_too(quota):
    """Only an endless fraction is rounded: this text is the quota's provenance and names its file."""
    assert Fraction(format_quota(parse_quota(quota))) == Fraction(quota)
