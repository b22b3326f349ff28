"""The bootstrap that a study's comparisons share (Efron 1979): items, windows of text and seeds drawn with replacement.

Shape suffixes: R resamples, S seeds, P points of a curve, N items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from loki.evaluation.scores import CONFIDENCE

RESAMPLES = 2000


def resampled(draw: np.random.Generator, weights_N: np.ndarray) -> np.ndarray:
    """Weights (1 + R, N) that sum to 1: first as they are, then with items drawn with replacement."""
    n = len(weights_N)
    counts_RN = draw.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) * weights_N
    return np.concatenate([weights_N[None], counts_RN / counts_RN.sum(axis=1, keepdims=True)])


def alike(draw: np.random.Generator, count: int) -> np.ndarray:
    """Weights (1 + R, count) of things that count alike."""
    return resampled(draw, np.full(count, 1 / count))


def means(values_SPN: np.ndarray, items_RN: np.ndarray, seeds_R: Mapping[int, np.ndarray]) -> np.ndarray:
    """Means over items and seeds (1 + R, P) under weightings of both, those of seeds by their number."""
    by_seed_RSP = np.einsum("rn,spn->rsp", items_RN, values_SPN, optimize=True)
    means_RP: np.ndarray = np.einsum("rs,rsp->rp", seeds_R[values_SPN.shape[0]], by_seed_RSP)
    return means_RP


def ends(values_R: np.ndarray) -> tuple[float, float]:
    """Percentile interval, in which infinity is a value like any other; nan is left out."""
    known = np.sort(values_R[~np.isnan(values_R)])
    if len(known) == 0:
        return math.nan, math.nan
    tail = (1 - CONFIDENCE) / 2
    return float(known[int(tail * (len(known) - 1))]), float(known[math.ceil((1 - tail) * (len(known) - 1))])
