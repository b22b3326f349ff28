"""Two methods that differ in one thing, seed by seed and item by item.

Shape suffixes: R resamples, S seeds, P points of a curve (the base first), N items of the task, M windows of a text,
H held-out examples. Points of held-out losses leave out the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loki.study.equal_score import Curve
from loki.study.resampling import alike, ends, means, resampled

PLACES = 33
"""At so many, evenly apart, two curves are compared."""


@dataclass(frozen=True)
class Estimate:
    """A figure with the ends of its 95 % interval; nan where there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Pair:
    """What one method has over another."""

    learned: Estimate
    """Points of the task, in the mean over the parts of the change and the whole."""
    learned_at_equal_divergence: Mapping[str, Estimate]
    """Points of the task, in the mean over the divergences that both curves reach, by text."""
    held_out: Estimate
    """Loss of held-out examples, nats per token."""
    forgotten_ratio: Mapping[str, Estimate]
    """KL divergence of the whole change, times the other's, by text."""
    forgotten_ratio_at_equal_loss: Mapping[str, Estimate]
    """The same, in the geometric mean over the held-out losses that both curves reach."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


def compare_pair(
    one: Curve,
    other: Curve,
    held_out_SPH: tuple[np.ndarray, np.ndarray],
    weights_M: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
) -> Pair:
    """`one` against `other`, whose S runs have the same seeds in the same order.

    Items of the task, windows of each text, held-out examples and seeds are drawn anew, the same for both. Held-out
    losses are those of all points, or of the last alone: then nothing can be said of an equal loss.
    """
    draw = np.random.default_rng(seed)
    num_seeds, _, num_items = one.learned_SPN.shape
    seeds_R = {num_seeds: alike(draw, num_seeds)}
    items_RN = alike(draw, num_items)
    learned_RP = [means(curve.learned_SPN, items_RN, seeds_R) for curve in (one, other)]
    windows_RM = {text: resampled(draw, weights / weights.sum()) for text, weights in weights_M.items()}
    examples_RH = alike(draw, held_out_SPH[0].shape[2])
    lost_RP = [means(losses_SPH, examples_RH, seeds_R) for losses_SPH in held_out_SPH]
    equal, ratio, ratio_at_equal_loss = {}, {}, {}
    for text in weights_M:
        forgotten_RP = [means(curve.forgotten_SPM[text], windows_RM[text], seeds_R)[:, 1:] for curve in (one, other)]
        with np.errstate(divide="ignore", invalid="ignore"):  # a change that moved nothing has no logarithm
            logs_RP = [np.log(values_RP) for values_RP in forgotten_RP]
            equal[text] = _estimate(_gain_at_equal_divergence([points_RP[:, 1:] for points_RP in learned_RP], logs_RP))
            ratio[text] = _estimate(forgotten_RP[0][:, -1] / forgotten_RP[1][:, -1])
            ratio_at_equal_loss[text] = _estimate(_ratio_at_equal_loss(lost_RP, logs_RP))
    return Pair(
        _estimate(learned_RP[0][:, 1:].mean(axis=1) - learned_RP[1][:, 1:].mean(axis=1)),
        equal,
        _estimate(lost_RP[0][:, -1] - lost_RP[1][:, -1]),
        ratio,
        ratio_at_equal_loss,
    )


def mean_difference(x_P: np.ndarray, y_P: np.ndarray, other_x_P: np.ndarray, other_y_P: np.ndarray) -> float:
    """How far one curve lies above another, in the mean over the x that both reach.

    Between its points a curve is straight; of what lies below the first part of the change nothing was measured. nan
    where the curves have no x in common.
    """
    low, high = max(x_P.min(), other_x_P.min()), min(x_P.max(), other_x_P.max())
    if not low < high:
        return math.nan
    at = np.linspace(low, high, PLACES)
    heights = [
        np.interp(at, x[order], y[order]) for x, y in ((x_P, y_P), (other_x_P, other_y_P)) for order in [np.argsort(x)]
    ]
    return float(np.trapezoid(heights[0] - heights[1], at) / (high - low))


def _gain_at_equal_divergence(learned_RP: list[np.ndarray], logs_RP: list[np.ndarray]) -> np.ndarray:
    points = zip(logs_RP[0], learned_RP[0], logs_RP[1], learned_RP[1], strict=True)
    return np.array([mean_difference(*point) for point in points])


def _ratio_at_equal_loss(lost_RP: list[np.ndarray], logs_RP: list[np.ndarray]) -> np.ndarray:
    if any(lost.shape != logs.shape for lost, logs in zip(lost_RP, logs_RP, strict=True)):
        return np.full(len(logs_RP[0]), math.nan)
    points = zip(lost_RP[0], logs_RP[0], lost_RP[1], logs_RP[1], strict=True)
    return np.exp([mean_difference(*_falling(*point[:2]), *_falling(*point[2:])) for point in points])


def _falling(lost_P: np.ndarray, log_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of a curve at which the loss is lower than anywhere before."""
    kept = np.append(True, lost_P[1:] < np.minimum.accumulate(lost_P)[:-1])
    return lost_P[kept], log_P[kept]


def _estimate(values_R: np.ndarray) -> Estimate:
    """The first entry is the estimate, the others are resamples."""
    return Estimate(float(values_R[0]), *(ends(values_R[1:]) if math.isfinite(values_R[0]) else (math.nan, math.nan)))
