"""The report's charts: scores by layer, crowding, stability, training, forgetting.

Shapes: L layers, D rows (hidden size), K selected rows, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from loki.errors import InputError
from loki.reporting.data import Forgetting
from loki.reporting.drawing import (
    ACCENT,
    HIGH,
    INK,
    LOW,
    PAGE,
    WIDTH,
    Picture,
    index_ticks,
    new_axes,
    new_figure,
    nice_ticks,
    put_text,
    strip_frame,
)
from loki.reporting.numbers import format_number, power_of_ten, round_down, short_percent
from loki.reporting.statistics import histogram_of_shares, layer_histograms, layer_shares, symmetric_log
from loki.reporting.wording import KVA, Wording

NUM_BINS = 80
MEASURES = {
    "loss_rise": "rise of the loss, nats per token",
    "kl": "KL divergence from the base, nats per token",
    "probe_accuracy": "probe accuracy, %",
}
"""What a forgetting budget measures, in the words of its figure."""
RIDGE_OVERLAP = 2.6
"""A layer's highest ridge, in distances between layers."""


def score_ridges(means_LD: np.ndarray, *, title: str, wording: Wording = KVA, signed: bool = True) -> Picture:
    """How many rows of each layer have which mean score: a ridge for each layer, over a symmetric-log axis.

    Ridges are counts in `NUM_BINS` equal bins, smoothed over three of them, on one scale for all layers; the two
    halves are negative and positive means, of which scores that are not `signed` have only the latter. A tick on each
    baseline is the median row.

    Raises:
        InputError: matplotlib is missing.
    """
    num_layers, _ = means_LD.shape
    unit = linear_unit(means_LD)
    counts_LB, edges = layer_histograms(means_LD, unit, NUM_BINS, signed=signed)
    padded_LB = np.pad(counts_LB.astype(np.float64), ((0, 0), (1, 1)))
    smooth_LB = (padded_LB[:, :-2] + 2 * padded_LB[:, 1:-1] + padded_LB[:, 2:]) / 4
    heights_LB = smooth_LB / smooth_LB.max() * RIDGE_OVERLAP

    step = min(max(400 / num_layers, 9.0), 22.0)
    box = (40.0, 34.0, WIDTH - 54.0, step * (num_layers + RIDGE_OVERLAP - 1))
    height = box[1] + box[3] + 44
    figure = new_figure(height)
    axes = new_axes(figure, box)
    middles = (edges[:-1] + edges[1:]) / 2
    if signed:
        # Zero is an edge between bins; with a point there the two halves meet.
        half = NUM_BINS // 2
        middles = np.insert(middles, half, 0.0)
        heights_LB = np.insert(heights_LB, half, heights_LB[:, half - 1 : half + 1].mean(1), 1)
    sides = ((LOW, middles <= 0), (HIGH, middles >= 0)) if signed else ((ACCENT, middles >= 0),)
    for layer in range(num_layers):
        curve_B = layer - heights_LB[layer]
        order = 2 * layer
        axes.fill_between(middles, curve_B, layer, color=PAGE, linewidth=0, zorder=order)
        for colour, side in sides:
            axes.fill_between(middles[side], curve_B[side], layer, color=colour, alpha=0.6, linewidth=0, zorder=order)
        axes.plot(middles, curve_B, color=PAGE, linewidth=1.4, zorder=order + 1)
        median = float(symmetric_log(np.median(means_LD[layer]), unit))
        axes.plot([median, median], [layer, layer - 0.45], color=INK, linewidth=1.3, zorder=order + 1)
    axes.axvline(0, color=INK, linewidth=0.5, alpha=0.5, zorder=2 * num_layers)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(num_layers - 1, -RIDGE_OVERLAP))
    axes.set_yticks(index_ticks(num_layers, 8))
    exponents = range(math.ceil(math.log10(unit)) + 1, math.floor(math.log10(np.abs(means_LD).max() or 1.0)) + 1)
    powers = [10.0**exponent for exponent in exponents]
    places, texts = [0.0, *powers], ["0", *map(power_of_ten, exponents)]
    if signed:
        places = [-power for power in reversed(powers)] + places
        texts = [power_of_ten(exponent, "\u2212") for exponent in reversed(exponents)] + texts
    axes.set_xticks(symmetric_log(np.array(places), unit), texts)
    put_text(figure, 4, 26, "layer")
    if signed:
        words = ("against the answer", "for the answer") if wording.argues else ("negative", "positive")
        for quarter, colour, side in zip((1, 3), (LOW, HIGH), words, strict=True):
            place = box[0] + quarter * box[2] / 4
            put_text(figure, place, 14, f"on average {side}", color=colour, ha="center", fontweight="bold")
    put_text(figure, box[0] + box[2] / 2, height - 6, f"mean {wording.noun} of a row", ha="center")
    return Picture(figure, height, title)


def linear_unit(means_LD: np.ndarray) -> float:
    """Where the symmetric-log axis turns from linear to logarithmic: a power of ten near the smaller means.

    At most a tenth of all rows lie below it; 1 where all means are zero.
    """
    magnitudes = np.abs(means_LD)
    present = magnitudes[magnitudes > 0]
    return 10.0 ** math.floor(math.log10(np.quantile(present, 0.1))) if present.size else 1.0


def crowding_bars(high_LD: np.ndarray, low_LD: np.ndarray, *, title: str) -> Picture:
    """Each layer's share of all high votes, upwards, and of all low votes, downwards; dashed is an equal share.

    `high_LD` and `low_LD` are votes or shares of prompts.

    Raises:
        InputError: matplotlib is missing.
    """
    num_layers = len(high_LD)
    high_L, low_L = layer_shares(high_LD), layer_shares(low_LD)
    height, box = 236.0, (46.0, 26.0, WIDTH - 52.0, 162.0)
    figure = new_figure(height)
    axes = new_axes(figure, box)
    axes.bar(np.arange(num_layers), high_L, width=0.72, color=HIGH, alpha=0.85, linewidth=0)
    axes.bar(np.arange(num_layers), -low_L, width=0.72, color=LOW, alpha=0.85, linewidth=0)
    equal = 1 / num_layers
    for level in (equal, -equal):
        axes.axhline(level, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
    axes.axhline(0, color=INK, linewidth=0.6)
    top = max(float(high_L.max()), float(low_L.max()), equal) * 1.06
    end = round_down(top)
    axes.set(ylim=(-top, top), xlim=(-0.7, num_layers - 0.3))
    axes.set_yticks([-end, 0, end], [short_percent(end), "0", short_percent(end)])
    axes.set_xticks(index_ticks(num_layers, 8))
    put_text(figure, box[0], 14, "share of the highest", color=HIGH, fontweight="bold")
    put_text(figure, box[0], height - 8, "share of the lowest", color=LOW, fontweight="bold")
    put_text(figure, WIDTH - 4, 14, f"dashed: equal, {short_percent(equal)}", ha="right", alpha=0.8)
    put_text(figure, box[0] + box[2] / 2, height - 8, "layer", ha="center")
    return Picture(figure, height, title)


def stability_histogram(shares_K: np.ndarray, *, title: str) -> Picture:
    """How many selected rows are chosen in which share of bootstrap resamples.

    Raises:
        InputError: matplotlib is missing.
    """
    counts_B = histogram_of_shares(shares_K)
    height, box = 200.0, (52.0, 22.0, WIDTH - 70.0, 130.0)
    figure = new_figure(height)
    axes = new_axes(figure, box)
    axes.spines[["left", "bottom"]].set_visible(True)
    middles = (np.arange(len(counts_B)) + 0.5) / len(counts_B)
    axes.bar(middles, counts_B, width=0.92 / len(counts_B), color=ACCENT, alpha=0.85, linewidth=0)
    axes.axvline(float(np.mean(shares_K)), color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
    axes.set(xlim=(0, 1), ylim=(0, max(int(counts_B.max()), 1) * 1.06))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], [short_percent(share) for share in (0, 0.25, 0.5, 0.75, 1)])
    axes.yaxis.set_major_locator(nice_ticks(4, integer=True))
    put_text(figure, 4, 12, "selected rows")
    put_text(figure, WIDTH - 18, 12, "dashed: mean", ha="right", alpha=0.8)
    put_text(figure, box[0] + box[2] / 2, height - 8, "share of resamples that choose the row", ha="center")
    return Picture(figure, height, title)


def training_curve(log: Sequence[Mapping[str, float]], *, title: str) -> Picture:
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
        ticks = [0.0, round_down(top)] if top > 0 else [0.0]
        right.set_yticks(ticks, [format_number(tick) for tick in ticks])
        put_text(figure, WIDTH - 4, 12, "learning rate (thin)", ha="right", alpha=0.8)
    return Picture(figure, height, title)


def measured(forgetting: Forgetting) -> list[str]:
    """The measures that were finite at least once."""
    return [name for name in MEASURES if np.isfinite(series(forgetting.history, name)[1]).any()]


def forgetting_curves(forgetting: Forgetting, *, title: str) -> Picture:
    """Loss rise, KL divergence and probe accuracy against the step, one panel each; limits are dashed lines.

    Measures without a finite value are left out; elsewhere, a value that is not finite breaks the line. Bars at the
    probe's accuracy are one standard error.

    Raises:
        InputError: nothing finite was measured; matplotlib is missing.
    """
    drawn = measured(forgetting)
    if not drawn:
        raise InputError("the forgetting budget's history has no finite value: pass that of a training's record")
    left, width, panel, gap = 76.0, WIDTH - 94.0, 84.0, 40.0
    height = len(drawn) * (panel + gap) + 32
    figure = new_figure(height)
    last = max(float(row["step"]) for row in forgetting.history)
    for place, name in enumerate(drawn):
        top = 30 + place * (panel + gap)
        axes = new_axes(figure, (left, top, width, panel))
        axes.spines[["left", "bottom"]].set_visible(True)
        steps, values = series(forgetting.history, name)
        put_text(figure, 4, top - 14, MEASURES[name], color=ACCENT)
        if name == "probe_accuracy":
            errors = series(forgetting.history, "probe_standard_error")[1]
            axes.errorbar(steps, values, errors, color=ACCENT, linewidth=0, elinewidth=0.9, alpha=0.7)
            put_text(figure, WIDTH - 18, top - 14, "bars: standard error", ha="right", alpha=0.8)
        else:
            axes.axhline(0, color=INK, linewidth=0.5, alpha=0.5)
        limit = forgetting.limits.get(name)
        if limit is not None:
            axes.axhline(limit, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
            put_text(figure, WIDTH - 18, top - 14, f"dashed: limit {format_number(limit)}", ha="right", alpha=0.8)
        axes.plot(steps, values, color=ACCENT, linewidth=1.7, marker="o", markersize=3.2 if len(steps) <= 40 else 0.0)
        axes.margins(y=0.08)
        axes.set_xlim(-0.02 * last, 1.02 * last or 1.0)
        axes.xaxis.set_major_locator(nice_ticks(5, integer=True))
        axes.yaxis.set_major_locator(nice_ticks(3))
        axes.yaxis.set_major_formatter(lambda value, _position: format_number(value))
        if name != drawn[-1]:
            axes.tick_params(labelbottom=False)
    put_text(figure, left + width, height - 6, "step", ha="right")
    return Picture(figure, height, title)


def series(log: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have both; values that are not finite become NaN."""
    rows = [row for row in log if row.get("step") is not None and row.get(name) is not None]
    values = np.array([float(row[name]) for row in rows], dtype=np.float64)
    return np.array([float(row["step"]) for row in rows]), np.where(np.isfinite(values), values, np.nan)
