import math

import pytest

from loki.errors import ArtefactError
from loki.evaluation.scores import ItemScores
from loki.results import Result, finite
from loki.study.collect import collect
from loki.study.plan import BASE, Run
from loki.study.settings import load_study


def run_result(scores, **figures):
    return Result(
        "study-run", {}, {"evaluation_seconds": 36.0, "scores": [finite(s.as_dict()) for s in scores], **figures}
    )


def scores(task, values, **changes):
    ids = tuple(f"q{number}" for number in range(len(values)))
    return ItemScores(task, "acc", ids, tuple(map(float, values)), **changes)


def held_out(loss):
    return scores("held_out", [loss, loss], unit="nats per token", higher_is_better=False)


EASY = {"chance": 25.0}
LOSS = {"unit": "nats per token", "higher_is_better": False}


@pytest.fixture
def settings(write_study):
    return load_study(write_study(evaluate={"benchmarks": ["arc_easy", "mmlu"], "texts": {"wiki": 10}}))


@pytest.fixture
def results():
    """Of `full` two seeds are done, of `rows` none, and no row is zeroed."""
    right = [1] * 30 + [0] * 10
    base = [
        held_out(3.0),
        scores("wiki_loss", [2.0, 4.0], **LOSS),
        scores("arc_easy", right, **EASY),
        scores("mmlu", [1] * 10 + [0] * 30, **EASY),
        scores("calls", [0, 0, 0, 0]),
    ]

    def trained(lost, calls, kl, seconds):
        return run_result(
            [
                held_out(1.0),
                scores("wiki_loss", [2.5, 4.0], **LOSS),
                scores("wiki_kl", [kl, kl], **LOSS),
                scores("arc_easy", [0] * lost + right[lost:], **EASY),
                scores("mmlu", [1] * 20 + [0] * 20, **EASY),
                scores("calls", calls),
            ],
            num_trainable=7,
            train_seconds=8 * seconds,
        )

    return {
        BASE: run_result(base),
        Run("full", "screen", 1e-4): run_result([held_out(3.0)]),
        Run("full", "screen", 1e-3): run_result([held_out(2.0)]),
        Run("full", "screen", 1e-2): run_result([scores("held_out", [math.inf, 1], **LOSS)]),
        Run("full", "whole", 1e-3, 0): trained(6, [1, 1, 0, 0], 0.2, 27.0),
        Run("full", "whole", 1e-3, 1): trained(12, [1, 0, 0, 0], 0.4, 81.0),
    }


@pytest.fixture
def full(settings, results):
    (method,) = collect(settings, results).figures["methods"]
    return method


def test_scores_are_means_over_seeds_against_the_base(full):
    assert (full["name"], full["learning_rate"], full["seeds"]) == ("full", 1e-3, [0, 1])
    arc = full["scores"]["arc_easy"]
    # 75 % before; 24 and 18 of 40 right after.
    assert (arc["before"], arc["after"]) == (75.0, pytest.approx(52.5))
    assert arc["change"] == pytest.approx(-22.5)
    assert arc["by_seed"] == pytest.approx([60.0, 45.0])
    assert arc["seed_deviation"] == pytest.approx(15 / math.sqrt(2))
    # Items lose 1, ½ or 0 of a right answer; six lose all, six half.
    assert arc["low"] < -22.5 < arc["high"] < 0
    calls = full["scores"]["calls"]
    assert (calls["before"], calls["after"]) == (0.0, 37.5)


def test_a_divergence_is_measured_from_nothing(full):
    kl = full["scores"]["wiki_kl"]
    assert (kl["before"], kl["after"], kl["change"]) == (0.0, pytest.approx(0.3), pytest.approx(0.3))
    assert full["scores"]["wiki_loss"]["change"] == pytest.approx(0.25)


def test_forgetting_counts_benchmarks_above_chance_only(settings, results, full):
    figures = collect(settings, results).figures
    # MMLU stands at chance, and its gain hides no loss.
    assert (figures["above_chance"], figures["at_chance"]) == (["arc_easy"], ["mmlu"])
    assert full["forgetting_percent"] == full["losses_only_percent"] == pytest.approx(30.0)
    assert figures["task"] == "calls"


def test_costs_of_a_step_are_those_of_the_fastest_run(settings, results, full):
    assert full["costs"] == {"num_trainable": 7, "seconds_per_step": 27.0}
    # A short run of 2 steps where the whole ones have 8, and one of another method.
    short = run_result([held_out(2.0)], train_seconds=40.0)
    other = run_result([held_out(2.0)], train_seconds=2.0)
    more = results | {Run("full", "screen", 1e-3): short, Run("rows", "screen", 1e-3): other}
    (method,) = collect(settings, more).figures["methods"]
    assert method["costs"]["seconds_per_step"] == 20.0


def test_time_is_counted(settings, results):
    figures = collect(settings, results).figures
    assert figures["num_runs"] == 6
    assert figures["hours"] == pytest.approx((6 * 36 + 8 * (27 + 81)) / 3600, abs=0.005)


def test_what_was_screened_is_told(full):
    assert full["screened"] == {"0.0001": 3.0, "0.001": 2.0, "0.01": None}


def test_one_seed_has_no_deviation(settings, results):
    del results[Run("full", "whole", 1e-3, 1)]
    (method,) = collect(settings, results).figures["methods"]
    assert method["seeds"] == [0]
    assert method["scores"]["arc_easy"]["seed_deviation"] is None


def test_without_the_base_there_is_nothing_to_compare_with(settings, results):
    del results[BASE]
    with pytest.raises(ArtefactError, match="the base of this study is not scored yet: run the study first"):
        collect(settings, results)


def test_parts_of_a_change_are_told_run_by_run(settings, results):
    part = [scores("calls", [1, 0, 0, 0]), scores("wiki_kl", [0.1, 0.1], **LOSS), scores("wiki_loss", [2, 2], **LOSS)]
    results[Run("full", "whole", 1e-3, 1)].figures["scaled"] = [
        {"scale": 0.5, "scores": [finite(score.as_dict()) for score in part]}
    ]
    (method,) = collect(settings, results).figures["methods"]
    (told,) = method["scaled"]
    assert told == {"seed": 1, "scale": 0.5, "calls": 25.0, "wiki_kl": pytest.approx(0.1), "wiki_loss": 2.0}


def test_methods_are_compared_at_the_score_of_the_reference(write_study, results):
    """The mean of two seeds gets 37.5 % of the calls for 0.3 nats: nine tenths of it are had for nine tenths."""
    evaluate = {"benchmarks": ["arc_easy", "mmlu"], "texts": {"wiki": 10}}
    figures = collect(load_study(write_study(evaluate=evaluate, reference="full")), results).figures
    found = figures["equal_score"]
    assert (found["reference"], found["target"]) == ("full", pytest.approx(33.75))
    at = found["methods"]["full"]["wiki"]
    assert at["forgotten"] == pytest.approx(0.27)
    assert (at["ratio"], at["ratio_low"], at["ratio_high"]) == (1, 1, 1)


def test_without_a_reference_nothing_is_compared(settings, results, write_study):
    assert collect(settings, results).figures["equal_score"] is None
    # It has not run yet.
    later = load_study(write_study(evaluate={"texts": {"wiki": 10}}, reference="rows"))
    assert collect(later, results).figures["equal_score"] is None


def test_scores_are_told_relative_to_full_fine_tuning(settings, results):
    """Of the mean of two seeds, 3 of 8 right answers, rows have a run with 2 of 4: a third more."""
    results[Run("rows", "whole", 1e-3, 0)] = results[Run("full", "whole", 1e-3, 0)]
    rows = settings.methods["rows"].model_copy(update={"learning_rates": (1e-3,), "seeds": (0,)})
    settings = settings.model_copy(update={"methods": {**settings.methods, "rows": rows}})
    figures = collect(settings, results).figures
    assert figures["tasks"] == ["calls"]
    found = figures["relative"]
    assert found["reference"] == "full"
    assert found["methods"]["full"]["calls"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["methods"]["rows"]["calls"]["value"] == pytest.approx((2 / 4) / (3 / 8))


def test_nothing_is_relative_to_full_fine_tuning_that_has_not_run(settings, results):
    kept = {run: result for run, result in results.items() if run.method != "full"}
    assert collect(settings, kept).figures["relative"] is None


def test_pairs_are_compared_over_the_seeds_that_both_have(settings, results):
    """Of `full` seeds 0 and 1 are done, of `rows` only seed 0, twice as far from the base with the whole change."""
    part = [held_out(2.0), scores("calls", [1, 0, 0, 0]), scores("wiki_kl", [0.1, 0.1], **LOSS)]
    for run, result in results.items():
        if run.phase == "whole":
            result.figures["scaled"] = [{"scale": 0.5, "scores": [finite(score.as_dict()) for score in part]}]
    result = results[Run("full", "whole", 1e-3, 0)]
    far = [
        {**score, "scores": [2 * value for value in score["scores"]]} if score["task"] == "wiki_kl" else score
        for score in result.figures["scores"]
    ]
    results[Run("rows", "whole", 1e-3, 0)] = Result("study-run", {}, {**result.figures, "scores": far})
    rows = settings.methods["rows"].model_copy(update={"learning_rates": (1e-3,), "seeds": (0, 1)})
    settings = settings.model_copy(
        update={"methods": {**settings.methods, "rows": rows}, "pairs": (("rows", "full"), ("full", "full"))}
    )
    pair, same = collect(settings, results).figures["pairs"]
    assert (pair["method"], pair["against"], pair["seeds"], same["seeds"]) == ("rows", "full", [0], [0, 1])
    assert pair["forgotten_ratio"]["wiki"] == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert pair["learned"] == pair["held_out"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    # From the part to the whole the distance grows from none to a doubling.
    assert pair["forgotten_ratio_at_equal_loss"]["wiki"]["value"] == pytest.approx(2**0.5)
    # Runs of earlier versions did not ask parts of the change for it.
    del results[Run("rows", "whole", 1e-3, 0)].figures["scaled"][0]["scores"][0]
    pair, _ = collect(settings, results).figures["pairs"]
    assert pair["forgotten_ratio_at_equal_loss"] == {"wiki": {"value": None, "low": None, "high": None}}
    del results[Run("full", "whole", 1e-3, 0)]
    (same,) = collect(settings, results).figures["pairs"]
    assert (same["method"], same["seeds"]) == ("full", [1])
