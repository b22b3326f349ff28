"""How long a study will take, from one timed training step and one timed evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from loki.results import Result
from loki.study.conduct import Study
from loki.study.plan import BASE, Run, num_runs, runs_by_phase
from loki.study.run import carry_out
from loki.study.training import Workplace

TIMED_STEPS = 3


@dataclass(frozen=True)
class Forecast:
    """What is left to do."""

    num_runs: int
    num_done: int
    seconds_per_step: float
    evaluation_seconds: float
    """Of a whole run."""
    hours_left: float
    """One run after the other; methods differ, some by a factor of two."""


def forecast(study: Study) -> Forecast:
    """Hours of the runs that are left.

    Finished runs are the measure. Where none has trained, a few steps of the first method are timed; where the base is
    not scored, it is, and stays.
    """
    settings, results = study.settings, study.results
    if BASE not in results:
        study.do_now(BASE)
    known = {**{run: begun.result for run, begun in study.begun.items()}, **results}
    steps = [result.figures["seconds_per_step"] for result in known.values() if "seconds_per_step" in result.figures]
    step = median(steps or [_timed_step(study)])
    once = results[BASE].figures["evaluation_seconds"]
    wholes = [result.figures["evaluation_seconds"] for run, result in known.items() if run.phase == "whole"]
    # Parts of the change are scored on less than the whole, so without a finished run this is an upper bound.
    evaluation = median(wholes or [once * (1 + len(settings.evaluate.scales))])
    seconds = {
        "screen": settings.train.screen_steps * step,
        "whole": settings.train.steps * step + evaluation,
        "suppress": once,
    }
    names = [name for name in settings.methods if not study.only or name in study.only]
    left = 0.0
    for name in names:
        for phase, count in runs_by_phase(settings, name).items():
            num_done = sum(run.method == name and run.phase == phase for run in results)
            left += (count - num_done) * seconds[phase]
    for run, begun in study.begun.items():
        if run not in results:  # no training, and some of the points
            left += evaluation * len(begun.scales) / (1 + len(settings.evaluate.scales)) - seconds["whole"]
    return Forecast(num_runs(settings, study.only), len(results), step, evaluation, left / 3600)


def _timed_step(study: Study) -> float:
    """Seconds of a step of the first method that trains; which rows it trains changes no cost, so no log is needed."""
    settings = study.settings
    first = next(((name, method) for name, method in settings.methods.items() if method.learning_rates), None)
    if first is None:
        return 0.0
    name, method = first
    at_random = {"strategy": "random", "log": None}
    sections = {"rows": method.rows, "more_rows": method.more_rows}
    drawn = {key: rows and rows.model_copy(update=at_random) for key, rows in sections.items()}
    method = method.model_copy(update={**drawn, "damage": None})
    short = {"train": settings.train.model_copy(update={"screen_steps": TIMED_STEPS}), "methods": {name: method}}
    place = Workplace(settings.model_copy(update=short), study.folder)
    result: Result = carry_out(place, Run(name, "screen", method.learning_rates[0]))
    found: float = result.figures["seconds_per_step"]
    return found
