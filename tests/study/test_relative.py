import math
from itertools import product

import pytest

from loki.evaluation.scores import ItemScores
from loki.study.relative import relative_scores, relative_to


def scores(values, ids=None):
    ids = ids or tuple(map(str, range(len(values))))
    return ItemScores("task", "acc", ids, tuple(map(float, values)))


def test_of_itself_it_is_one_whatever_is_drawn():
    found = relative_to(scores([0.5, 1, 0.25]), scores([0.5, 1, 0.25]))
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_items_are_paired_by_their_ids():
    """By place the resamples would differ: 1/4 of item b over 1 of item a."""
    found = relative_to(scores([1, 0.25], ("a", "b")), scores([0.125, 0.5], ("b", "a")))
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_the_interval_against_all_resamples():
    """Three items have 27 resamples; their percentiles by hand."""
    reference, other = [4, 1, 2], [1, 2, 1]
    ratios = sorted(
        sum(other[i] for i in drawn) / sum(reference[i] for i in drawn) for drawn in product(range(3), repeat=3)
    )
    found = relative_to(scores(reference), scores(other))
    assert found.value == pytest.approx(4 / 7)
    # 2.5 % of 27 lies within the first resample, all of item 0, which is drawn 1 in 27 times.
    assert found.low == ratios[0] == 1 / 4
    assert found.high == ratios[-1] == 2


def test_nothing_right_in_the_reference_is_infinite_and_nothing_at_all_is_no_number():
    found = relative_to(scores([0, 0]), scores([1, 1]))
    assert found.value == found.low == found.high == math.inf
    found = relative_to(scores([0, 0]), scores([0, 0]))
    assert all(map(math.isnan, (found.value, found.low, found.high)))


def test_tasks_that_a_method_was_not_scored_on_are_left_out():
    one, both = {"a": scores([1])}, {"a": scores([2]), "b": scores([1])}
    found = relative_scores("both", {"one": one, "both": both}, ["a", "b"])
    assert {name: list(by_task) for name, by_task in found.items()} == {"one": ["a"], "both": ["a", "b"]}
    assert found["one"]["a"].value == 0.5
