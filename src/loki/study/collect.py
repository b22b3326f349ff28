"""From finished runs to the figures of each method: what it learned, what it forgot, what it cost.

Of several seeds the scores of each item are averaged first, so that intervals are over items; how much seeds differ is
given beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median, stdev
from typing import Any

import numpy as np

from loki.errors import ArtefactError
from loki.evaluation.benchmarks.table import expand
from loki.evaluation.forgetting import forgetting
from loki.evaluation.scores import Difference, ItemScores, compare
from loki.results import Result, finite
from loki.study.equal_score import SHARE, compare_at_equal_score, curve_of
from loki.study.plan import BASE, Run, chosen_rate, screens
from loki.study.relative import relative_scores
from loki.study.run import HELD_OUT, held_out_loss
from loki.study.settings import StudySettings

COSTS = ("num_trainable", "seconds_per_step", "peak_memory_mib", "saved_bytes")
TEXT_ENDINGS = ("_loss", "_kl")


@dataclass(frozen=True)
class Scored:
    """One task under one method."""

    difference: Difference
    """To the base, over the mean of the seeds."""
    by_seed: tuple[float, ...]
    """The mean of each seed, in the unit of the difference's ends."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        found = self.difference
        return {
            "before": found.before.value,
            "after": found.after.value,
            "change": found.change.value,
            "low": found.low,
            "high": found.high,
            "count": found.before.count,
            "unit": found.before.unit,
            "by_seed": list(self.by_seed),
            "seed_deviation": stdev(self.by_seed) if len(self.by_seed) > 1 else None,
        }


@dataclass(frozen=True)
class Outcome:
    """What is known of one method."""

    name: str
    label: str
    kind: str
    learning_rate: float | None
    screened: Mapping[str, float]
    """Held-out loss after the short runs, by learning rate."""
    seeds: tuple[int, ...]
    scores: Mapping[str, Scored] = field(default_factory=dict)
    forgetting_percent: float | None = None
    """The paper's score over the benchmarks on which the base is above chance."""
    losses_only_percent: float | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    scaled: Sequence[Mapping[str, float]] = ()
    """What parts of the change learned and forgot, run by run: `seed`, `scale`, and tasks by name."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {
            "name": self.name,
            "label": self.label,
            "kind": self.kind,
            "learning_rate": self.learning_rate,
            "screened": dict(self.screened),
            "seeds": list(self.seeds),
            "scores": {task: scored.as_dict() for task, scored in self.scores.items()},
            "forgetting_percent": self.forgetting_percent,
            "losses_only_percent": self.losses_only_percent,
            "costs": dict(self.costs),
            "scaled": [dict(point) for point in self.scaled],
        }


def collect(settings: StudySettings, results: Mapping[Run, Result]) -> Result:
    """One result of all finished runs; methods without a finished whole run are left out.

    Raises:
        ArtefactError: the base is not scored yet.
    """
    if BASE not in results:
        raise ArtefactError("the base of this study is not scored yet: run the study first")
    base = scores_of(results[BASE])
    losses = {run: held_out_loss(result) for run, result in results.items()}
    asked = [task for task in _benchmarks(settings) if task in base]
    above = [task for task in asked if base[task].is_above_chance]
    outcomes = [
        outcome
        for name in settings.methods
        if (outcome := _outcome(settings, name, results, losses, base, above)) is not None
    ]
    learned = learned_tasks(settings, base)
    task = next(iter(learned), None)
    figures = {
        "title": settings.title,
        "task": task,
        "tasks": learned,
        "base": {task: _measure(scores) for task, scores in base.items()},
        "above_chance": above,
        "at_chance": [task for task in asked if task not in above],
        "num_runs": len(results),
        "hours": round(sum(_seconds(result) for result in results.values()) / 3600, 2),
        "methods": [outcome.as_dict() for outcome in outcomes],
        "equal_score": None if task is None else _equal_score(settings, results, losses, base, task),
        "relative": _relative(settings, results, losses, learned),
    }
    values = settings.model_dump(mode="json", exclude={"data_dir", "device"})
    return Result("study", values, finite(figures), model=results[BASE].model)


def scores_of(result: Result) -> dict[str, ItemScores]:
    """Scores of a run by task; null, which stands for what is not a number, is infinite."""
    return _by_task(result.figures["scores"])


def learned_tasks(settings: StudySettings, base: Mapping[str, ItemScores]) -> list[str]:
    """The tasks that are neither benchmarks nor texts: those that are learned, the main one first."""
    known = {HELD_OUT, *_benchmarks(settings)}
    return [task for task in base if task not in known and not task.endswith(TEXT_ENDINGS)]


def scaled_scores_of(result: Result) -> dict[float, dict[str, ItemScores]]:
    """Scores of a run's parts of its change, by part and task."""
    return {part["scale"]: _by_task(part["scores"]) for part in result.figures.get("scaled", [])}


def _by_task(found: Sequence[Mapping[str, Any]]) -> dict[str, ItemScores]:
    by_task = {}
    for values in found:
        scores = [math.inf if score is None else score for score in values["scores"]]
        by_task[values["task"]] = ItemScores.from_dict({**values, "scores": scores})
    return by_task


def _equal_score(
    settings: StudySettings,
    results: Mapping[Run, Result],
    losses: Mapping[Run, float],
    base: Mapping[str, ItemScores],
    task: str,
) -> dict[str, Any] | None:
    """Forgetting of all methods at the reference's score, as JSON; None without a reference that has run."""
    texts = list(settings.evaluate.texts)
    if settings.reference is None or not texts:
        return None
    curves = {}
    read = {text: base[f"{text}_loss"] for text in texts}
    for name, method in settings.methods.items():
        done = [results[run] for run in _whole_runs(settings, name, losses) if run in results]
        if method.kind == "suppress" or not done:
            continue
        runs = [[*scaled_scores_of(result).values(), scores_of(result)] for result in done]
        if all(task in point and all(f"{text}_kl" in point for text in texts) for run in runs for point in run):
            curves[name] = curve_of(base[task], runs, {text: scores.ids for text, scores in read.items()})
    if settings.reference not in curves:
        return None
    weights = {text: np.array(scores.weights or [1.0] * len(scores.ids)) for text, scores in read.items()}
    found = compare_at_equal_score(curves, settings.reference, weights)
    return {
        "reference": settings.reference,
        "share": SHARE,
        "target": found.target,
        "best": dict(found.best),
        "methods": {
            name: {text: at.as_dict() for text, at in by_text.items()} for name, by_text in found.by_method.items()
        },
    }


def _relative(
    settings: StudySettings, results: Mapping[Run, Result], losses: Mapping[Run, float], tasks: Sequence[str]
) -> dict[str, Any] | None:
    """Scores relative to full fine-tuning, as JSON; None where it has not run."""
    by_method = {}
    for name, method in settings.methods.items():
        done = [scores_of(results[run]) for run in _whole_runs(settings, name, losses) if run in results]
        if method.kind != "suppress" and done:
            by_method[name] = {task: _together([scores[task] for scores in done]) for task in tasks if task in done[0]}
    reference = next((name for name in by_method if settings.methods[name].kind == "full"), None)
    if reference is None:
        return None
    found = relative_scores(reference, by_method, tasks)
    return {
        "reference": reference,
        "methods": {name: {task: at.as_dict() for task, at in by_task.items()} for name, by_task in found.items()},
    }


def _whole_runs(settings: StudySettings, name: str, losses: Mapping[Run, float]) -> list[Run]:
    rate = chosen_rate(settings, name, losses)
    return [Run(name, "whole", rate, seed) for seed in settings.methods[name].seeds]


def _benchmarks(settings: StudySettings) -> list[str]:
    """By their own names, where the settings name groups."""
    named = settings.evaluate.benchmarks
    return expand(named) if named else []


def _outcome(
    settings: StudySettings,
    name: str,
    results: Mapping[Run, Result],
    losses: Mapping[Run, float],
    base: Mapping[str, ItemScores],
    counted: Sequence[str],
) -> Outcome | None:
    method = settings.methods[name]
    rate = chosen_rate(settings, name, losses)
    runs = [Run(name, "suppress")] if method.kind == "suppress" else _whole_runs(settings, name, losses)
    done = [run for run in runs if run in results]
    if not done:
        return None
    by_seed = [scores_of(results[run]) for run in done]
    scored = {task: _scored(base.get(task), [scores[task] for scores in by_seed]) for task in by_seed[0]}
    lost = None
    if counted and all(task in scored for task in counted):
        lost = forgetting(
            {task: scored[task].difference.before.value for task in counted},
            {task: scored[task].difference.after.value for task in counted},
        )
    costs = {}
    for cost in COSTS:
        values = [value for run in done if (value := _cost(settings, results[run], cost)) is not None]
        if values:
            costs[cost] = median(values)
    return Outcome(
        name,
        method.label,
        method.kind,
        rate,
        {f"{run.learning_rate:g}": losses[run] for run in screens(settings, name) if run in losses},
        tuple(run.seed for run in done),
        scored,
        None if lost is None else lost.score,
        None if lost is None else lost.losses_only,
        costs,
        [
            {"seed": run.seed, "scale": scale, **{task: part.mean.value for task, part in scores.items()}}
            for run in done
            for scale, scores in scaled_scores_of(results[run]).items()
        ],
    )


def _scored(base: ItemScores | None, by_seed: Sequence[ItemScores]) -> Scored:
    """Mean over seeds, item by item, against the base; a divergence has no base but nothing."""
    base = base or replace(by_seed[0], scores=(0.0,) * len(by_seed[0].ids))
    return Scored(compare(base, _together(by_seed)), tuple(scores.mean.value for scores in by_seed))


def _together(by_seed: Sequence[ItemScores]) -> ItemScores:
    """The mean over seeds of each item."""
    places = [dict(zip(scores.ids, scores.scores, strict=True)) for scores in by_seed]
    means = (sum(place[id_] for place in places) / len(places) for id_ in by_seed[0].ids)
    return replace(by_seed[0], scores=tuple(means))


def _measure(scores: ItemScores) -> dict[str, Any]:
    mean = scores.mean
    return {
        "value": mean.value,
        "standard_error": mean.standard_error,
        "count": mean.count,
        "unit": mean.unit,
        "chance": scores.chance,
    }


def _cost(settings: StudySettings, result: Result, cost: str) -> float | None:
    """What one run took; steps are not alike where some of them do more, so their mean counts."""
    if cost != "seconds_per_step":
        found: float | None = result.figures.get(cost)
        return found
    seconds = result.figures.get("train_seconds")
    return None if seconds is None else seconds / settings.train.steps


def _seconds(result: Result) -> float:
    log = result.figures.get("train_seconds") or 0.0
    evaluation: float = result.figures["evaluation_seconds"]
    return log + evaluation
