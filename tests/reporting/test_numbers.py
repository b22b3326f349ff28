import pytest

from loki.reporting.numbers import format_number, percent, plural, power_of_ten, round_down, short_percent, times


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-3, "\u22123"),
        (4096, "4096"),
        (2_626_560, "2\u202f626\u202f560"),
        (0.61234, "0.6123"),
        (12345.6, "12\u202f346"),
        (3.2e-5, "3.2\u2009\u00d7\u200910⁻⁵"),
        (-1e-12, "\u22121\u2009\u00d7\u200910⁻¹²"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_for_reading(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.61234, "0.61"), (-4.56e-5, "\u22124.6\u2009\u00d7\u200910⁻⁵"), (1e-5, "1\u2009\u00d7\u200910⁻⁵")],
)
def test_two_digits(value, text):
    assert format_number(value, 2) == text


def test_percentages_powers_and_plurals():
    assert percent(0.03333) == "3.3\u00a0%"
    assert percent(0.0012, 2) == "0.12\u00a0%"
    assert percent(-0.215) == "\u221221.5\u00a0%"
    assert [short_percent(share) for share in (0, 0.001, 0.0333, 0.1, 0.25, 1)] == [
        f"{text}\u202f%" for text in ("0", "0.1", "3.3", "10", "25", "100")
    ]
    assert [times(ratio) for ratio in (8.06, 0.42, 0.1, 0.034, 0.0)] == ["8.1", "0.4", "0.1", "0.03", "0"]
    assert power_of_ten(-3, "\u2212") == "\u221210⁻³"
    assert [plural(1, "row"), plural(2, "row"), plural(0, "row")] == ["1 row", "2 rows", "0 rows"]


@pytest.mark.parametrize(
    ("value", "expected"), [(1.0, 1), (0.139, 0.1), (0.0799, 0.06), (0.08, 0.08), (7.99, 6), (35, 30), (4e-5, 4e-5)]
)
def test_round_down(value, expected):
    assert round_down(value) == pytest.approx(expected)
