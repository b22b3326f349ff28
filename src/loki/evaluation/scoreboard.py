"""Scores before and after training as one table, and how much of them was forgotten (LoKI section 4).

A task counts towards forgetting only where the model before training is above chance: what it answers by guessing it
cannot forget. The losses-only score counts noise as loss, because it counts no gain against it: read it beside the
interval of the plain one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loki.errors import ArtefactError, InputError
from loki.evaluation.forgetting import Forgetting, forgetting
from loki.evaluation.scores import CONFIDENCE, Difference, ItemScores, compare
from loki.results import Comparison, Measure, Result

RESAMPLES = 2_000
"""Of the interval of the forgetting score."""
HOW_TASKS_ARE_PUT = ("local_data", "max_new_tokens", "num_fewshot", "chat_template")
"""Settings that two evaluations of benchmarks must share to be compared."""
SCORES = "scores"
"""Where a result of `loki evaluate --tasks` keeps the scores by item of the model that it names."""


@dataclass(frozen=True)
class Forgotten:
    """The forgetting score of one comparison."""

    scores: Forgetting
    low: float
    high: float
    """Ends of the paired bootstrap interval of `scores.score`, items drawn within each task."""
    points_lost: float
    """Mean of before − after in points of accuracy."""
    counted: tuple[str, ...]
    left_out: tuple[str, ...]
    """Tasks on which the model before training is not above chance."""


@dataclass(frozen=True)
class Scoreboard:
    """What one model got on each task, beside the model before training where there is one."""

    after: tuple[ItemScores, ...]
    before: tuple[ItemScores | None, ...]
    """One a task; None for what only the trained model has."""
    differences: tuple[Difference | None, ...]
    forgotten: Forgotten | None
    """None without a model before training, or where that is above chance on no task."""
    learned: frozenset[str] = frozenset()
    """Names of scores of what is learned: they are no part of what is forgotten, and guessing gets nothing there."""

    def is_benchmark(self, scores: ItemScores) -> bool:
        """Whether a row is one that chance is known of, and that counts as forgotten."""
        return scores.unit == "%" and scores.task not in self.learned

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The rows as a result holds them."""
        return tuple(
            Comparison(
                name=after.task,
                before=None if before is None else before.mean,
                after=after.mean,
                change=None if difference is None else difference.change,
                higher_is_better=after.higher_is_better,
                note=_note(after, before, difference, judges=self.is_benchmark(after)),
            )
            for after, before, difference in zip(self.after, self.before, self.differences, strict=True)
        )

    def figures(self) -> dict[str, Any]:
        """Everything as JSON values, items included, so that a result can serve as a baseline."""
        figures: dict[str, Any] = {
            SCORES: [scores.as_dict() for scores in self.after],
            "scores_before": [scores.as_dict() for scores in self.before if scores is not None],
            "intervals": {
                after.task: {"low": difference.low, "high": difference.high, "confidence": CONFIDENCE}
                for after, difference in zip(self.after, self.differences, strict=True)
                if difference is not None
            },
        }
        if self.forgotten is not None:
            values = asdict(self.forgotten)
            scores = values.pop("scores")
            figures["forgetting"] = {
                "score_percent": scores["score"],
                "losses_only_percent": scores["losses_only"],
                "by_benchmark_percent": scores["by_benchmark"],
                **values,
            }
        return figures


def make_scoreboard(
    after: Sequence[ItemScores],
    before: Sequence[ItemScores] | None,
    *,
    learned: Collection[str] = (),
    seed: int = 0,
) -> Scoreboard:
    """Set the scores of two models beside each other, task by task, in the order of `after`.

    Tasks that only `after` has (such as the divergence from the base) stand alone; more tasks in `before` are no harm.
    Those named in `learned` do not count towards forgetting.

    Raises:
        InputError: `before` lacks a task, or has it on other items.
    """
    if before is None:
        return Scoreboard(tuple(after), (None,) * len(after), (None,) * len(after), None, frozenset(learned))
    there = {scores.task: scores for scores in before}
    for scores in after:
        if scores.task not in there and scores.metric != "kl":
            raise InputError(
                f"the model before training has no score of task {scores.task!r}, only of "
                f"{', '.join(there) or 'none'}: evaluate it on the same tasks"
            )
    paired = tuple(there.get(scores.task) for scores in after)
    differences = tuple(
        None if one is None else compare(one, other, seed=seed) for one, other in zip(paired, after, strict=True)
    )
    known = [
        (one, other)
        for one, other in zip(paired, after, strict=True)
        if one is not None and other.task not in set(learned)
    ]
    return Scoreboard(tuple(after), paired, differences, _forgotten(known, seed=seed), frozenset(learned))


def read_baseline(path: Path, settings: Mapping[str, Any]) -> list[ItemScores]:
    """The scores by item of a result that `loki evaluate --tasks … --output` wrote.

    Raises:
        ArtefactError: it is no such result, or its tasks were put in another way than by `settings`.
    """
    result = Result.load(path)
    if result.kind != "evaluate" or not isinstance(result.figures.get(SCORES), list):
        raise ArtefactError(
            f"result {path} holds no scores of benchmarks: name what `loki evaluate MODEL --tasks … --output` wrote"
        )
    others = [name for name in HOW_TASKS_ARE_PUT if result.settings.get(name) != settings.get(name)]
    if settings.get("tasks") and others:
        there = ", ".join(f"{name} ({result.settings.get(name)})" for name in others)
        raise ArtefactError(
            f"result {path} was made with another {there}: give the same options, or evaluate that model again"
        )
    return [ItemScores.from_dict(values) for values in result.figures[SCORES]]


def parse_percentage(text: str) -> float:
    """A percentage as a user writes it: `1%`, `0.5 %` or `2`.

    Raises:
        InputError: it is something else.
    """
    number = text.strip().removesuffix("%").strip()
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise InputError(f"{text!r} is no percentage: give one from 0% to 100%, such as 1%")
    return value


def _forgotten(pairs: Sequence[tuple[ItemScores, ItemScores]], *, seed: int) -> Forgotten | None:
    accuracies = [(before, after) for before, after in pairs if before.unit == "%"]
    counted = [(before, after) for before, after in accuracies if before.is_above_chance]
    if not counted:
        return None
    means = [{scores.task: scores.mean.value for scores in side} for side in zip(*counted, strict=True)]
    low, high = _interval(counted, seed=seed)
    return Forgotten(
        forgetting(*means),
        low,
        high,
        points_lost=sum(means[0][task] - means[1][task] for task in means[0]) / len(counted),
        counted=tuple(before.task for before, _ in counted),
        left_out=tuple(before.task for before, _ in accuracies if not before.is_above_chance),
    )


def _interval(pairs: Sequence[tuple[ItemScores, ItemScores]], *, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean relative loss, in percent: items are drawn in pairs, tasks stay."""
    draw = np.random.default_rng(seed)
    losses_R = np.zeros(RESAMPLES)
    for before, after in pairs:
        by_id = dict(zip(after.ids, after.scores, strict=True))
        before_N = np.array(before.scores)
        after_N = np.array([by_id[id_] for id_ in before.ids])
        for resample in range(RESAMPLES):
            picked_N = draw.integers(0, len(before_N), size=len(before_N))
            there = before_N[picked_N].mean()
            # A resample on which the base got nothing right says nothing of what was lost.
            losses_R[resample] += 100 * (1 - after_N[picked_N].mean() / there) if there > 0 else 0.0
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(losses_R / len(pairs), [tail, 100 - tail])
    return float(low), float(high)


def _note(after: ItemScores, before: ItemScores | None, difference: Difference | None, *, judges: bool) -> str:
    parts = [after.metric]
    if judges:
        parts.append(f"chance {Measure(after.chance or 0.0, unit='%')}")
        judged = before or after
        parts.append(f"{'model' if before is None else 'base'} {'above' if judged.is_above_chance else 'at'} chance")
    if difference is not None:
        parts.append(f"{100 * CONFIDENCE:.0f} % interval of the change {interval_text(difference)}")
    return "; ".join(parts)


def interval_text(difference: Difference) -> str:
    """The ends of an interval, as the table shows them."""
    digits = 1 if difference.change.unit == "points" else 3
    return f"{difference.low:+.{digits}f} … {difference.high:+.{digits}f}"
