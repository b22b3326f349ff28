import math

import pytest

from loki.study.plan import Run, chosen_rate, num_runs, runs_to_come
from loki.study.settings import load_study

SCREENED = {Run("full", "screen", 1e-4): 3.0, Run("full", "screen", 1e-3): 1.0, Run("full", "screen", 1e-2): 2.0}
SCREENS = ["full-lr0.0001-seed0-screen", "full-lr0.001-seed0-screen", "full-lr0.01-seed0-screen"]


@pytest.fixture
def settings(write_study):
    return load_study(write_study())


def ids(settings, losses):
    return [run.id for run in runs_to_come(settings, losses)]


def test_before_anything_is_known(settings):
    """The base, the rates of the first method, and whatever has nothing to choose."""
    assert ids(settings, {}) == ["base", *SCREENS, "rows-lr0.001-seed3-whole", "zeroed"]


def test_whole_runs_come_when_their_rate_is_chosen(settings):
    """First every method's first seed, then the others."""
    assert ids(settings, SCREENED) == [
        "base",
        *SCREENS,
        "full-lr0.001-seed0-whole",
        "rows-lr0.001-seed3-whole",
        "zeroed",
        "full-lr0.001-seed1-whole",
    ]
    assert len(ids(settings, SCREENED)) == num_runs(settings) == 8


def test_the_rate_of_least_loss_is_chosen(settings):
    assert chosen_rate(settings, "full", SCREENED) == 1e-3
    # Nothing is chosen while one is missing; a single one is.
    some = dict(list(SCREENED.items())[:2])
    assert chosen_rate(settings, "full", some) is None
    assert chosen_rate(settings, "rows", {}) == 1e-3


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_training_that_came_apart_is_not_chosen(settings, odd):
    assert chosen_rate(settings, "full", {**SCREENED, Run("full", "screen", 1e-3): odd}) == 1e-2


def test_names_of_runs():
    assert Run("lora", "screen", 3e-4).id == "lora-lr0.0003-seed0-screen"
    assert Run("lora", "whole", 3e-4, 2).id == "lora-lr0.0003-seed2-whole"
    assert Run("base", "base").id == "base"
    assert Run("highest", "suppress").id == "highest"
