"""The report's drawings: LoKI figure 2 and its companions.

Shapes: L layers, D rows (hidden size), B bins of neighbouring rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from loki.errors import InputError
from loki.reporting.drawing import (
    ACCENT,
    HEADER,
    INK,
    MAX_BINS,
    MIN_SHARE,
    WIDTH,
    as_svg,
    draw_legend,
    draw_map,
    draw_strip,
    label_end,
    new_axes,
    new_figure,
    new_map_figure,
    nice_ticks,
    put_text,
    strip_frame,
)
from loki.rows import RowSelection


def density_heatmap(frequency_LD: np.ndarray, selection: RowSelection | None, *, title: str) -> str:
    """Density map, layer by row, of the share of prompts in which a row is voted for, on a log colour scale.

    `frequency_LD` holds shares in [0, 1]. More than `MAX_BINS` rows are drawn as means over neighbours; blank
    cells are exactly zero. Beside it stands each layer's share of all votes; under each layer the selected
    rows. `title` becomes the drawing's accessible name.

    Raises:
        InputError: not two dimensions, or a share that is not in [0, 1]; matplotlib is missing.
        ArtefactError: the selection is of another shape.
    """
    frequency_LD = _require_shares(frequency_LD)
    num_layers, num_rows = frequency_LD.shape
    cells_LB, bin_size = bin_rows(frequency_LD)
    marks_LB = None
    if selection is not None:
        selection.require_fit(num_layers=num_layers, num_rows=num_rows)
        marks_LB, _ = bin_rows(_selected(selection, num_rows))
        marks_LB = np.minimum(marks_LB / _largest(marks_LB, num_rows // bin_size), 1)
    present = cells_LB[cells_LB > 0]
    smallest = float(present.min()) if present.size else 0.01
    low = min(max(smallest, MIN_SHARE), 0.1)
    decades = math.ceil(-math.log10(low) - 1e-9)
    levels_LB = np.full_like(cells_LB, np.nan)
    levels_LB[cells_LB > 0] = np.clip(1 + np.log10(present) / decades, 0, 1)

    figure, height = new_map_figure(num_layers, legend=True)
    axes, bottom = draw_map(figure, levels_LB, marks_LB, num_rows, bin_size)
    every = 1 if decades < 4 else 2
    ticks = [(step / decades, _percent(10.0 ** (step - decades))) for step in range(0, decades + 1, every)]
    if smallest < MIN_SHARE:
        ticks[0] = (0.0, f"≤ {ticks[0][1]}")
    draw_legend(figure, bottom, zero="never", ticks=ticks, label="share of prompts", marks=marks_LB is not None)

    strip = draw_strip(figure, axes, layer_shares(frequency_LD), "share of all votes")
    equal = 1 / num_layers
    strip.axvline(equal, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
    put_text(figure, WIDTH - 4, HEADER - 8, f"dashed: equal, {_percent(equal)}", ha="right", alpha=0.8)
    top = max(float(layer_shares(frequency_LD).max()), equal) * 1.06
    strip.set_xlim(0, top)
    end = _round_down(top)
    label_end(strip, end, _percent(end))
    return as_svg(figure, height, title)


def selection_map(selection: RowSelection, num_rows: int) -> str:
    """Which of `num_rows` rows are selected, layer by row, and how many in each layer.

    Above `MAX_BINS` rows a cell stands for several neighbours and its colour for the share selected.

    Raises:
        ArtefactError: a selected row is `num_rows` or more.
        InputError: matplotlib is missing.
    """
    selection.require_fit(num_layers=selection.num_layers, num_rows=num_rows)
    shares_LB, bin_size = bin_rows(_selected(selection, num_rows))
    high = _largest(shares_LB, num_rows // bin_size)
    low = min(1 / bin_size, high / 2) if bin_size > 1 else 0.0
    levels_LB = np.where(shares_LB > 0, np.clip((shares_LB - low) / (high - low), 0, 1), np.nan)

    figure, height = new_map_figure(selection.num_layers, legend=bin_size > 1)
    axes, bottom = draw_map(figure, levels_LB, None, num_rows, bin_size)
    if bin_size > 1:
        ticks = [(0.0, _percent(low)), (1.0, ("≥ " if shares_LB.max() > high else "") + _percent(high))]
        draw_legend(figure, bottom, zero="none", ticks=ticks, label="of the rows in a cell", marks=False)
    counts_L = np.array([len(rows) for rows in selection.rows])
    strip = draw_strip(figure, axes, counts_L, "rows selected in the layer")
    strip.set_xlim(0, counts_L.max() * 1.06)
    label_end(strip, float(counts_L.max()), format_number(float(counts_L.max())))
    label = f"Map of the {selection.num_selected} selected rows in {selection.num_layers} layers"
    return as_svg(figure, height, label)


def training_curve(log: Sequence[Mapping[str, float]]) -> str:
    """Loss (left axis) and, where the log has it, learning rate (right axis, thin) against the step.

    Rows without `step` and `loss` (a trainer's closing row, evaluations) are passed over; a loss that is not
    finite breaks the line.

    Raises:
        InputError: no row has a step and a finite loss; matplotlib is missing.
    """
    steps, losses = series(log, "loss")
    if not np.isfinite(losses).any():
        raise InputError("the training log has no row with `step` and a finite `loss`: pass the trainer's log history")
    height, box = 236.0, (46.0, 26.0, 502.0, 164.0)
    figure = new_figure(height)
    axes = new_axes(figure, box)
    axes.spines[["left", "bottom"]].set_visible(True)
    axes.plot(steps, losses, color=ACCENT, linewidth=1.7, marker="o", markersize=3.2 if len(steps) <= 40 else 0.0)
    axes.yaxis.set_major_locator(nice_ticks(4))
    axes.xaxis.set_major_locator(nice_ticks(5, integer=True))
    axes.margins(x=0.02, y=0.08)
    put_text(figure, 4, 12, "loss", color=ACCENT)
    put_text(figure, box[0] + box[2], height - 6, "step", ha="right")

    rate_steps, rates = series(log, "learning_rate")
    if np.isfinite(rates).any():
        right = axes.twinx()
        strip_frame(right)
        right.plot(rate_steps, rates, color=INK, linewidth=0.8, alpha=0.7)
        top = float(np.nanmax(rates))
        right.set_ylim(0, (top if top > 0 else 1.0) * 1.08)
        ticks = [0.0, _round_down(top)] if top > 0 else [0.0]
        right.set_yticks(ticks, [format_number(tick) for tick in ticks])
        put_text(figure, WIDTH - 4, 12, "learning rate (thin)", ha="right", alpha=0.8)
    return as_svg(figure, height, f"Training curve over {len(steps)} logged steps")


def bin_rows(values_LD: np.ndarray) -> tuple[np.ndarray, int]:
    """Means over neighbouring rows, (L, B) with B at most `MAX_BINS`, and how many rows a bin has.

    The last bin may have fewer.
    """
    num_rows = values_LD.shape[1]
    bin_size = -(-num_rows // MAX_BINS)
    starts = np.arange(0, num_rows, bin_size)
    sizes = np.diff(np.append(starts, num_rows))
    return np.add.reduceat(values_LD.astype(np.float64), starts, axis=1) / sizes, bin_size


def layer_shares(frequency_LD: np.ndarray) -> np.ndarray:
    """Each layer's share of all votes, (L,), summing to 1; all zero where there are no votes."""
    votes_L = frequency_LD.sum(axis=1, dtype=np.float64)
    total = votes_L.sum()
    return np.asarray(votes_L / total if total else votes_L)


def series(log: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have both; values that are not finite become NaN."""
    rows = [row for row in log if row.get("step") is not None and row.get(name) is not None]
    values = np.array([float(row[name]) for row in rows], dtype=np.float64)
    return np.array([float(row["step"]) for row in rows]), np.where(np.isfinite(values), values, np.nan)


def format_number(value: float) -> str:
    """A number for reading: four significant digits, thin spaces between thousands, written powers of ten."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return _minus(f"{int(value):,}").replace(",", "\u202f" if abs(value) >= 10_000 else "")
    if abs(value) >= 10_000:
        return _minus(f"{value:,.0f}").replace(",", "\u202f")
    if abs(value) >= 1e-3:
        return _minus(f"{value:.4g}")
    mantissa, exponent = f"{value:.3e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{_minus(mantissa).rstrip('0').rstrip('.')}\u2009\u00d7\u200910{power}"


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")


def _percent(share: float) -> str:
    return f"{100 * share:.2g}\u202f%" if share < 0.1 else f"{100 * share:.0f}\u202f%"


def _round_down(value: float) -> float:
    """The largest 1, 2, 3, 4, 5, 6 or 8 times a power of ten that is not above `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(digit for digit in (8, 6, 5, 4, 3, 2, 1) if digit * power <= value * (1 + 1e-9)) * power


def _require_shares(frequency_LD: np.ndarray) -> np.ndarray:
    frequency_LD = np.asarray(frequency_LD)
    if frequency_LD.ndim != 2 or 0 in frequency_LD.shape:
        raise InputError(f"the vote frequencies have shape {frequency_LD.shape}; they must be (layers, rows)")
    if not (frequency_LD.min() >= 0 and frequency_LD.max() <= 1):
        raise InputError(
            f"the vote frequencies run from {frequency_LD.min():g} to {frequency_LD.max():g}; "
            "they must be shares of prompts, 0 to 1: divide the votes by the number of prompts"
        )
    return frequency_LD


def _largest(shares_LB: np.ndarray, num_full: int) -> float:
    """The largest share, in a full bin if there is one: a last bin of few rows says little."""
    return float(shares_LB[:, :num_full].max() or shares_LB.max())


def _selected(selection: RowSelection, num_rows: int) -> np.ndarray:
    chosen_LD = np.zeros((selection.num_layers, num_rows))
    for layer, rows in enumerate(selection.rows):
        chosen_LD[layer, list(rows)] = 1
    return chosen_LD
