"""The learning rate that a quota leads to."""

from fractions import Fraction

import pytest

from loki.rows import RowSelection
from loki.selection.quota import rows_for_quota
from loki.training.learning_rate import learning_rate_at, selected_quota


def layers(*counts):
    return RowSelection.from_lists([list(range(count)) for count in counts])


@pytest.mark.parametrize("num_rows", [576, 896, 2048, 4096])
@pytest.mark.parametrize("quota", ["0.5", "1", "2.5", "5", "7", "10", "12.5", "20", "30", "33", "50", "99", "100"])
def test_the_quota_that_selected_the_rows_is_found(num_rows, quota):
    count = rows_for_quota(quota, num_rows)
    assert rows_for_quota(selected_quota([layers(count, count, count)], num_rows), num_rows) == count
    # In smaller models a shorter number may select as many rows: 0.4 % of 576 are 2 as well as 0.5 %.
    if num_rows * float(quota) >= 1000:
        assert selected_quota([layers(count, count)], num_rows) == Fraction(quota)


@pytest.mark.parametrize(
    ("counts", "num_rows", "quota"),
    [
        ((57,) * 30, 576, 10),  # 9.896 to 10.069
        ((58,) * 30, 576, Fraction("10.1")),  # 10.069 to 10.243
        ((3, 3), 20, 15),
        ((1, 1), 20, 5),
        ((2, 3, 1), 20, 10),  # 6 of 60
        ((0, 20), 20, 50),
        ((20, 20), 20, 100),
    ],
)
def test_quotas_by_hand(counts, num_rows, quota):
    assert selected_quota([layers(*counts)], num_rows) == quota


def test_the_quota_of_two_projections():
    """As many rows of each count as one selection of them; else all are counted together: 5 of 80."""
    assert selected_quota([layers(57, 57), layers(57, 57)], 576) == 10
    assert selected_quota([layers(2, 1), layers(0, 1)], 20) == 5


def test_the_rule_by_hand():
    """3^-0.83 = 0.40178, 2^0.83 = 1.77769."""
    assert learning_rate_at(Fraction(10), 3e-3) == 3e-3
    assert learning_rate_at(Fraction(30), 1.0) == pytest.approx(0.40178, abs=1e-5)
    assert learning_rate_at(Fraction(5), 2.0) == pytest.approx(2 * 1.77769, abs=1e-4)
