import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki.dialling.settings import knobs, layer_scales, parse_ways, row_scales
from loki.dialling.shares import Shares
from loki.errors import InputError


def shares(gain, damage):
    return Shares(np.array(gain, dtype=float), np.array(damage, dtype=float))


ONE_EACH = np.arange(4)


def test_layers_by_hand():
    """Gains 4, 2, 1 for damages 1, 1, 1: cut off at 1, then in proportion to gain over damage."""
    found = shares([4, 2, 1], [1, 1, 1])
    # Half of the most damage, 3: c = 0.5 gives 1, 1, 0.5, that is 2.25; c = √(1.5 − 1)/… by hand for 0.75: all below 1.
    position = np.sqrt((1 + 1 + 0.25) / 3)
    assert layer_scales(found, np.arange(3), position) == pytest.approx([1, 1, 0.5])
    position = np.sqrt((1 + 0.25 + 0.0625) / 3)
    assert layer_scales(found, np.arange(3), position) == pytest.approx([1, 0.5, 0.25])
    assert layer_scales(found, np.arange(3), 1.0).tolist() == [1, 1, 1]
    assert layer_scales(found, np.arange(3), 0.0).tolist() == [0, 0, 0]


def test_layers_without_gain_or_damage():
    found = shares([1, -1, 2, 0], [1, 1, -1, 0])
    for position in (0.1, 0.5, 1.0):
        scales = layer_scales(found, ONE_EACH, position)
        # The second only damages; the third only gains, and the last does neither.
        assert scales[1:].tolist() == [0, 1, 1]
        assert scales[0] == pytest.approx(position)
    assert layer_scales(found, ONE_EACH, 0.0).tolist() == [0, 0, 0, 0]


def test_units_of_a_layer_share_its_scale():
    found = shares([3, 1, 1, 1], [0.5, 0.5, 2, 2])
    one, two = layer_scales(found, np.array([4, 4, 7, 7]), 0.5)[[0, 2]]
    assert layer_scales(found, np.array([4, 4, 7, 7]), 0.5).tolist() == [one, one, two, two]
    # Sums of a layer: 4 for 1, and 2 for 4.
    assert (one, two) == (1.0, pytest.approx(np.sqrt((0.25 * 5 - 1) / 4)))


@given(
    st.lists(st.tuples(st.floats(0.01, 5), st.floats(0.01, 5)), min_size=1, max_size=5),
    st.floats(0.05, 1),
)
def test_no_small_exchange_between_layers_is_better(pairs, position):
    """The optimum of Σ g s for a given Σ d s²: moving a little damage from one layer to another gains nothing."""
    gain, damage = map(np.array, zip(*pairs, strict=True))
    scales = layer_scales(shares(gain, damage), np.arange(len(gain)), position)
    assert (damage * scales**2).sum() == pytest.approx(position**2 * damage.sum(), rel=1e-6)
    # Marginal gain for marginal damage, g / (2 d s): equal below the cut, at least as much on it.
    rates = gain / (2 * damage * scales)
    below = scales < 1 - 1e-9
    if below.any():
        assert rates[below] == pytest.approx(rates[below][0])
        assert (rates[~below] >= rates[below][0] - 1e-6).all()


def test_rows_go_in_the_order_of_gain_for_damage():
    """Ratios 2, ½, nothing gained, all gained: the third goes first, then the second, then the first."""
    found = shares([2, 1, -1, 1], [1, 2, 1, -1])
    assert [row_scales(found, position).tolist() for position in (1, 0.75, 0.5, 0.25, 0)] == [
        [1, 1, 1, 1],
        [1, 1, 0, 1],
        [1, 0, 0, 1],
        [0, 0, 0, 1],
        [0, 0, 0, 0],
    ]


def test_all_alike():
    assert knobs(shares([1, 1], [1, 1]), np.array([0, 1]))["scale"](0.3).tolist() == [0.3, 0.3]


def test_ways_by_name():
    assert parse_ways(None, has_rows=True) == parse_ways([], has_rows=False) == ("scale",)
    assert parse_ways(["layers", "rows", "layers", "scale"], has_rows=True) == ("scale", "layers", "rows")
    assert parse_ways(["rows", "scale"], has_rows=True) == ("scale", "rows")
    with pytest.raises(InputError, match="--by rows is for LoKI adapters: a LoRA changes every row; give scale or lay"):
        parse_ways(["rows"], has_rows=False)
    with pytest.raises(InputError, match="--by columns is unknown: give scale, layers, rows"):
        parse_ways(["columns"], has_rows=True)
