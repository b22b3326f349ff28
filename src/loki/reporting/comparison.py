"""The before/after table: scores, their changes, and whether a change is for the better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from loki.reporting.numbers import NBSP, format_number, with_minus
from loki.results import Comparison, Measure

Verdict = Literal["better", "worse", "unclear", ""]


@dataclass(frozen=True)
class Cell:
    """A number of the table, in parts so that narrow pages can break it."""

    value: str
    error: str
    unit: str


@dataclass(frozen=True)
class TableRow:
    """One line of the before/after table."""

    name: str
    asides: tuple[str, ...]
    """Unit and count, then the note."""
    before: Cell | None
    after: Cell | None
    change: Cell | None
    verdict: Verdict
    arrow: str


def verdict(comparison: Comparison) -> Verdict:
    """Whether a change is for the better: unclear within two standard errors, silent where none is known."""
    change = comparison.change
    if change is None or change.standard_error is None:
        return ""
    if not math.isfinite(change.value) or not math.isfinite(change.standard_error):
        return ""
    if change.value == 0 or abs(change.value) < 2 * change.standard_error:
        return "unclear"
    return "better" if (change.value > 0) == comparison.higher_is_better else "worse"


def table_row(comparison: Comparison) -> TableRow:
    """A comparison as the table shows it."""
    measures = [m for m in (comparison.before, comparison.after, comparison.change) if m is not None]
    # A unit in words is said once, under the name; `%`, and a unit that differs, stand by their number.
    unit = measures[0].unit if measures and measures[0].unit != "%" else ""
    counts = list(dict.fromkeys(m.count for m in measures if m.count is not None))
    about: list[str] = [unit] if unit else []
    if counts:
        about.append(f"n = {' / '.join(map(format_number, counts))}".replace(" ", NBSP))
    change = comparison.change
    return TableRow(
        name=comparison.name,
        asides=tuple(filter(None, (", ".join(about), comparison.note))),
        before=measure_cell(comparison.before, unit),
        after=measure_cell(comparison.after, unit),
        change=measure_cell(change, unit, signed=True),
        verdict=verdict(comparison),
        arrow="" if change is None or not change.value else "▲" if change.value > 0 else "▼",
    )


def measure_cell(measure: Measure | None, unit_said: str = "", *, signed: bool = False) -> Cell | None:
    """A measure in parts; a unit that is said elsewhere is left out."""
    if measure is None:
        return None
    value, error = measure.value, measure.standard_error
    digits = 1 if measure.unit in ("%", "points") else 0 if error is None and float(value).is_integer() else 3
    return Cell(
        with_minus(f"{value:{'+' if signed else ''}.{digits}f}"),
        "" if error is None else f"±{NBSP}{error:.{digits}f}",
        "" if measure.unit == unit_said else measure.unit,
    )
