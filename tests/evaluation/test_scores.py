import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki.errors import ArtefactError, InputError
from loki.evaluation.scores import ItemScores, bootstrap_interval, compare


def scores(values, *, task="arc", ids=None, **changes):
    ids = ids or tuple(f"q{number}" for number in range(len(values)))
    return ItemScores(task, "acc", tuple(ids), tuple(map(float, values)), **changes)


def test_the_mean_of_four_answers_by_hand():
    """75 %; s² = 4/3 · 0.1875 · 10⁴ = 2,500, and √(2,500 / 4) = 25."""
    mean = scores([1, 1, 0, 1]).mean
    assert (mean.value, mean.standard_error, mean.count, mean.unit) == (75.0, 25.0, 4, "%")


def test_a_weighted_mean_by_hand():
    """Weights ¼ and ¾ of 1 and 2 nats: 1.75; √(2 · ((¼ · −¾)² + (¾ · ¼)²)) = 0.375."""
    mean = scores([1, 2], unit="nats per token", weights=(10, 30)).mean
    assert mean.value == 1.75
    assert mean.standard_error == pytest.approx(0.375, rel=1e-15)


def test_one_item_has_no_error():
    assert scores([1]).mean.standard_error is None


def test_equal_weights_are_none():
    values = [0.5, 1.25, 3.0]
    assert scores(values, unit="nats", weights=(7, 7, 7)).mean == pytest.approx(scores(values, unit="nats").mean)


@pytest.mark.parametrize(("right", "above"), [(60, True), (53, True), (52, False), (20, False)])
def test_above_chance_is_two_standard_errors_above(right, above):
    """Of 125 items at a chance of 33.3 %: two errors above it are 42.2 %, and 53 right are 42.4 %."""
    assert scores([1] * right + [0] * (125 - right), chance=100 / 3).is_above_chance is above
    # Without a chance anything above nothing is.
    assert scores([1] * right + [0] * (125 - right)).is_above_chance


def test_changes_are_paired_by_id():
    before = scores([1, 0, 0, 1], ids=("a", "b", "c", "d"))
    after = scores([1, 1, 1, 0], ids=("d", "c", "b", "a"))
    found = compare(before, after)
    # a 1→0, b 0→1, c 0→1, d 1→1: changes −1, 1, 1, 0.
    assert (found.before.value, found.after.value, found.change.value) == (50.0, 75.0, 25.0)
    assert found.change.unit == "points"
    # Squares of −1.25, 0.75, 0.75, −0.25 sum to 2.75: √(2.75 / 3 / 4) = 0.4787.
    assert found.change.standard_error == pytest.approx(47.87, abs=0.01)


def test_an_interval_is_that_of_the_exact_bootstrap_distribution():
    """Resamples of 0 and 1 have mean 0, ½ and 1 with chances ¼, ½ and ¼: the interval is all of it."""
    assert bootstrap_interval(np.array([0.0, 1.0]), np.array([0.5, 0.5]), seed=0) == (0.0, 1.0)
    assert bootstrap_interval(np.array([3.0, 3.0]), np.array([0.5, 0.5]), seed=0) == (3.0, 3.0)


def test_an_interval_agrees_with_a_plain_bootstrap():
    draw = random.Random(1)
    values = [draw.gauss(1, 2) for _ in range(60)]
    weights = [draw.uniform(1, 3) for _ in range(60)]
    means = []
    for _ in range(10_000):
        picked = [draw.randrange(60) for _ in range(60)]
        means.append(sum(values[i] * weights[i] for i in picked) / sum(weights[i] for i in picked))
    means.sort()
    found = bootstrap_interval(np.array(values), np.array(weights) / sum(weights), seed=0)
    # The error of an end's estimate from 10,000 resamples is about 0.03 of the width; both have it.
    width = means[9749] - means[250]
    assert found == pytest.approx((means[250], means[9749]), abs=0.08 * width)


def test_resampling_in_parts_bounds_memory_and_draws_the_same(monkeypatch):
    values = np.arange(50.0)
    weights = np.full(50, 0.02)
    whole = bootstrap_interval(values, weights, seed=3)
    monkeypatch.setattr("loki.evaluation.scores.RESAMPLED_AT_ONCE", 70)
    assert bootstrap_interval(values, weights, seed=3) == pytest.approx(whole, rel=1e-12)


def test_a_clear_difference_leaves_out_zero():
    before = scores([0] * 40)
    assert compare(before, scores([1] * 20 + [0] * 20)).is_clear
    assert not compare(before, before).is_clear
    assert not compare(before, scores([1, *[0] * 39])).is_clear


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ids": ("q0", "q2")}, "was scored on other items before than after (2 differ, such as 'q1')"),
        ({"task": "piqa"}, "scores of task 'arc' and 'piqa' cannot be compared"),
        ({"unit": "nats"}, "scores of unit '%' and 'nats' cannot be compared"),
        ({"weights": (1.0, 2.0)}, "has other weights before than after"),
    ],
)
def test_what_cannot_be_paired_is_refused(changes, text):
    with pytest.raises(InputError, match="evaluate both") as error:
        compare(scores([1, 0]), scores([1, 0], **changes))
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("values", "changes", "text"),
    [
        ([], {}, "has no items"),
        ([1, 0], {"ids": ("a", "a")}, "has the item 'a' more than once"),
        ([1, 0], {"ids": ("a", "b", "c")}, "has 2 scores for 3 items"),
        ([1, 0], {"weights": (1.0,)}, "has 1 weights for 2 items"),
        ([1, 0], {"weights": (1.0, 0.0)}, "has weights that are not above 0"),
        ([1, 0], {"weights": (1.0, math.nan)}, "has weights that are not above 0"),
    ],
)
def test_scores_are_checked(values, changes, text):
    with pytest.raises(InputError) as error:
        scores(values, **changes)
    assert text in str(error.value)


def test_scores_survive_json():
    found = scores([0.25, 1], unit="nats", weights=(1.0, 2.0), chance=25.0, higher_is_better=False)
    assert ItemScores.from_dict(json.loads(json.dumps(found.as_dict()))) == found


@pytest.mark.parametrize("change", [{"ids": None}, {"ids": ["a"]}, {"surprise": 1}])
def test_what_is_no_scores_is_refused(change):
    with pytest.raises(ArtefactError, match="evaluate again"):
        ItemScores.from_dict({**scores([1, 0]).as_dict(), **change})


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=20))
def test_a_change_is_the_difference_of_the_means(pairs):
    before, after = scores([a for a, _ in pairs]), scores([b for _, b in pairs])
    found = compare(before, after)
    assert found.change.value == pytest.approx(after.mean.value - before.mean.value, abs=1e-9)
    assert found.low <= found.change.value + 1e-9
    assert found.change.value <= found.high + 1e-9
