from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki.analysis.quadrature import Rule, nodes_and_weights

HALF_ROOT_THIRD = 0.28867513459481287  # 1 / (2 √3)

TABLES = [
    ("riemann_left", 1, [0], [1]),
    ("riemann_left", 2, [0, 1 / 2], [1 / 2, 1 / 2]),
    ("riemann_left", 4, [0, 1 / 4, 1 / 2, 3 / 4], [1 / 4] * 4),
    ("riemann_right", 1, [1], [1]),
    ("riemann_right", 2, [1 / 2, 1], [1 / 2, 1 / 2]),
    ("riemann_right", 4, [1 / 4, 1 / 2, 3 / 4, 1], [1 / 4] * 4),
    ("riemann_middle", 1, [1 / 2], [1]),
    ("riemann_middle", 2, [1 / 4, 3 / 4], [1 / 2, 1 / 2]),
    ("riemann_middle", 4, [1 / 8, 3 / 8, 5 / 8, 7 / 8], [1 / 4] * 4),
    ("riemann_trapezoid", 2, [0, 1], [1 / 2, 1 / 2]),
    ("riemann_trapezoid", 3, [0, 1 / 2, 1], [1 / 4, 1 / 2, 1 / 4]),
    ("riemann_trapezoid", 5, [0, 1 / 4, 1 / 2, 3 / 4, 1], [1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8]),
    ("gausslegendre", 1, [1 / 2], [1]),
    ("gausslegendre", 2, [1 / 2 - HALF_ROOT_THIRD, 1 / 2 + HALF_ROOT_THIRD], [1 / 2, 1 / 2]),
    ("gausslegendre", 3, [0.1127016653792583, 1 / 2, 0.8872983346207417], [5 / 18, 8 / 18, 5 / 18]),
]

# Sums of a few float64 numbers near 1: some units in the last place (2e-16 each).
CLOSE = {"rtol": 0, "atol": 1e-14}


@pytest.mark.parametrize(("rule", "steps", "nodes", "weights"), TABLES)
def test_rules_follow_tables_computed_by_hand(rule, steps, nodes, weights):
    found_nodes, found_weights = nodes_and_weights(rule, steps)
    assert found_nodes.shape == found_weights.shape == (steps,)
    assert found_nodes.dtype == found_weights.dtype == np.float64
    np.testing.assert_allclose(found_nodes, nodes, **CLOSE)
    np.testing.assert_allclose(found_weights, weights, **CLOSE)


def test_every_rule_has_a_table():
    assert {rule for rule, *_ in TABLES} == set(get_args(Rule))


@given(rule=st.sampled_from(get_args(Rule)), steps=st.integers(2, 60))
def test_weights_sum_to_one_and_nodes_rise_within_the_unit_interval(rule, steps):
    nodes, weights = nodes_and_weights(rule, steps)
    np.testing.assert_allclose(weights.sum(), 1, **CLOSE)
    assert (weights > 0).all()
    assert (np.diff(nodes) > 0).all()
    assert nodes[0] >= 0
    assert nodes[-1] <= 1


@given(steps=st.integers(2, 60))
def test_only_left_and_trapezoid_begin_at_0_and_only_right_and_trapezoid_end_at_1(steps):
    """Exactly: G(0) is looked up by comparison with 0.0."""
    begins = {rule for rule in get_args(Rule) if 0.0 in nodes_and_weights(rule, steps)[0]}
    ends = {rule for rule in get_args(Rule) if 1.0 in nodes_and_weights(rule, steps)[0]}
    assert begins == {"riemann_left", "riemann_trapezoid"}
    assert ends == {"riemann_right", "riemann_trapezoid"}


@given(steps=st.integers(1, 60))
def test_gauss_legendre_agrees_with_numpy_on_its_own_interval(steps):
    nodes, weights = nodes_and_weights("gausslegendre", steps)
    numpy_nodes, numpy_weights = np.polynomial.legendre.leggauss(steps)
    np.testing.assert_allclose(2 * nodes - 1, numpy_nodes, **CLOSE)
    np.testing.assert_allclose(2 * weights, numpy_weights, **CLOSE)


@given(
    steps=st.integers(1, 8),
    coefficients=st.lists(st.floats(-1, 1), min_size=16, max_size=16),
)
def test_gauss_legendre_is_exact_up_to_degree_2m_minus_1(steps, coefficients):
    polynomial = np.polynomial.Polynomial(coefficients[: 2 * steps])
    nodes, weights = nodes_and_weights("gausslegendre", steps)
    np.testing.assert_allclose(weights @ polynomial(nodes), polynomial.integ()(1), **CLOSE)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_gauss_legendre_is_not_exact_at_degree_2m(steps):
    nodes, weights = nodes_and_weights("gausslegendre", steps)
    assert abs(weights @ nodes ** (2 * steps) - 1 / (2 * steps + 1)) > 1e-8


@pytest.mark.parametrize(
    ("rule", "order"), [("riemann_left", 1), ("riemann_right", 1), ("riemann_middle", 2), ("riemann_trapezoid", 2)]
)
def test_errors_fall_with_the_order_of_the_rule(rule, order):
    """∫ e^α: ten times as many intervals divide the error by 10 (end points) or 100 (midpoint, trapezoid)."""

    def error(intervals):
        nodes, weights = nodes_and_weights(rule, intervals + (rule == "riemann_trapezoid"))
        return abs(weights @ np.exp(nodes) - (np.e - 1))

    # Terms of the next order change the ratio by about 1/intervals.
    assert error(20) / error(200) == pytest.approx(10**order, rel=0.05)
