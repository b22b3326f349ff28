"""How many rows each layer gives: in equal number, or so that each puts the same share of its attribution at risk."""

from __future__ import annotations

import numpy as np


def adaptive_counts(mean_magnitudes_LD: np.ndarray, candidates_LD: np.ndarray, count: int) -> list[int]:
    """Rows for each layer that has candidates, `count` of them on average; other layers give none.

    A layer's own distribution decides, never how large its attributions are: with rows in ascending order of mean
    magnitude, C(k) is the share of the layer's sum that its first k rows hold. One level of C serves all layers, so
    that a layer whose attribution sits on a few rows gives more rows than one in which all matter alike. Equal
    numbers, the paper's choice, put unequal shares at risk. No layer gives less than half of `count` or more than
    twice that: the level is an estimate, and selections over the whole model, which crowd into some layers, are what
    the paper found to fail. Layers of one and the same distribution give the same number.

    `mean_magnitudes_LD` (L, D) are means of |attribution|; every layer with candidates must have `count` of them.
    """
    layers = np.flatnonzero(candidates_LD.any(axis=1))
    least = (count + 1) // 2
    # Share of its layer that is at risk with each further row, for the rows between the two bounds.
    risks: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    places: list[np.ndarray] = []
    for layer in layers:
        ascending = np.sort(mean_magnitudes_LD[layer, candidates_LD[layer]])
        total = mean_magnitudes_LD[layer].sum()
        risk = np.cumsum(ascending) / total if total > 0 else np.zeros(len(ascending))
        risks.append(risk[least : 2 * count])
        owners.append(np.full(len(risks[-1]), layer))
        places.append(np.arange(len(risks[-1])))
    open_places = (count - least) * len(layers)
    # Within a layer the risks ascend. At equal risks layers take turns, the lower one first (the sort is stable).
    order = np.lexsort((np.concatenate(places), np.concatenate(risks)))[:open_places]
    counts = np.bincount(np.concatenate(owners)[order], minlength=len(mean_magnitudes_LD))
    counts[layers] += least
    return [int(n) for n in counts]
