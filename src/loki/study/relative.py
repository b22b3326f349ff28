"""What each method has learned, relative to full fine-tuning: the measure of the paper's table 3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loki.evaluation.scores import CONFIDENCE, ItemScores

RESAMPLES = 2000


@dataclass(frozen=True)
class Relative:
    """A score as a share of another one."""

    value: float
    low: float
    high: float
    """Infinite or not a number where the other score is nothing."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


def relative_to(reference: ItemScores, scores: ItemScores, *, seed: int = 0) -> Relative:
    """The mean of `scores` over that of `reference`, items paired by id.

    The interval is the percentile bootstrap over items, both means of the same ones.
    """
    place = dict(zip(scores.ids, scores.scores, strict=True))
    both_2N = np.array([[place[id_] for id_ in reference.ids], reference.scores])
    draw = np.random.default_rng(seed)
    num_items = len(reference.ids)
    counts_RN = draw.multinomial(num_items, np.full(num_items, 1 / num_items), size=RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios_R = np.divide(*(both_2N @ counts_RN.T))
        value = float(np.divide(*both_2N.sum(axis=1)))
    known_R = ratios_R[~np.isnan(ratios_R)]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(known_R, [tail, 100 - tail], method="nearest") if len(known_R) else (math.nan, math.nan)
    return Relative(value, float(low), float(high))


def relative_scores(
    reference: str, by_method: Mapping[str, Mapping[str, ItemScores]], tasks: Sequence[str]
) -> dict[str, dict[str, Relative]]:
    """All methods' scores of the tasks relative to the reference method's, by method and task."""
    return {
        name: {task: relative_to(by_method[reference][task], scores[task]) for task in tasks if task in scores}
        for name, scores in by_method.items()
    }
