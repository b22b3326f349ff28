from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from plain_selection import plain_adaptive_counts

from loki.selection.shares import adaptive_counts

FLAT, STEEP, ZERO = [1.0] * 8, [0.0] * 7 + [8.0], [0.0] * 8


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        # Half of 2 is 1 each; two more rows cost the steep layer nothing and the flat one 2/8 for the first.
        ([FLAT, STEEP], 2, [1, 3]),
        ([STEEP, FLAT], 2, [3, 1]),
        # Of three more, the steep layer takes all, and is then at twice 2.
        ([FLAT, STEEP, FLAT], 2, [1, 4, 1]),
        # Half of 3 is 2 each. Of five more, the steep layer takes four and is then at twice 3.
        ([FLAT, STEEP, FLAT, FLAT, FLAT], 3, [3, 6, 2, 2, 2]),
        # Shares at risk with two rows and more: 3/10, 6/10 and 3/15, 6/15; two are taken.
        ([[4, 3, 2, 1], [5, 4, 3, 2, 1]], 2, [2, 2]),
        # 2/4 against 3/32 and 7/32.
        ([[1, 1, 1, 1], [1, 2, 4, 25]], 2, [1, 3]),
        ([FLAT, FLAT, FLAT], 4, [4, 4, 4]),
        ([ZERO, ZERO], 2, [2, 2]),
        # Where nothing is at risk, rows cost nothing.
        ([FLAT, ZERO], 2, [1, 3]),
        ([FLAT, STEEP], 1, [1, 1]),
        ([FLAT, STEEP], 8, [8, 8]),
    ],
)
def test_by_hand(layers, count, expected):
    num_rows = max(map(len, layers))
    means_LD = np.array([layer + [0.0] * (num_rows - len(layer)) for layer in layers], dtype=float)
    candidates_LD = np.array([[row < len(layer) for row in range(num_rows)] for layer in layers])
    assert adaptive_counts(means_LD, candidates_LD, count) == expected


def test_rows_that_do_not_stand_give_nothing_but_belong_to_the_layers_sum():
    candidates_LD = np.ones((2, 8), dtype=bool)
    means_LD = np.array([[1.0] * 6 + [2.0, 3.0]] * 2)
    assert adaptive_counts(means_LD, candidates_LD, 2) == [2, 2]
    candidates_LD[0, :6] = False  # rows of 2 and 3 stand: 5/11 at risk with two, against 2/11 and 3/11
    assert adaptive_counts(means_LD, candidates_LD, 2) == [1, 3]
    candidates_LD[0] = [False] + [True] * 7
    means_LD = np.array([[9.0] + [1.0] * 7, [1.0] * 8])  # 2/16 and 3/16, of seven alone 2/7 and 3/7; against 2/8
    assert adaptive_counts(means_LD, candidates_LD, 2) == [3, 1]


def test_layers_without_candidates_give_nothing():
    means_LD = np.array([STEEP, FLAT, STEEP])
    candidates_LD = np.ones((3, 8), dtype=bool)
    candidates_LD[2] = False
    assert adaptive_counts(means_LD, candidates_LD, 2) == [3, 1, 0]


@settings(deadline=None)
@given(st.data())
def test_parity_with_one_row_at_a_time(data):
    """Eighths add up exactly, and equal shares of them are equal in binary too."""
    count = data.draw(st.integers(1, 6))
    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(count, 12)))
    means_LD = data.draw(hnp.arrays(np.float64, shape, elements=st.integers(0, 40).map(lambda n: n / 8)))
    candidates_LD = data.draw(hnp.arrays(bool, shape))
    candidates_LD[:, :count] = True
    candidates_LD[: data.draw(st.integers(0, shape[0] - 1))] = False
    found = adaptive_counts(means_LD, candidates_LD, count)
    exact = [[Fraction(value) for value in layer] for layer in means_LD.tolist()]
    assert found == plain_adaptive_counts(exact, candidates_LD.tolist(), count)
    assert {type(number) for number in found} == {int}
