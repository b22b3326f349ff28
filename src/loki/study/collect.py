"""From finished runs to the figures of each method: what it learned, what it forgot, what it cost.

Of several seeds the scores of each item are averaged first, so that intervals are over items; how much seeds differ is
given beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median, stdev
from typing import Any

from loki.evaluation.forgetting import forgetting
from loki.evaluation.scores import Difference, ItemScores, compare
from loki.results import Result, finite
from loki.study.comparisons import equal_score, pairs, relative
from loki.study.finished import FinishedRuns, scaled_scores_of, scores_of, together
from loki.study.plan import BASE, Run, screens
from loki.study.settings import StudySettings

COSTS = ("num_trainable", "peak_memory_mib", "saved_bytes")


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
    found = FinishedRuns(settings, results)
    asked = [task for task in found.benchmarks if task in found.base]
    above = [task for task in asked if found.base[task].is_above_chance]
    figures = {
        "title": settings.title,
        "task": next(iter(found.tasks), None),
        "tasks": found.tasks,
        "base": {task: _measure(scores) for task, scores in found.base.items()},
        "above_chance": above,
        "at_chance": [task for task in asked if task not in above],
        "num_runs": len(results),
        "hours": round(sum(_seconds(result) for result in results.values()) / 3600, 2),
        "methods": [_outcome(found, name, above).as_dict() for name in settings.methods if found.of(name)],
        "equal_score": equal_score(found),
        "pairs": pairs(found),
        "relative": relative(found),
    }
    values = settings.model_dump(mode="json", exclude={"data_dir", "device"})
    return Result("study", values, finite(figures), model=results[BASE].model)


def _outcome(found: FinishedRuns, name: str, counted: Sequence[str]) -> Outcome:
    settings, method, done = found.settings, found.settings.methods[name], found.of(name)
    results = [found.results[run] for run in done]
    by_seed = [scores_of(result) for result in results]
    scored = {task: _scored(found.base.get(task), [scores[task] for scores in by_seed]) for task in by_seed[0]}
    lost = None
    if counted and all(task in scored for task in counted):
        lost = forgetting(
            {task: scored[task].difference.before.value for task in counted},
            {task: scored[task].difference.after.value for task in counted},
        )
    costs = {}
    for cost in COSTS:
        values = [value for result in results if (value := result.figures.get(cost)) is not None]
        if values:
            costs[cost] = median(values)
    seconds = _seconds_per_step(found, name)
    if seconds is not None:
        costs["seconds_per_step"] = seconds
    return Outcome(
        name,
        method.label,
        method.kind,
        found.rate(name),
        {f"{run.learning_rate:g}": found.losses[run] for run in screens(settings, name) if run in found.losses},
        tuple(run.seed for run in done),
        scored,
        None if lost is None else lost.score,
        None if lost is None else lost.losses_only,
        costs,
        [
            {"seed": run.seed, "scale": scale, **{task: part.mean.value for task, part in scores.items()}}
            for run, result in zip(done, results, strict=True)
            for scale, scores in scaled_scores_of(result).items()
        ],
    )


def _scored(base: ItemScores | None, by_seed: Sequence[ItemScores]) -> Scored:
    """Mean over seeds, item by item, against the base; a divergence has no base but nothing."""
    base = base or replace(by_seed[0], scores=(0.0,) * len(by_seed[0].ids))
    return Scored(compare(base, together(by_seed)), tuple(scores.mean.value for scores in by_seed))


def _measure(scores: ItemScores) -> dict[str, Any]:
    mean = scores.mean
    return {
        "value": mean.value,
        "standard_error": mean.standard_error,
        "count": mean.count,
        "unit": mean.unit,
        "chance": scores.chance,
    }


def _seconds_per_step(found: FinishedRuns, name: str) -> float | None:
    """Of the fastest run, short ones among them: other work on the machine only makes steps longer.

    The mean of a run's steps, which are not alike where some of them do more.
    """
    train = found.settings.train
    return min(
        (
            seconds / (train.screen_steps if run.phase == "screen" else train.steps)
            for run, result in found.results.items()
            if run.method == name and (seconds := result.figures.get("train_seconds")) is not None
        ),
        default=None,
    )


def _seconds(result: Result) -> float:
    log = result.figures.get("train_seconds") or 0.0
    evaluation: float = result.figures["evaluation_seconds"]
    return log + evaluation
