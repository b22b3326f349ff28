"""Forgetting at equal task score: how far each method has moved the model where it has learned as much as the others.

Every whole run is a curve: the base, parts of its change, the whole of it. A method's front goes through the points of
the mean of its seeds that nothing before them on the curve is better than; the forgetting at a target score is read off
it by linear interpolation. The target is a share of the best score of a reference method.

Shape suffixes: R resamples, S seeds, P points of a curve, N items of the task, M windows of a text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loki.errors import InputError
from loki.evaluation.scores import ItemScores
from loki.study.resampling import alike, ends, means, resampled

SHARE = 0.9
"""Of the reference's best task score."""
ROUNDING = 1e-9
"""Points of the task that a target is out of reach by only for the order in which a sum was taken."""


@dataclass(frozen=True)
class Curve:
    """One method: what its runs learned and forgot at each part of their change, the base first."""

    learned_SPN: np.ndarray  # noqa: N815
    """Task scores in percent."""
    forgotten_SPM: Mapping[str, np.ndarray]  # noqa: N815
    """KL divergences by text."""


@dataclass(frozen=True)
class AtTarget:
    """What one method has forgotten of one text at the target score, and how many times the reference that is."""

    forgotten: float
    forgotten_low: float
    forgotten_high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    """Infinite where the target is out of reach; nan where the reference's own is."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class EqualScore:
    """All methods at one task score."""

    target: float
    best: Mapping[str, float]
    """Of each method, over the points of the mean of its seeds."""
    by_method: Mapping[str, Mapping[str, AtTarget]]
    """By method and text."""


def curve_of(
    base: ItemScores, runs: Sequence[Sequence[Mapping[str, ItemScores]]], windows: Mapping[str, Sequence[str]]
) -> Curve:
    """The curve of S runs that each have the scores of P points, by task, in ascending order of the part.

    `base` is the base's score of the task. Items are brought into the order of the base's, windows of each text into
    that of their ids in `windows`, so that those of all methods are paired.

    Raises:
        InputError: points of other items than the base's.
    """
    start_N = _in_order(base, base.ids)
    learned_SPN = np.stack([[start_N, *(_in_order(point[base.task], base.ids) for point in run)] for run in runs])
    forgotten = {}
    for text, ids in windows.items():
        values_SPM = np.stack([[_in_order(point[f"{text}_kl"], ids) for point in run] for run in runs])
        forgotten[text] = np.concatenate([np.zeros_like(values_SPM[:, :1]), values_SPM], axis=1)
    return Curve(learned_SPN * (100 if base.unit == "%" else 1), forgotten)


def compare_at_equal_score(
    curves: Mapping[str, Curve], reference: str, weights_M: Mapping[str, np.ndarray], *, seed: int = 0
) -> EqualScore:
    """Forgetting of every method at `SHARE` of the reference's best score, with bootstrap intervals.

    Items of the task, windows of each text and seeds are drawn anew many times, the same items and windows for
    all methods, so that differences are paired; the target is found anew each time. Where a method does not reach
    the target its forgetting is infinite, also as the end of an interval.
    """
    draw = np.random.default_rng(seed)
    num_items = curves[reference].learned_SPN.shape[2]
    items_RN = alike(draw, num_items)
    windows_RM = {text: resampled(draw, weights / weights.sum()) for text, weights in weights_M.items()}
    most_seeds = max(curve.learned_SPN.shape[0] for curve in curves.values())
    # Seeds of the same number order the examples alike, so methods with as many seeds draw the same ones.
    seeds_R = {n: alike(draw, n) for n in range(1, most_seeds + 1)}
    learned_RP = {name: means(curve.learned_SPN, items_RN, seeds_R) for name, curve in curves.items()}
    targets_R = SHARE * learned_RP[reference].max(axis=1)
    at = {
        name: {
            text: forgotten_at(targets_R, learned_RP[name], means(values_SPM, windows_RM[text], seeds_R))
            for text, values_SPM in curve.forgotten_SPM.items()
        }
        for name, curve in curves.items()
    }
    return EqualScore(
        float(targets_R[0]),
        {name: float(found_RP[0].max()) for name, found_RP in learned_RP.items()},
        {
            name: {text: _with_interval(values_R, at[reference][text]) for text, values_R in found.items()}
            for name, found in at.items()
        },
    )


def forgotten_at(targets_R: np.ndarray, learned_RP: np.ndarray, forgotten_RP: np.ndarray) -> np.ndarray:
    """Where each of R curves reaches its target (R,), by interpolation along its front; infinite where it does not.

    Points come in ascending order of the part of the change. The front is what has been reached up to each point.
    """
    found_R = np.full(len(targets_R), math.inf)
    for r, (target, learned_P, forgotten_P) in enumerate(
        zip(targets_R - ROUNDING, learned_RP, forgotten_RP, strict=True)
    ):
        if learned_P[0] >= target:
            found_R[r] = forgotten_P[0]
            continue
        best, place = learned_P[0], 0
        for p in range(1, len(learned_P)):
            if learned_P[p] >= target:
                part = (target - best) / (learned_P[p] - best)
                found_R[r] = forgotten_P[place] + part * (forgotten_P[p] - forgotten_P[place])
                break
            if learned_P[p] > best:
                best, place = learned_P[p], p
    return found_R


def _with_interval(values_R: np.ndarray, reference_R: np.ndarray) -> AtTarget:
    """The first entry is the estimate, the others are resamples."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios_R = np.where(np.isinf(reference_R), math.nan, values_R / reference_R)
    return AtTarget(float(values_R[0]), *ends(values_R[1:]), float(ratios_R[0]), *ends(ratios_R[1:]))


def _in_order(scores: ItemScores, ids: Sequence[str]) -> np.ndarray:
    place = dict(zip(scores.ids, scores.scores, strict=True))
    if place.keys() != set(ids):
        raise InputError(f"task {scores.task!r} was scored on other items than the base: run the study again")
    return np.array([place[id_] for id_ in ids], dtype=np.float64)
