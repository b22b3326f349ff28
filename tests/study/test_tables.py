import pytest

from loki.errors import ArtefactError
from loki.reporting.html import render_report
from loki.results import Result
from loki.study.page import family_of, points, study_report
from loki.study.tables import markdown, tables


def scored(before, after, low, high, by_seed, deviation=None):
    return {
        "before": before,
        "after": after,
        "change": after - before,
        "low": low,
        "high": high,
        "count": 10,
        "unit": "%",
        "by_seed": by_seed,
        "seed_deviation": deviation,
    }


def method(name, label, kind="loki", **changes):
    return {
        "name": name,
        "label": label,
        "kind": kind,
        "learning_rate": 0.003,
        "screened": {},
        "seeds": [0, 1],
        "scores": {
            "calls": scored(0.0, 31.26, 20.0, 40.0, [30.0, 32.52], 1.78),
            "held_out": scored(2.0, 0.5, -2.0, -1.0, [0.4, 0.6], 0.14),
            "wiki_loss": scored(3.5, 3.5004, -0.01, 0.0108, [3.5, 3.5008], 0.0006),
            "wiki_kl": scored(0.0, 0.0123, 0.01, 0.02, [0.012, 0.0126], 0.0004),
            "arc_easy": scored(50.0, 47.5, -5.0, 0.04, [47.0, 48.0], 0.7),
        },
        "forgetting_percent": 5.0,
        "losses_only_percent": 5.25,
        "costs": {
            "num_trainable": 2_626_560,
            "saved_bytes": 10_510_080,
            "seconds_per_step": 3.138,
            "peak_memory_mib": 2928.6,
        },
        **changes,
    }


@pytest.fixture
def result():
    base = {"value": 50.0, "standard_error": 5.0, "count": 10, "unit": "%", "chance": 25.0}
    figures = {
        "title": "Tiny",
        "task": "calls",
        "base": {
            "calls": {**base, "value": 0.0, "chance": None},
            "held_out": {**base, "value": 2.0},
            "wiki_loss": {**base, "value": 3.5},
            "arc_easy": base,
        },
        "above_chance": ["arc_easy"],
        "at_chance": [],
        "methods": [
            method("rows", "LoKI"),
            method("drawn", "random rows", learning_rate=0.01),
            method("lora", "LoRA", "lora", costs={}),
            method("zeroed", "lowest 1 %", "suppress", learning_rate=None),
        ],
    }
    rows = {"rows": {"rows": {"strategy": "layer_balanced"}}, "drawn": {"rows": {"strategy": "random"}}}
    return Result("study", {"evaluate": {"texts": {"wiki": 10}}, "methods": rows}, figures, model="tiny")


def rows_of(result, name):
    return {row[0]: row[1:] for row in tables(result)[name].rows}


def test_what_was_learned_and_forgotten(result):
    found = rows_of(result, "learned")
    assert found["base, untrained"] == ("", "", "0.0", "2.000", "3.500", "", "", "")
    assert found["LoKI"] == (
        "0.003",
        "2",
        "31.3 ± 1.8",
        "0.500 ± 0.140",
        # A change that rounds to nothing has no sign; its ends have.
        "0.000 [−0.010, +0.011]",
        "0.0123 ± 0.0004",
        "5.0",
        "5.2",
    )
    assert set(found) == {"base, untrained", "LoKI", "random rows", "LoRA"}


def test_every_score_of_the_task(result):
    result.figures["tasks"] = ["calls", "refusals"]
    result.figures["base"]["refusals"] = {**result.figures["base"]["calls"], "value": 100.0, "count": 4}
    found = rows_of(result, "tasks")
    assert found["items"] == ("10", "4")
    assert found["base, untrained"] == ("0.0", "100.0")
    assert found["LoKI"] == ("31.3 ± 1.8", "–")


def test_pairs_of_methods(result):
    assert "pairs" not in tables(result)

    def estimate(*values):
        return dict(zip(("value", "low", "high"), values, strict=True))

    result.figures["pairs"] = [
        {
            "method": "rows",
            "against": "drawn",
            "seeds": [0, 1],
            "learned": estimate(5.06, -1.0, 11.0),
            "learned_at_equal_divergence": {"wiki": estimate(None, None, None)},
            "held_out": estimate(-0.0041, -0.01, 0.0021),
            "forgotten_ratio": {"wiki": estimate(1.234, 1.0, 1.5)},
        }
    ]
    assert tables(result)["pairs"].headings[2:] == (
        "task, points",
        "at equal wiki KL",
        "held-out loss",
        "wiki KL, times",
    )
    assert rows_of(result, "pairs") == {
        "LoKI against random rows": (
            "2",
            "+5.1 [−1.0, +11.0]",
            "n/a",
            "−0.004 [−0.010, +0.002]",
            "1.23 [1.00, 1.50]",
        )
    }
    assert "One thing changed" in render_report(study_report(result))
    result.figures["pairs"][0]["forgotten_ratio_at_equal_loss"] = {"wiki": estimate(0.8, 0.7, None)}
    assert tables(result)["pairs"].headings[-1] == "wiki KL at equal loss, times"
    assert rows_of(result, "pairs")["LoKI against random rows"][-2:] == ("1.23 [1.00, 1.50]", "0.80 [0.70, n/a]")


def test_scores_relative_to_full_fine_tuning(result):
    assert "relative" not in tables(result)
    found = {
        "rows": {"calls": {"value": 0.951, "low": 0.5, "high": 2.0}},
        "lora": {"calls": {"value": None, "low": None, "high": None}},
        "drawn": {},
    }
    result.figures["relative"] = {"reference": "lora", "methods": found}
    assert tables(result)["relative"].caption == "Scores relative to LoRA"
    assert "Relative to full fine-tuning" in render_report(study_report(result))
    assert rows_of(result, "relative") == {"LoKI": ("0.95 [0.50, 2.00]",), "LoRA": ("n/a",), "random rows": ("n/a",)}


def test_benchmarks_with_intervals(result):
    assert rows_of(result, "benchmarks")["LoRA"] == ("−2.5 [−5.0, 0.0]",)
    assert rows_of(result, "benchmarks")["base, untrained"] == ("50.0 (chance 25)",)


def test_costs_of_methods_that_have_them(result):
    assert rows_of(result, "costs") == {
        "LoKI": ("2.63 M", "10.5", "3.14", "2,929"),
        "random rows": ("2.63 M", "10.5", "3.14", "2,929"),
    }


def test_rows_at_zero_stand_in_a_table_of_their_own(result):
    assert rows_of(result, "suppressed")["lowest 1 %"] == ("0.000 [−0.010, +0.011]", "−2.5 [−5.0, 0.0]", "5.0")
    result.figures["methods"].pop()
    assert "suppressed" not in tables(result)


def test_rows_at_zero_without_benchmarks(result):
    result.figures["above_chance"] = []
    assert tables(result)["suppressed"].headings == ("rows at zero", "wiki, loss")
    assert rows_of(result, "suppressed") == {"none": ("3.500",), "lowest 1 %": ("0.000 [−0.010, +0.011]",)}


def test_what_is_not_a_number_is_a_dash(result):
    broken = method("rows", "LoKI", forgetting_percent=None)
    broken["scores"]["wiki_loss"].update(change=None, low=None, high=None)
    del broken["scores"]["wiki_kl"]
    result.figures["methods"] = [broken]
    assert rows_of(result, "learned")["LoKI"][4:7] == ("–", "–", "–")


def test_markdown_has_numbers_to_the_right(result):
    lines = markdown(tables(result)["costs"]).splitlines()
    assert lines[0] == "| method | trained weights | file, MB | s a step | peak, MiB |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| LoKI | 2.63 M | 10.5 | 3.14 | 2,929 |"


def test_another_result_has_no_tables():
    with pytest.raises(ArtefactError, match="this is a result of kind 'evaluate': name one that `loki study` wrote"):
        tables(Result("evaluate", {}, {}))


AT = {
    "forgotten": 0.01234,
    "forgotten_low": 0.01,
    "forgotten_high": 0.02,
    "ratio": 0.5,
    "ratio_low": 0.4,
    "ratio_high": 0.6,
}
NOT_REACHED = dict.fromkeys(AT)


def test_methods_at_an_equal_score_from_least_forgotten_to_those_that_do_not_reach_it(result):
    assert "equal-score" not in tables(result)
    rare = {**AT, "forgotten": 0.001, "forgotten_high": None, "ratio_high": None}
    result.figures["equal_score"] = {
        "reference": "lora",
        "share": 0.9,
        "target": 27.72,
        "best": {"rows": 31.26, "lora": 30.8, "drawn": 20.0},
        "methods": {"drawn": {"wiki": NOT_REACHED}, "lora": {"wiki": AT}, "rows": {"wiki": rare}},
    }
    table = tables(result)["equal-score"]
    assert table.caption == "Forgotten at 27.7 % on the task, 90 % of LoRA's best"
    assert table.headings == ("method", "seeds", "best, %", "wiki, KL", "wiki, times LoRA")
    assert table.rows == (
        ("LoKI", "2", "31.3", "0.0010 [0.0100, n/a]", "0.50 [0.40, n/a]"),
        ("LoRA", "2", "30.8", "0.0123 [0.0100, 0.0200]", "0.50 [0.40, 0.60]"),
        ("random rows", "2", "20.0", "n/a", "n/a"),
    )
    assert "Forgotten at an equal task score" in render_report(study_report(result))


def test_parts_of_a_change_are_points_of_the_same_curve(result):
    result.figures["methods"][0]["scaled"] = [{"seed": 1, "scale": 0.5, "calls": 10.0, "wiki_kl": 0.003}]
    whole, *_, part = (point for point in points(result, "wiki") if point.label == "LoKI")
    assert whole.run == part.run == "LoKI"
    assert (part.learned, part.forgotten, part.role) == (10.0, 0.003, "part")


def test_methods_are_points_and_their_seeds_too(result):
    found = points(result, "wiki")
    assert [(point.label, point.family, point.role) for point in found] == [
        (label, family, role)
        for label, family in (("LoKI", "loki"), ("random rows", "random"), ("LoRA", "other"))
        for role in ("whole", "seed", "seed")
    ]
    assert (found[0].learned, found[0].forgotten) == pytest.approx((31.26, 0.0123))
    assert (found[1].learned, found[1].forgotten) == (30.0, 0.012)
    assert family_of(result, result.figures["methods"][1]) == "random"


def test_the_page_has_fronts_and_tables(result):
    page = render_report(study_report(result))
    assert "Learned against forgotten on wiki" in page
    assert "31.3 ± 1.8" in page
    assert "What rows hold" in page
    assert page.count("<svg") == 1
