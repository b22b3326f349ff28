"""The report page: what is shown of a run, in which words, as one self-contained file.

Every sentence with a number in it is made from the data here; the template only sets it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loki.errors import InputError
from loki.provenance import write_text
from loki.reporting.drawing import MISSING_PACKAGES
from loki.reporting.figures import (
    bin_rows,
    density_heatmap,
    format_number,
    layer_shares,
    selection_map,
    series,
    training_curve,
)
from loki.results import Comparison, Measure, Result
from loki.rows import RowSelection

Verdict = Literal["better", "worse", "unclear", ""]
NBSP = "\u00a0"


@dataclass(frozen=True)
class ReportData:
    """What a report shows; parts that are None or empty are left out."""

    title: str
    model_label: str
    """The model as readers know it, such as `SmolLM2-135M-Instruct (Q4_1, dequantised)`."""
    summary: Result
    """Its comparisons are the before/after table, its figures the numbers by stage."""
    frequency_high_LD: np.ndarray | None  # noqa: N815
    """Share of prompts in which a row is among the 5 % highest attributions of the whole model, (L, D)."""
    frequency_low_LD: np.ndarray | None  # noqa: N815
    """The same for the 5 % lowest."""
    selection: RowSelection | None
    training_log: Sequence[Mapping[str, float]]
    """The trainer's log history: rows such as `{"step": 5, "loss": 1.2, "learning_rate": 0.001}`."""


@dataclass(frozen=True)
class Drawing:
    """A figure with its number and words."""

    number: int
    svg: str
    heading: str
    caption: str
    how_to_read: str


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


@dataclass(frozen=True)
class Entry:
    """A name with a value, or with entries of its own."""

    name: str
    text: str = ""
    entries: tuple[Entry, ...] = ()


def render_report(data: ReportData) -> str:
    """The page as HTML, without a reference to anything outside it.

    Raises:
        InputError: matplotlib or jinja2 is missing, or frequencies are not shares of prompts.
        ArtefactError: the selection does not fit the frequencies.
    """
    try:
        import jinja2
        import markupsafe
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(MISSING_PACKAGES) from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("loki.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The drawings are made, and their labels escaped, by `figures`; everything else is escaped here.
    environment.filters["drawn"] = markupsafe.Markup
    summary = data.summary
    drawings = _drawings(data)
    parts = {"Training" if drawing.heading == "Training" else "Rows" for drawing in drawings}
    provenance = [
        Entry("settings", entries=_entries(summary.settings, exact=True)),
        Entry("versions", entries=_entries(summary.versions, exact=True)),
    ]
    if summary.seed is not None:
        provenance.append(Entry("seed", entries=(Entry("seed", str(summary.seed)),)))
    return environment.get_template("report.html.j2").render(
        title=data.title,
        model_label=data.model_label,
        rows=[table_row(comparison) for comparison in summary.comparisons],
        drawings=drawings,
        drawings_heading=" and ".join(sorted(parts)).capitalize(),
        stages=_stages(summary.figures),
        provenance=[part for part in provenance if part.entries],
    )


def write_report(path: Path, data: ReportData) -> None:
    """Write the page, whole or not at all.

    Raises:
        InputError, ArtefactError: as `render_report`.
        OutputError: the folder cannot be written.
    """
    write_text(path, render_report(data))


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
        before=_cell(comparison.before, unit),
        after=_cell(comparison.after, unit),
        change=_cell(change, unit, signed=True),
        verdict=verdict(comparison),
        arrow="" if change is None or not change.value else "▲" if change.value > 0 else "▼",
    )


def _cell(measure: Measure | None, unit_said: str = "", *, signed: bool = False) -> Cell | None:
    if measure is None:
        return None
    value, error = measure.value, measure.standard_error
    digits = 1 if measure.unit in ("%", "points") else 0 if error is None and float(value).is_integer() else 3
    return Cell(
        f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "\u2212"),
        "" if error is None else f"±{NBSP}{error:.{digits}f}",
        "" if measure.unit == unit_said else measure.unit,
    )


def _stages(figures: Mapping[str, Any]) -> list[Entry]:
    """Numbers by stage; those that stand outside a stage come first."""
    loose = _entries({name: value for name, value in figures.items() if not isinstance(value, Mapping)})
    stages = [
        Entry(_words(name), entries=_entries(value)) for name, value in figures.items() if isinstance(value, Mapping)
    ]
    return [stage for stage in [Entry("", entries=loose), *stages] if stage.entries]


def _entries(values: Mapping[str, Any], *, exact: bool = False) -> tuple[Entry, ...]:
    entries = []
    for name, value in values.items():
        if isinstance(value, Mapping) and not _is_measure(value):
            inner = _entries(value, exact=exact)
            entries += [Entry(_words(name), entries=inner)] if inner else []
        else:
            entries.append(Entry(_words(name), _value(value, exact=exact)))
    return tuple(entries)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _is_measure(value: Mapping[str, Any]) -> bool:
    return value.keys() == asdict(Measure(0.0)).keys()


def _value(value: Any, *, exact: bool) -> str:
    """A JSON value in words; `exact` keeps numbers as they were given, to be typed again."""
    if isinstance(value, Mapping):
        cell = _cell(Measure(**value))
        return " ".join(filter(None, (cell.value, cell.error, cell.unit))) if cell else ""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and not exact:
        return format_number(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_value(item, exact=exact) for item in value) or "none"
    return str(value)


def _drawings(data: ReportData) -> list[Drawing]:
    drawings: list[Drawing] = []

    def add(svg: str, heading: str, caption: str, how_to_read: str) -> None:
        drawings.append(Drawing(len(drawings) + 1, svg, heading, caption, how_to_read))

    for rank, frequency_LD in (("highest", data.frequency_high_LD), ("lowest", data.frequency_low_LD)):
        if frequency_LD is not None:
            heading = f"Where the 5{NBSP}% {rank} attributions lie"
            svg = density_heatmap(frequency_LD, data.selection, title=heading)
            add(svg, heading, *_heatmap_words(frequency_LD, rank, marked=data.selection is not None))
    if data.selection is not None:
        add(*_selection_drawing(data))
    if np.isfinite(series(data.training_log, "loss")[1]).any():
        add(training_curve(data.training_log), "Training", *_training_words(data.training_log))
    return drawings


def _heatmap_words(frequency_LD: np.ndarray, rank: str, *, marked: bool) -> tuple[str, str]:
    num_layers, num_rows = frequency_LD.shape
    shares_L = layer_shares(frequency_LD)
    first = [int(layer) for layer in np.argsort(-shares_L, kind="stable")[:2] if shares_L[layer] > 0]
    never = float((frequency_LD == 0).mean())
    caption = f"How often each of the {format_number(num_rows)} rows in {num_layers} layers "
    caption += f"is among the 5{NBSP}% {rank}."
    if len(first) == 2:
        shares = [_percent(shares_L[layer]) for layer in first]
        caption += f" Most votes fall on layers {first[0]} and {first[1]}, which take {shares[0]} and {shares[1]} "
        caption += f"of them; an equal share would be {_percent(1 / num_layers)}."
    caption += f" {_percent(never)} of the rows are never among them."
    bin_size = bin_rows(frequency_LD[:1])[1]
    cell = "one row" if bin_size == 1 else f"the mean of {bin_size} neighbouring rows"
    reading = (
        f"Each band is a layer, the first at the top, and each cell in it {cell}. "
        "The stronger the colour, the larger the share of prompts, on a logarithmic scale; "
        "blank cells are never voted for. The bars sum the votes of each layer: "
        "a bar beyond the dashed line is a layer into which the votes crowd."
    )
    if marked:
        reading += " The thin marks under a band show which rows were selected"
        reading += "." if bin_size == 1 else ": the stronger the mark, the more rows of the cell."
    return caption, reading


def _selection_drawing(data: ReportData) -> tuple[str, str, str, str]:
    selection = data.selection
    assert selection is not None
    frequency_LD = data.frequency_high_LD if data.frequency_high_LD is not None else data.frequency_low_LD
    known_rows = None if frequency_LD is None else frequency_LD.shape[1]
    num_rows = known_rows or 1 + max(rows[-1] for rows in selection.rows if rows)
    counts = sorted({len(rows) for rows in selection.rows})
    of_rows = "rows" if known_rows is None else f"of {format_number(known_rows)} rows"
    if len(counts) == 1:
        caption = f"{format_number(counts[0])} {of_rows} are selected in every layer"
    else:
        between = f"Between {format_number(counts[0])} and {format_number(counts[-1])}"
        caption = f"{between} {of_rows} are selected in a layer"
    caption += f", {format_number(selection.num_selected)} in all"
    if known_rows is not None:
        caption += f" ({_percent(selection.num_selected / (known_rows * selection.num_layers))})"
    bin_size = bin_rows(np.zeros((1, num_rows)))[1]
    reading = "Each band is a layer, the first at the top. "
    if bin_size == 1:
        reading += "A coloured cell is a selected row; "
    else:
        reading += f"A cell stands for {bin_size} neighbouring rows: the stronger its colour, "
        reading += "the more of them are selected; "
    reading += "the bars count the selected rows of each layer. "
    reading += "A vertical line would be a row index that many layers share."
    if known_rows is None:
        reading += " The map ends at the highest selected row."
    return selection_map(selection, num_rows), "Which rows are selected", f"{caption}.", reading


def _training_words(log: Sequence[Mapping[str, float]]) -> tuple[str, str]:
    steps, losses = series(log, "loss")
    finite = np.flatnonzero(np.isfinite(losses))
    first, last = finite[0], finite[-1]
    if first == last:
        caption = f"The loss is {format_number(losses[last])} at step {format_number(steps[last])}."
    else:
        caption = (
            f"The loss goes from {format_number(losses[first])} at step {format_number(steps[first])} "
            f"to {format_number(losses[last])} at step {format_number(steps[last])}."
        )
    reading = "The thick line is the training loss (left axis); its trend says more than single bumps."
    if np.isfinite(series(log, "learning_rate")[1]).any():
        reading += " The thin line is the learning rate (right axis)."
    return caption, reading


def _percent(share: float) -> str:
    return f"{100 * share:.1f}{NBSP}%"
