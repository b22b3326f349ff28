import math

import numpy as np
import pytest

from loki.errors import InputError
from loki.evaluation.scores import ItemScores
from loki.study.equal_score import AtTarget, Curve, compare_at_equal_score, curve_of, forgotten_at


def curve(learned_SPN, forgotten_SPM):
    return Curve(np.array(learned_SPN, dtype=float), {"wiki": np.array(forgotten_SPM, dtype=float)})


def at(target, learned, forgotten):
    return forgotten_at(np.array([target]), np.array([learned], dtype=float), np.array([forgotten], dtype=float))[0]


@pytest.mark.parametrize(
    ("target", "expected"),
    [(0, 0.0), (5, 0.05), (10, 0.1), (20, 0.25), (30, 0.4), (31, math.inf)],
)
def test_the_target_is_read_off_by_interpolation(target, expected):
    assert at(target, [0, 10, 30], [0, 0.1, 0.4]) == pytest.approx(expected)


def test_a_target_that_is_met_exactly_is_reached():
    """Nine tenths of 90 of 91 items are 81 of them, by whichever sum."""
    target, best = 0.9 * (100 * 90 / 91), 100 * 81 / 91
    assert target > best
    assert at(target, [0, best], [0, 0.4]) == pytest.approx(0.4)


def test_what_is_worse_than_what_came_before_is_not_on_the_front():
    """At half the change 20 are right and at three quarters 15, so 25 lies between the half and the whole."""
    assert at(25, [0, 20, 15, 30], [0, 0.1, 0.2, 0.3]) == pytest.approx(0.2)
    # A score that falls later was reached all the same.
    assert at(18, [0, 20, 15], [0, 0.1, 0.2]) == pytest.approx(0.09)


def item_scores(task, values, ids="abcd", **changes):
    return ItemScores(task, "acc", tuple(ids[: len(values)]), tuple(map(float, values)), **changes)


def test_a_curve_begins_at_the_base_and_pairs_by_id():
    base = item_scores("calls", [0, 0, 1])
    losses = {"unit": "nats per token", "higher_is_better": False}
    half = {
        "calls": ItemScores("calls", "acc", ("c", "a", "b"), (1.0, 0.0, 1.0)),
        "wiki_kl": item_scores("wiki_kl", [0.1, 0.2], **losses),
    }
    whole = {
        "calls": item_scores("calls", [1, 1, 0]),
        "wiki_kl": ItemScores("wiki_kl", "kl", ("b", "a"), (0.4, 0.3), **losses),
    }
    found = curve_of(base, [[half, whole]], {"wiki": ("b", "a")})
    assert found.learned_SPN.tolist() == [[[0, 0, 100], [0, 100, 100], [100, 100, 0]]]
    assert found.forgotten_SPM["wiki"].tolist() == [[[0, 0], [0.2, 0.1], [0.4, 0.3]]]
    odd = {**whole, "calls": item_scores("calls", [1, 1, 0], ids="abx")}
    with pytest.raises(InputError, match="task 'calls' was scored on other items than the base: run the study again"):
        curve_of(base, [[half, odd]], {"wiki": ("a", "b")})


WEIGHTS = {"wiki": np.array([1.0, 3.0])}


def test_methods_at_one_score_by_hand():
    """The reference gets 4 of 4 right, so the target is 90 %; one method never reaches it."""
    reference = curve([[[0] * 4, [100] * 4]], [[[0, 0], [0.4, 0.8]]])
    # Mean of two seeds: 50 % at half, 100 % at the whole; 0.05 and 0.1 nats, windows weighing 1 and 3.
    other = curve(
        [[[0] * 4, [100, 0, 0, 0], [100] * 4], [[0] * 4, [0, 100, 100, 100], [100] * 4]],
        [[[0, 0], [0.05, 0.05], [0.1, 0.1]], [[0, 0], [0.05, 0.05], [0.1, 0.1]]],
    )
    worse = curve([[[0] * 4, [100, 0, 0, 0]]], [[[0, 0], [0.1, 0.1]]])
    found = compare_at_equal_score({"lora": reference, "rows": other, "worse": worse}, "lora", WEIGHTS)
    assert found.target == 90
    assert found.best == {"lora": 100, "rows": 100, "worse": 25}
    lora, rows = found.by_method["lora"]["wiki"], found.by_method["rows"]["wiki"]
    assert lora.forgotten == pytest.approx(0.9 * (0.4 + 3 * 0.8) / 4)
    assert rows.forgotten == pytest.approx(0.05 + 0.8 * 0.05)
    assert rows.ratio == pytest.approx(rows.forgotten / lora.forgotten)
    assert found.by_method["worse"]["wiki"] == AtTarget(*(math.inf,) * 6)
    assert (lora.ratio, lora.ratio_low, lora.ratio_high) == (1, 1, 1)
    # Windows differ for the reference alone.
    assert 0.35 < lora.forgotten_low < lora.forgotten < lora.forgotten_high < 0.73


def test_intervals_are_those_of_the_plain_bootstrap():
    """Against resamples drawn one by one, with other random numbers."""
    draw = np.random.default_rng(1)
    learned = 100.0 * (draw.random((1, 3, 60)) < np.array([0.0, 0.3, 0.5])[None, :, None])
    forgotten = draw.gamma(4, 0.01, (1, 3, 20)) * np.array([0, 1, 2])[None, :, None]
    weights = draw.random(20) + 0.5
    found = compare_at_equal_score({"lora": curve(learned, forgotten)}, "lora", {"wiki": weights})
    plain = []
    for _ in range(2000):
        items, windows = draw.integers(0, 60, 60), draw.integers(0, 20, 20)
        l_P = learned[0][:, items].mean(axis=1)
        f_P = (forgotten[0][:, windows] * weights[windows]).sum(axis=1) / weights[windows].sum()
        plain.append(at(0.9 * l_P.max(), l_P, f_P))
    low, high = np.percentile(plain, [2.5, 97.5])
    lora = found.by_method["lora"]["wiki"]
    width = high - low
    assert abs(lora.forgotten_low - low) < 0.08 * width
    assert abs(lora.forgotten_high - high) < 0.08 * width


def test_seeds_are_drawn_too():
    """Two seeds that differ, and items that do not: the interval spans the seeds."""
    learned = [[[0] * 4, [100] * 4]] * 2
    forgotten = [[[0, 0], [0.1, 0.1]], [[0, 0], [0.3, 0.3]]]
    lora = compare_at_equal_score({"lora": curve(learned, forgotten)}, "lora", WEIGHTS).by_method["lora"]["wiki"]
    assert (lora.forgotten, lora.forgotten_low, lora.forgotten_high) == pytest.approx((0.18, 0.09, 0.27))


def test_an_end_out_of_reach_is_infinite():
    """A method that reaches the target by one item of many does not in many resamples."""
    learned = [[[0] * 10, [100] * 9 + [0]]]
    forgotten = [[[0, 0], [0.1, 0.1]]]
    reference = curve([[[0] * 10, [100] * 10]], forgotten)
    found = compare_at_equal_score({"lora": reference, "rows": curve(learned, forgotten)}, "lora", WEIGHTS)
    rows = found.by_method["rows"]["wiki"]
    assert rows.forgotten == pytest.approx(0.1)
    assert rows.forgotten_high == rows.ratio_high == math.inf
