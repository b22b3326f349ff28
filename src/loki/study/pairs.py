"""Two methods that differ in one thing, seed by seed and item by item.

Shape suffixes: R resamples, S seeds, P points of a curve (the base first), K places where two are compared, N items of
the task, M windows of a text, H held-out examples. Points of held-out losses leave out the base.
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
            equal[text] = _estimate(
                mean_differences(logs_RP[0], learned_RP[0][:, 1:], logs_RP[1], learned_RP[1][:, 1:])
            )
            ratio[text] = _estimate(forgotten_RP[0][:, -1] / forgotten_RP[1][:, -1])
            ratio_at_equal_loss[text] = _estimate(_ratio_at_equal_loss(lost_RP, logs_RP))
    return Pair(
        _estimate(learned_RP[0][:, 1:].mean(axis=1) - learned_RP[1][:, 1:].mean(axis=1)),
        equal,
        _estimate(lost_RP[0][:, -1] - lost_RP[1][:, -1]),
        ratio,
        ratio_at_equal_loss,
    )


def mean_differences(x_RP: np.ndarray, y_RP: np.ndarray, other_x_RP: np.ndarray, other_y_RP: np.ndarray) -> np.ndarray:
    """How far one curve lies above another (R,), in the mean over the x that both reach.

    Between its points a curve is straight; of what lies below the first part of the change nothing was measured. nan
    where the curves have no x in common, or infinitely many.
    """
    low_R = np.maximum(x_RP.min(axis=1), other_x_RP.min(axis=1))
    high_R = np.minimum(x_RP.max(axis=1), other_x_RP.max(axis=1))
    if min(x_RP.shape[1], other_x_RP.shape[1]) < 2:  # a curve of one point reaches no second x
        return np.full(len(low_R), math.nan)
    at_RK = np.linspace(low_R, high_R, PLACES, axis=1)
    above_RK = _interpolated(at_RK, x_RP, y_RP) - _interpolated(at_RK, other_x_RP, other_y_RP)
    means_R = (above_RK[:, :-1] + above_RK[:, 1:]).mean(axis=1) / 2
    return np.where((low_R < high_R) & np.isfinite(high_R - low_R), means_R, math.nan)


def _interpolated(at_RK: np.ndarray, x_RP: np.ndarray, y_RP: np.ndarray) -> np.ndarray:
    """Heights (R, K) of curves of two points and more at K places between their ends, as `numpy.interp` has them."""
    order_RP = np.argsort(x_RP, axis=1)
    x_RP, y_RP = (np.take_along_axis(values_RP, order_RP, axis=1) for values_RP in (x_RP, y_RP))
    before_RK = np.clip((x_RP[:, :, None] <= at_RK[:, None]).sum(axis=1) - 1, 0, x_RP.shape[1] - 2)
    (x0_RK, y0_RK), (x1_RK, y1_RK) = (
        [np.take_along_axis(values_RP, place_RK, axis=1) for values_RP in (x_RP, y_RP)]
        for place_RK in (before_RK, before_RK + 1)
    )
    width_RK = x1_RK - x0_RK
    # After a point at -inf, or another one at the same place, a curve is as high as its next point.
    known_RK = (width_RK > 0) & np.isfinite(width_RK)
    share_RK = np.divide(at_RK - x0_RK, width_RK, out=np.ones_like(width_RK), where=known_RK)
    between_RK = (1 - share_RK) * y0_RK + share_RK * y1_RK
    return np.select([share_RK == 0, share_RK == 1], [y0_RK, y1_RK], between_RK)


def _ratio_at_equal_loss(lost_RP: list[np.ndarray], logs_RP: list[np.ndarray]) -> np.ndarray:
    if any(lost.shape != logs.shape for lost, logs in zip(lost_RP, logs_RP, strict=True)):
        return np.full(len(logs_RP[0]), math.nan)
    one, other = (_falling(*curve) for curve in zip(lost_RP, logs_RP, strict=True))
    ratio_R: np.ndarray = np.exp(mean_differences(*one, *other))
    return ratio_R


def _falling(lost_RP: np.ndarray, log_RP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve where it has the lowest loss so far: a point that has not stands where the last one that had does."""
    places_P = np.arange(lost_RP.shape[1])
    lowest_RP = np.minimum.accumulate(lost_RP, axis=1)
    falls_RP = np.diff(lowest_RP, axis=1, prepend=math.inf) < 0
    kept_RP = np.maximum.accumulate(np.where(falls_RP, places_P, 0), axis=1)
    return lowest_RP, np.take_along_axis(log_RP, kept_RP, axis=1)


def _estimate(values_R: np.ndarray) -> Estimate:
    """The first entry is the estimate, the others are resamples."""
    return Estimate(float(values_R[0]), *(ends(values_R[1:]) if math.isfinite(values_R[0]) else (math.nan, math.nan)))
