"""Scores item by item, so that two models can be compared on the same items: paired, with a bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loki.errors import ArtefactError, InputError
from loki.results import Measure, Unit

RESAMPLES, CONFIDENCE = 10_000, 0.95
RESAMPLED_AT_ONCE = 1_000_000
"""Items drawn at once, which bounds memory."""
ABOVE_CHANCE_ERRORS = 2.0
"""Standard errors by which a score must be above chance to say anything of what was lost."""


@dataclass(frozen=True)
class ItemScores:
    """What one model got on each item of one task."""

    task: str
    metric: str
    """Such as `acc_norm`, `exact_match`, `loss`."""
    ids: tuple[str, ...]
    scores: tuple[float, ...]
    """One per item: from 0 to 1 where `unit` is %, nats per token for losses."""
    unit: Unit = "%"
    higher_is_better: bool = True
    chance: float | None = None
    """What guessing would get, in the unit of `mean`; None where guessing gets nothing."""
    weights: tuple[float, ...] | None = None
    """How much each item counts, such as its tokens; None is alike."""

    def __post_init__(self) -> None:
        if not self.ids:
            raise InputError(f"task {self.task!r} has no items: give at least one")
        if len(set(self.ids)) != len(self.ids):
            twice = next(id_ for id_ in self.ids if self.ids.count(id_) > 1)
            raise InputError(f"task {self.task!r} has the item {twice!r} more than once: give each an id of its own")
        for name, values in (("scores", self.scores), ("weights", self.weights)):
            if values is not None and len(values) != len(self.ids):
                raise InputError(f"task {self.task!r} has {len(values)} {name} for {len(self.ids)} items")
        if self.weights is not None and not all(0 < weight < math.inf for weight in self.weights):
            raise InputError(f"task {self.task!r} has weights that are not above 0: an item without weight is none")

    @property
    def mean(self) -> Measure:
        """(Weighted) mean over the items with its standard error, in percent where the unit is %."""
        scores_N, weights_N = self._arrays()
        value = float(weights_N @ scores_N)
        error = _standard_error(scores_N - value, weights_N)
        return Measure(value, error, len(self.ids), self.unit)

    @property
    def is_above_chance(self) -> bool:
        """Whether the mean lies above chance by `ABOVE_CHANCE_ERRORS` of its standard errors."""
        mean = self.mean
        return mean.value > (self.chance or 0.0) + ABOVE_CHANCE_ERRORS * (mean.standard_error or 0.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ItemScores:
        """What `as_dict` made, perhaps read from a file.

        Raises:
            ArtefactError: it is something else.
        """
        try:
            lists = {name: tuple(values[name]) for name in ("ids", "scores")}
            weights = None if values["weights"] is None else tuple(values["weights"])
            return cls(**{**values, **lists, "weights": weights})
        except (KeyError, TypeError, InputError) as error:
            raise ArtefactError(f"these are no scores of single items ({error}): evaluate again") from error

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores (N,) in the unit of `mean`, and weights (N,) that sum to 1."""
        scores_N = np.array(self.scores, dtype=np.float64) * (100 if self.unit == "%" else 1)
        weights_N = np.ones(len(scores_N)) if self.weights is None else np.array(self.weights, dtype=np.float64)
        return scores_N, weights_N / weights_N.sum()


@dataclass(frozen=True)
class Difference:
    """How a task's score changed: after − before, over the same items."""

    before: Measure
    after: Measure
    change: Measure
    low: float
    high: float
    """Ends of the paired bootstrap interval of the change (percentile, `CONFIDENCE`)."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def compare(before: ItemScores, after: ItemScores, *, seed: int = 0) -> Difference:
    """Compare two models on the same items of a task; items are paired by id, in any order.

    The interval is the percentile bootstrap over items (Efron 1979), `RESAMPLES` resamples drawn from `seed`.

    Raises:
        InputError: not the same task, metric, items or weights.
    """
    after = _in_order_of(before, after)
    before_N, weights_N = before._arrays()
    changes_N = after._arrays()[0] - before_N
    change = float(weights_N @ changes_N)
    low, high = bootstrap_interval(changes_N, weights_N, seed=seed)
    unit: Unit = "points" if before.unit == "%" else before.unit
    error = _standard_error(changes_N - change, weights_N)
    return Difference(before.mean, after.mean, Measure(change, error, len(changes_N), unit), low, high)


def bootstrap_interval(values_N: np.ndarray, weights_N: np.ndarray, *, seed: int) -> tuple[float, float]:
    """Percentile interval of the weighted mean of N values, items drawn with replacement."""
    draw = np.random.default_rng(seed)
    n = len(values_N)
    at_once = max(1, RESAMPLED_AT_ONCE // n)
    means = []
    for start in range(0, RESAMPLES, at_once):
        picked_RN = draw.integers(0, n, size=(min(at_once, RESAMPLES - start), n))
        weights_RN = weights_N[picked_RN]
        means.append((values_N[picked_RN] * weights_RN).sum(1) / weights_RN.sum(1))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)


def _in_order_of(before: ItemScores, after: ItemScores) -> ItemScores:
    for name in ("task", "metric", "unit"):
        there, here = getattr(before, name), getattr(after, name)
        if there != here:
            raise InputError(f"scores of {name} {there!r} and {here!r} cannot be compared: evaluate both alike")
    place = {id_: index for index, id_ in enumerate(after.ids)}
    odd = sorted(set(before.ids) ^ set(after.ids))
    if odd:
        raise InputError(
            f"task {before.task!r} was scored on other items before than after ({len(odd)} differ, such as "
            f"{odd[0]!r}): evaluate both with the same data, limit and seed"
        )
    order = [place[id_] for id_ in before.ids]
    weights = None if after.weights is None else tuple(after.weights[i] for i in order)
    if weights != before.weights:
        raise InputError(f"task {before.task!r} has other weights before than after: evaluate both alike")
    return ItemScores(
        **{**_fields(after), "ids": before.ids, "scores": tuple(after.scores[i] for i in order), "weights": weights}
    )


def _fields(scores: ItemScores) -> dict[str, Any]:
    return {name: getattr(scores, name) for name in ItemScores.__dataclass_fields__}


def _standard_error(deviations_N: np.ndarray, weights_N: Sequence[float] | np.ndarray) -> float | None:
    """Of a weighted mean (weights sum to 1), as of a ratio: √(n/(n−1) · Σ w²d²); s/√n where weights are alike."""
    n = len(deviations_N)
    if n == 1:
        return None
    return math.sqrt(n / (n - 1) * float(np.square(np.asarray(weights_N) * deviations_N).sum()))
