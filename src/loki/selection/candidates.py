"""Which rows stand for election: some layers only, and none that another skill already uses."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from loki.errors import InputError
from loki.rows import RowSelection


def candidate_rows(
    num_layers: int,
    num_rows: int,
    *,
    layers: str | None = None,
    exclude: Iterable[RowSelection] = (),
) -> np.ndarray:
    """The candidates (L, D) bool: rows of `layers` (None: all), without those of the selections in `exclude`.

    Raises:
        InputError: `layers` as `parse_layers`, or a layer has no row left.
        ArtefactError: an excluded selection is of another shape.
    """
    candidates_LD = np.zeros((num_layers, num_rows), dtype=bool)
    chosen = parse_layers(layers, num_layers)
    candidates_LD[chosen] = True
    for selection in exclude:
        selection.require_fit(num_layers=num_layers, num_rows=num_rows, what="excluded positions")
        candidates_LD &= ~selection.as_mask(num_rows)
    for layer in chosen:
        if not candidates_LD[layer].any():
            raise InputError(f"layer {layer} has no row left to select from: exclude fewer rows, or leave it out")
    return candidates_LD


def parse_layers(text: str | None, num_layers: int) -> list[int]:
    """Layers from 0 by number and range, such as `8-29` or `0,5,8-29`, ascending; None: all.

    Raises:
        InputError: not of this form, or a layer that the model does not have.
    """
    if text is None:
        return list(range(num_layers))
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, flags=re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise InputError(f"layers {text!r} are not possible: give numbers and ranges, such as 8-29 or 0,5,8-29")
        if last >= num_layers:
            raise InputError(f"layers {text!r} name layer {last}, but the model's layers are 0 to {num_layers - 1}")
        found |= set(range(first, last + 1))
    return sorted(found)
