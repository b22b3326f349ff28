"""Two methods that differ in one thing, seed by seed and item by item.

Shape suffixes: R resamples, S seeds, P points of a curve (the base first), N items of the task, M windows of a text,
H held-out examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loki.study.equal_score import Curve
from loki.study.resampling import alike, ends, means, resampled

DIVERGENCES = 33
"""At so many, evenly apart in their logarithm, scores at an equal divergence are compared."""


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

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


def compare_pair(
    one: Curve,
    other: Curve,
    held_out_SH: tuple[np.ndarray, np.ndarray],
    weights_M: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
) -> Pair:
    """`one` against `other`, whose S runs have the same seeds in the same order.

    Items of the task, windows of each text, held-out examples and seeds are drawn anew, the same for both.
    """
    draw = np.random.default_rng(seed)
    num_seeds, _, num_items = one.learned_SPN.shape
    seeds_R = {num_seeds: alike(draw, num_seeds)}
    items_RN = alike(draw, num_items)
    learned_RP = [means(curve.learned_SPN, items_RN, seeds_R) for curve in (one, other)]
    equal, ratio = {}, {}
    for text, weights in weights_M.items():
        windows_RM = resampled(draw, weights / weights.sum())
        forgotten_RP = [means(curve.forgotten_SPM[text], windows_RM, seeds_R) for curve in (one, other)]
        with np.errstate(divide="ignore", invalid="ignore"):  # a change that moved nothing has no logarithm
            equal[text] = _estimate(_gain_at_equal_divergence(learned_RP, forgotten_RP))
            ratio[text] = _estimate(forgotten_RP[0][:, -1] / forgotten_RP[1][:, -1])
    examples_RH = alike(draw, held_out_SH[0].shape[1])
    lost_R = means((held_out_SH[0] - held_out_SH[1])[:, None], examples_RH, seeds_R)[:, 0]
    gained_R = learned_RP[0][:, 1:].mean(axis=1) - learned_RP[1][:, 1:].mean(axis=1)
    return Pair(_estimate(gained_R), equal, _estimate(lost_R), ratio)


def mean_gain(
    learned_P: np.ndarray, forgotten_P: np.ndarray, other_learned_P: np.ndarray, other_forgotten_P: np.ndarray
) -> float:
    """How much more one curve has learned than another, in the mean over the divergences that both reach.

    Between its points a curve is straight over the logarithm of the divergence; below the first part of the change, of
    which nothing was measured, it does not reach. nan where the curves have no divergence in common.
    """
    logs = [np.log(forgotten_P), np.log(other_forgotten_P)]
    low, high = max(log.min() for log in logs), min(log.max() for log in logs)
    if not low < high:
        return math.nan
    at = np.linspace(low, high, DIVERGENCES)
    gains = [
        np.interp(at, log[order], learned[order])
        for log, learned in zip(logs, (learned_P, other_learned_P), strict=True)
        for order in [np.argsort(log)]
    ]
    return float(np.trapezoid(gains[0] - gains[1], at) / (high - low))


def _gain_at_equal_divergence(learned_RP: list[np.ndarray], forgotten_RP: list[np.ndarray]) -> np.ndarray:
    pairs = zip(learned_RP[0], forgotten_RP[0], learned_RP[1], forgotten_RP[1], strict=True)
    return np.array([mean_gain(*(values_P[1:] for values_P in points)) for points in pairs])


def _estimate(values_R: np.ndarray) -> Estimate:
    """The first entry is the estimate, the others are resamples."""
    return Estimate(float(values_R[0]), *(ends(values_R[1:]) if math.isfinite(values_R[0]) else (math.nan, math.nan)))
