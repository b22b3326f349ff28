"""The finished runs of a study, and their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from loki.errors import ArtefactError
from loki.evaluation.benchmarks.table import expand
from loki.evaluation.scores import ItemScores
from loki.results import Result
from loki.study.plan import BASE, Run, chosen_rate
from loki.study.settings import StudySettings

HELD_OUT = "held_out"
TEXT_ENDINGS = ("_loss", "_kl")
Scores = Mapping[str, ItemScores]
"""By task."""


@dataclass(frozen=True)
class FinishedRuns:
    """What there is of a study."""

    settings: StudySettings
    results: Mapping[Run, Result]

    @cached_property
    def base(self) -> Scores:
        """Scores of the untrained model.

        Raises:
            ArtefactError: it is not scored yet.
        """
        if BASE not in self.results:
            raise ArtefactError("the base of this study is not scored yet: run the study first")
        return scores_of(self.results[BASE])

    @cached_property
    def losses(self) -> Mapping[Run, float]:
        """Held-out loss of every run."""
        return {run: held_out_loss(result) for run, result in self.results.items()}

    def rate(self, name: str) -> float | None:
        """The learning rate that a method is run to the end with, where that is known."""
        return chosen_rate(self.settings, name, self.losses)

    def of(self, name: str) -> list[Run]:
        """A method's runs to the end, or its suppression, in the order of its seeds."""
        method, rate = self.settings.methods[name], self.rate(name)
        wanted = (
            [Run(name, "suppress")]
            if method.kind == "suppress"
            else [Run(name, "whole", rate, seed) for seed in method.seeds]
        )
        return [run for run in wanted if run in self.results]

    @property
    def trained(self) -> list[str]:
        """Methods with a finished training, in the order of the settings."""
        return [name for name, method in self.settings.methods.items() if method.kind != "suppress" and self.of(name)]

    @cached_property
    def benchmarks(self) -> list[str]:
        """By their own names, where the settings name groups."""
        named = self.settings.evaluate.benchmarks
        return expand(named) if named else []

    @cached_property
    def tasks(self) -> list[str]:
        """Those that are neither benchmarks nor texts: those that are learned, the main one first."""
        known = {HELD_OUT, *self.benchmarks}
        return [task for task in self.base if task not in known and not task.endswith(TEXT_ENDINGS)]

    @property
    def texts(self) -> list[str]:
        """Names of the texts that are read before and after."""
        return list(self.settings.evaluate.texts)


def held_out_loss(result: Result) -> float:
    """Mean loss of the held-out completions, infinite where training came apart."""
    (scores,) = (score for score in result.figures["scores"] if score["task"] == HELD_OUT)
    losses = scores["scores"]
    return math.inf if None in losses else sum(losses) / len(losses)


def scores_of(result: Result) -> dict[str, ItemScores]:
    """Scores of a run by task; null, which stands for what is not a number, is infinite."""
    return _by_task(result.figures["scores"])


def scaled_scores_of(result: Result) -> dict[float, dict[str, ItemScores]]:
    """Scores of a run's parts of its change, by part and task."""
    return {part["scale"]: _by_task(part["scores"]) for part in result.figures.get("scaled", [])}


def points_of(result: Result) -> list[dict[str, ItemScores]]:
    """Scores of the parts of a run's change and then of the whole, in ascending order of the part."""
    return [*scaled_scores_of(result).values(), scores_of(result)]


def together(by_seed: Sequence[ItemScores]) -> ItemScores:
    """The mean over seeds of each item."""
    places = [dict(zip(scores.ids, scores.scores, strict=True)) for scores in by_seed]
    means = (sum(place[id_] for place in places) / len(places) for id_ in by_seed[0].ids)
    return replace(by_seed[0], scores=tuple(means))


def _by_task(found: Sequence[Mapping[str, Any]]) -> dict[str, ItemScores]:
    by_task = {}
    for values in found:
        scores = [math.inf if score is None else score for score in values["scores"]]
        by_task[values["task"]] = ItemScores.from_dict({**values, "scores": scores})
    return by_task
