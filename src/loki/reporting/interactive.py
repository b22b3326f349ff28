"""What the page's script knows of the rows: compact arrays, so that tooltips need no network.

Shapes: L layers, D rows (hidden size), S subjects.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from loki.reporting.drawing import WIDTH, Picture
from loki.reporting.survey import LogSurvey
from loki.rows import RowSelection


def rows_data(survey: LogSurvey, selection: RowSelection | None, stability_LD: np.ndarray | None) -> str:
    """JSON with votes, means, selection and stability of all rows, layer by layer, for the maps' tooltips.

    Votes are whole numbers in as few bytes as they fit, means float32; `selected` has one bit a row, most significant
    first; `stability` is the share of resamples that choose the row, in whole percent. Magnitudes are left out where no
    score is negative. `words` are what the tooltips call the score and what has one.
    """
    votes = {"signed_high": survey.high, "signed_low": survey.low}
    if survey.is_signed:
        votes |= {"magnitude_high": survey.high_magnitude, "magnitude_low": survey.low_magnitude}
    columns = {name: _packed(vote.counts_LD.astype(_whole(survey.num_prompts))) for name, vote in votes.items()}
    columns["mean"] = _packed(survey.mean_scores_LD.astype("<f4"))
    if survey.is_signed:
        columns["magnitude"] = _packed(survey.mean_magnitudes_LD.astype("<f4"))
    num_layers, num_rows = survey.high.counts_LD.shape
    if selection is not None:
        columns["selected"] = _packed(np.packbits(selection.as_mask(num_rows)))
    if stability_LD is not None:
        columns["stability"] = _packed(np.rint(100 * stability_LD).astype("u1"))
    words = {"score": survey.wording.noun, "entries": survey.wording.entries}
    sizes = {"layers": num_layers, "rows": num_rows, "prompts": survey.num_prompts}
    return _json({**sizes, "words": words, "columns": columns})


def subjects_data(relative_SL: np.ndarray, names: Sequence[str]) -> str:
    """JSON with the cells of the subject map, subject by subject from top to bottom."""
    values = {"names": [name.replace("_", " ") for name in names], "layers": relative_SL.shape[1]}
    return _json({**values, "relative": _packed(relative_SL.astype("<f4"))})


def map_place(picture: Picture) -> str:
    """Where the cells lie in a drawing: left, top, width and height in percent of it."""
    assert picture.map_box is not None, "only maps have cells"
    left, top, width, height = picture.map_box
    parts = (left / WIDTH, top / picture.height, width / WIDTH, height / picture.height)
    return " ".join(f"{100 * part:.4f}" for part in parts)


def _whole(largest: int) -> str:
    return "<u2" if largest < 2**16 else "<u4"


def _packed(values: np.ndarray) -> dict[str, str]:
    """An array as base64 of little-endian bytes, with the name that JavaScript has for its type."""
    names = {"u1": "Uint8Array", "u2": "Uint16Array", "u4": "Uint32Array", "f4": "Float32Array"}
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return {"type": names[little.dtype.str[1:]], "data": base64.b64encode(little.tobytes()).decode()}


def _json(values: dict[str, Any]) -> str:
    """JSON that may stand inside a `script` element: nothing in it can end the element."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
