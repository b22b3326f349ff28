import math

import pytest

from loki.errors import ArtefactError, InputError
from loki.evaluation.scores import ItemScores
from loki.results import Result
from loki.study import conduct, forecast
from loki.study.conduct import Study
from loki.study.forecast import Forecast
from loki.study.identity import identity
from loki.study.plan import BASE, Run
from loki.study.settings import load_study

LOSSES = {1e-4: 3.0, 1e-3: 1.0, 1e-2: math.inf}
ORDER = [
    "base",
    "full-lr0.0001-seed0-screen",
    "full-lr0.001-seed0-screen",
    "full-lr0.01-seed0-screen",
    "full-lr0.001-seed0-whole",
    "rows-lr0.001-seed3-whole",
    "zeroed",
    "full-lr0.001-seed1-whole",
]


@pytest.fixture
def settings(write_study):
    return load_study(write_study())


@pytest.fixture
def carried_out(monkeypatch):
    """Runs that were carried out; the losses are invented."""
    done = []

    def carry_out(place, run):
        done.append(run.id)
        loss = LOSSES.get(run.learning_rate, 2.0)
        scores = ItemScores("held_out", "loss", ("0",), (loss,), "nats per token", higher_is_better=False).as_dict()
        scores["scores"] = [None if math.isinf(loss) else loss]
        figures = {"scores": [scores], "evaluation_seconds": 60.0}
        if run.phase in ("screen", "whole"):
            figures["seconds_per_step"] = 2.0
        return Result("study-run", identity(place.settings, run), figures)

    monkeypatch.setattr(conduct, "carry_out", carry_out)
    monkeypatch.setattr(forecast, "carry_out", carry_out)
    return done


def test_runs_in_their_order_with_the_rate_that_was_best(settings, tmp_path, carried_out):
    told = []
    Study(settings, tmp_path / "out").conduct(tell=told.append)
    assert carried_out == ORDER
    assert [(done.run.id, done.num_done, done.num_runs) for done in told] == [
        (run_id, number, 8) for number, run_id in enumerate(ORDER, 1)
    ]
    assert sorted(path.stem for path in (tmp_path / "out/runs").iterdir()) == sorted(ORDER)


def test_what_is_finished_is_not_done_again(settings, tmp_path, carried_out):
    Study(settings, tmp_path / "out").conduct(max_hours=1e-12)
    assert carried_out == []
    Study(settings, tmp_path / "out", ["rows"]).conduct()
    assert carried_out == ["base", "rows-lr0.001-seed3-whole"]
    Study(settings, tmp_path / "out").conduct()
    assert sorted(carried_out) == sorted(ORDER)
    Study(settings, tmp_path / "out").conduct()
    assert len(carried_out) == len(ORDER)


def test_a_failure_is_told_and_tried_again_the_next_time(settings, tmp_path, carried_out, monkeypatch):
    works = conduct.carry_out

    def fails(place, run):
        if run.learning_rate == 1e-3 and run.method == "full":
            raise RuntimeError("no\nroom")
        return works(place, run)

    monkeypatch.setattr(conduct, "carry_out", fails)
    told = []
    study = Study(settings, tmp_path / "out")
    study.conduct(tell=told.append)
    # No rate can be chosen, so that the whole runs wait; the other methods go on.
    assert study.failed == {Run("full", "screen", 1e-3): "RuntimeError: no room"}
    assert [done.error for done in told if done.result is None] == ["RuntimeError: no room"]
    assert carried_out == [ORDER[0], ORDER[1], ORDER[3], "rows-lr0.001-seed3-whole", "zeroed"]
    monkeypatch.setattr(conduct, "carry_out", works)
    Study(settings, tmp_path / "out").conduct()
    assert sorted(carried_out) == sorted(ORDER)


def test_runs_of_other_settings_are_refused(settings, write_study, tmp_path, carried_out):
    Study(settings, tmp_path / "out").conduct()
    other = load_study(write_study(train={"steps": 9, "screen_steps": 2}))
    with pytest.raises(ArtefactError) as error:
        Study(other, tmp_path / "out")
    # The first run of the old length; the short ones stay what they are.
    assert "rows-lr0.001-seed3-whole.json was made under other settings: choose another" in str(error.value)
    # What no run depends on may change.
    Study(load_study(write_study(title="Another name")), tmp_path / "out")


def test_an_unknown_method(settings, tmp_path):
    with pytest.raises(InputError, match="method 'lora' is unknown: this study has full, rows, zeroed"):
        Study(settings, tmp_path / "out", ["lora"])


def test_identity_of_a_run_is_what_decides_its_figures(settings, write_study):
    run = Run("rows", "whole", 1e-3, 3)
    known = identity(settings, run)
    assert known["train"] == {"steps": 8}
    assert identity(settings, Run("rows", "screen", 1e-3, 3))["train"]["steps"] == 2
    assert "train" not in identity(settings, BASE)
    assert known["method"]["rows"] == {"strategy": "random"}
    longer = load_study(write_study(train={"steps": 8, "screen_steps": 3}))
    assert identity(longer, run) == known
    compared = load_study(write_study(reference="full", pairs=[["rows", "full"]]))
    assert identity(compared, run) == known
    assert identity(settings, Run("rows", "whole", 1e-3, 4)) != known


def test_the_forecast_before_anything_ran(settings, tmp_path, carried_out):
    """3 · 2 + 3 · 8 steps of 2 s, and evaluations of 60 s after whole runs and one suppression."""
    found = forecast.forecast(Study(settings, tmp_path / "out"))
    hours = (30 * 2 + 4 * 60) / 3600
    assert found == Forecast(8, 1, 2.0, 60.0, pytest.approx(hours))
    # The base stays; the timed steps are no run of the study.
    assert carried_out == ["base", "full-lr0.0001-seed0-screen"]
    assert [path.stem for path in (tmp_path / "out/runs").iterdir()] == ["base"]


def test_the_forecast_when_all_is_done(settings, tmp_path, carried_out):
    Study(settings, tmp_path / "out").conduct()
    assert forecast.forecast(Study(settings, tmp_path / "out")) == Forecast(8, 8, 2.0, 60.0, 0.0)
    assert len(carried_out) == len(ORDER)
