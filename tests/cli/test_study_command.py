"""`loki study` on the command line; what the runs find is invented."""

import json
from contextlib import contextmanager

import pytest
import yaml

from loki.evaluation.scores import ItemScores
from loki.results import Result
from loki.study import conduct
from loki.study.identity import identity

METHODS = {
    name: {"kind": "full", "label": name.title(), "learning_rates": [1e-3]} for name in ("first", "second", "third")
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    values = {"title": "Tiny", "model": "a-model", "data_dir": str(tmp_path), "methods": METHODS}
    path.write_text(yaml.safe_dump({**values, "train": {"steps": 8, "screen_steps": 2}}))
    return path


@pytest.fixture
def done(monkeypatch):
    """Runs that were carried out, in this process; the one named `stop` interrupts."""
    found = []

    def carry_out(place, run):
        found.append(run.id)
        losses = ItemScores("held_out", "loss", ("0",), (2.0,), "nats per token", higher_is_better=False)
        calls = ItemScores("calls", "acc", ("0", "1"), (1.0, 0.0))
        figures = {"scores": [losses.as_dict(), calls.as_dict()], "evaluation_seconds": 60.0}
        return Result("study-run", identity(place.settings, run), figures)

    @contextmanager
    def here(_prepare):
        with conduct._here() as submit:
            yield submit

    monkeypatch.setattr(conduct, "carry_out", carry_out)
    monkeypatch.setattr(conduct, "_pool", here)
    return found


def methods_of(path):
    return [method["name"] for method in json.loads(path.read_text())["figures"]["methods"]]


def test_figures_are_written_after_every_run(loki, config, done, tmp_path, monkeypatch):
    invented = conduct.carry_out

    def interrupt(place, run):
        if run.method == "second":
            raise KeyboardInterrupt
        return invented(place, run)

    monkeypatch.setattr(conduct, "carry_out", interrupt)
    out = tmp_path / "out"
    stopped = loki("study", config, "--output-dir", out)
    assert (stopped.code, done) == (130, ["base", "first-lr0.001-seed0-whole"])
    assert methods_of(out / "study.json") == ["first"]
    monkeypatch.setattr(conduct, "carry_out", invented)
    assert loki("study", config, "--output-dir", out).code == 0
    assert done[2:] == ["second-lr0.001-seed0-whole", "third-lr0.001-seed0-whole"]
    assert methods_of(out / "study.json") == ["first", "second", "third"]


def test_figures_are_of_all_finished_runs_whatever_this_command_runs(loki, config, done, tmp_path):
    options = ("--output-dir", tmp_path / "out", "--result", tmp_path / "found.json")
    assert loki("study", config, "--only", "third", *options).code == 0
    ended = loki("study", config, "--only", "first", *options, "--json")
    assert methods_of(tmp_path / "found.json") == ["first", "third"]
    assert json.loads(ended.out)["figures"]["num_runs"] == 3
    assert "3/2" not in ended.err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--workers", "0"], "--workers 0 is not possible: give 1 or more"),
        (["--save-minutes", "-1"], "--save-minutes -1.0 is not possible: give 0 or more"),
        (["--save-minutes", "nan"], "--save-minutes nan is not possible: give 0 or more"),
        (["--max-hours", "0"], "--max-hours 0.0 is not possible: give a number above 0"),
        (["--only", "fourth"], "method 'fourth' is unknown: this study has first, second, third"),
        (["--data-dir", "nowhere"], "data folder 'nowhere' does not exist: give --data-dir"),
    ],
)
def test_bad_input_is_one_line(loki, config, done, tmp_path, options, text):
    ended = loki("study", config, "--output-dir", tmp_path / "out", *options)
    assert (ended.code, done) == (2, [])
    assert text in ended.err
    assert ended.err.count("\n") == 1
