"""Maps of the model, layer by row (LoKI figure 2) and subject by layer.

Shapes: L layers, D rows (hidden size), B bins of neighbouring rows, S subjects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from loki.errors import InputError
from loki.reporting.drawing import (
    HIGH,
    INK,
    LOW,
    THEMES,
    WIDTH,
    Box,
    Picture,
    Theme,
    draw_image,
    index_ticks,
    new_axes,
    new_figure,
    put_text,
)
from loki.reporting.numbers import round_down, short_percent
from loki.reporting.statistics import bin_rows, layer_shares
from loki.rows import RowSelection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BINS = 288
MIN_SHARE = 1e-4
"""The colour scale starts here at the latest: what is rarer takes the weakest colour."""
MAX_RATIO = 4.0
"""The subject map's colours end at this ratio at the latest."""
MAP_LEFT, MAP_WIDTH = 40.0, 456.0
STRIP_LEFT, STRIP_WIDTH = 514.0, 122.0
HEADER = 42.0
SUBJECTS_LEFT, SUBJECT_HEIGHT, SUBJECTS_HEADER = 276.0, 16.0, 8.0
SUBJECT_PIXELS = 24
PIXELS_ACROSS = 1152
"""At least so many, so that a browser only ever scales down: no blur, and no thin line lost."""
MARK_RGB: Mapping[Theme, tuple[int, int, int]] = {"light": (32, 30, 36), "dark": (236, 233, 226)}
RAMP: Mapping[Theme, tuple[float, float]] = {"light": (0.90, 0.14), "dark": (0.30, 0.97)}
"""Part of magma used, from weak to strong: strong is what stands out most from the page."""


def density_maps(
    high_LD: np.ndarray,
    low_LD: np.ndarray,
    selection: RowSelection | None,
    *,
    titles: tuple[str, str],
    entries: str = "prompts",
) -> tuple[Picture, Picture]:
    """Two density maps on one scale: in which share of prompts each row is voted for as high, and as low.

    Both hold shares in [0, 1]. Colours are on a log scale; more than `MAX_BINS` rows are drawn as means over
    neighbours; blank cells are exactly zero. Beside each map stands each layer's share of its votes; under each
    layer the selected rows. The titles are written over the maps and are their accessible names; the legend says of
    which `entries` of the log the shares are.

    Raises:
        InputError: not two dimensions, or a share that is not in [0, 1]; matplotlib is missing.
        ArtefactError: the selection is of another shape.
    """
    high_LD, low_LD = _require_shares(high_LD), _require_shares(low_LD)
    num_layers, num_rows = high_LD.shape
    marks_LB = None
    if selection is not None:
        selection.require_fit(num_layers=num_layers, num_rows=num_rows)
        marks_LB, bin_size = bin_rows(selection.as_mask(num_rows), MAX_BINS)
        marks_LB = np.minimum(marks_LB / _largest(marks_LB, num_rows // bin_size), 1)
    decades, smallest = colour_scale(high_LD, low_LD)
    top = max(float(layer_shares(high_LD).max()), float(layer_shares(low_LD).max()), 1 / num_layers) * 1.06
    first = _density_map(high_LD, marks_LB, titles[0], HIGH, decades, smallest, top)
    return first, _density_map(low_LD, marks_LB, titles[1], LOW, decades, smallest, top, legend=f"share of {entries}")


def _density_map(
    shares_LD: np.ndarray,
    marks_LB: np.ndarray | None,
    title: str,
    colour: str,
    decades: int,
    smallest: float,
    top: float,
    *,
    legend: str | None = None,
) -> Picture:
    num_layers, num_rows = shares_LD.shape
    cells_LB, bin_size = bin_rows(shares_LD, MAX_BINS)
    levels_LB = np.full_like(cells_LB, np.nan)
    levels_LB[cells_LB > 0] = np.clip(1 + np.log10(cells_LB[cells_LB > 0]) / decades, 0, 1)

    box = (MAP_LEFT, HEADER, MAP_WIDTH, _map_height(num_layers))
    bottom = HEADER + box[3]
    height = bottom + (92.0 if legend else 26.0)
    figure = new_figure(height)
    _draw_map(figure, box, levels_LB, marks_LB, num_rows, bin_size)
    put_text(figure, MAP_LEFT, 14, title, color=colour, fontweight="bold")
    put_text(figure, 4, HEADER - 8, "layer")
    if legend:
        put_text(figure, MAP_LEFT + MAP_WIDTH / 2, bottom + 32, "row", ha="center")
        every = 1 if decades < 4 else 2
        ticks = [(step / decades, short_percent(10.0 ** (step - decades))) for step in range(0, decades + 1, every)]
        if smallest < MIN_SHARE:
            ticks[0] = (0.0, f"≤ {ticks[0][1]}")
        _draw_legend(figure, bottom + 54, ticks, legend, marks=marks_LB is not None)

    strip = new_axes(figure, (STRIP_LEFT, HEADER, STRIP_WIDTH, box[3]))
    strip.spines["left"].set_visible(True)
    strip.barh(np.arange(num_layers), layer_shares(shares_LD), height=0.66, color=colour, alpha=0.75, linewidth=0)
    strip.axvline(1 / num_layers, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
    strip.set(ylim=(num_layers - 0.5, -0.5), xlim=(0, top))
    strip.set_yticks([])
    end = round_down(top)
    # The label ends at its tick, so that it stays inside the drawing.
    strip.set_xticks([end], [short_percent(end)], ha="right")
    put_text(figure, WIDTH - 4, 14, "share of these votes", ha="right")
    put_text(figure, WIDTH - 4, HEADER - 8, f"dashed: equal, {short_percent(1 / num_layers)}", ha="right", alpha=0.8)
    return Picture(figure, height, title, box)


def colour_scale(high_LD: np.ndarray, low_LD: np.ndarray) -> tuple[int, float]:
    """Decades that the colours of both maps span, down from 100 %, and the smallest share that a cell has."""
    cells = [bin_rows(shares_LD, MAX_BINS)[0] for shares_LD in (high_LD, low_LD)]
    present = np.concatenate([cells_LB[cells_LB > 0] for cells_LB in cells])
    smallest = float(present.min()) if present.size else 0.01
    return math.ceil(-math.log10(min(max(smallest, MIN_SHARE), 0.1)) - 1e-9), smallest


def _map_height(num_layers: int) -> float:
    return num_layers * min(max(330 / num_layers, 6.0), 16.0)


def _draw_map(
    figure: Figure, box: Box, levels_LB: np.ndarray, marks_LB: np.ndarray | None, num_rows: int, bin_size: int
) -> Axes:
    num_layers, num_bins = levels_LB.shape
    axes = new_axes(figure, box)
    axes.spines[:].set_visible(True)
    extent = (-0.5, num_bins * bin_size - 0.5, num_layers - 0.5, -0.5)
    draw_image(axes, {theme: _pixels(levels_LB, marks_LB, theme) for theme in THEMES}, extent)
    axes.set_xlim(-0.5, num_rows - 0.5)
    axes.set_yticks(index_ticks(num_layers, 8))
    axes.set_xticks(index_ticks(num_rows, 6))
    return axes


def _colours(levels: np.ndarray, theme: Theme) -> np.ndarray:
    """RGBA bytes of levels in [0, 1]; NaN is transparent."""
    from matplotlib import colormaps

    weak, strong = RAMP[theme]
    rgba: np.ndarray = colormaps["magma"](weak + (strong - weak) * np.nan_to_num(levels), bytes=True)
    rgba[np.isnan(levels), 3] = 0
    return rgba


def _pixels(levels_LB: np.ndarray, marks_LB: np.ndarray | None, theme: Theme) -> np.ndarray:
    """The map's pixels: each layer a band of colour, a gap, and, with marks, a thin line and another gap."""
    colours_LB4 = _colours(levels_LB, theme)
    blank_LB4 = np.zeros_like(colours_LB4)
    bands = [(colours_LB4, 18), (blank_LB4, 2)]
    if marks_LB is not None:
        ink_LB4 = np.empty_like(colours_LB4)
        ink_LB4[..., :3] = MARK_RGB[theme]
        strength_LB = 0.2 + 0.8 * marks_LB
        ink_LB4[..., 3] = np.where(marks_LB > 0, 255 * strength_LB, 0).astype(np.uint8)
        bands = [(colours_LB4, 13), (blank_LB4, 1), (ink_LB4, 4), (blank_LB4, 2)]
    lines = [band_LB4 for band_LB4, count in bands for _ in range(count)]
    stacked = np.stack(lines, axis=1).reshape(-1, levels_LB.shape[1], 4)
    return stacked.repeat(-(-PIXELS_ACROSS // levels_LB.shape[1]), axis=1)


def _draw_legend(figure: Figure, top: float, ticks: Sequence[tuple[float, str]], label: str, *, marks: bool) -> None:
    """A blank box for zero, the colour scale with its label, and what the thin marks are."""
    from matplotlib.lines import Line2D

    blank = new_axes(figure, (MAP_LEFT, top, 22, 10))
    blank.spines[:].set_visible(True)
    blank.set_yticks([])
    blank.set_xticks([0.5], ["never"])
    levels = np.linspace(0, 1, 200)[None, :]
    _draw_scale(figure, (MAP_LEFT + 82, top, 200, 10), {theme: _colours(levels, theme) for theme in THEMES}, ticks)
    put_text(figure, MAP_LEFT + 292, top + 9, label)
    if marks:
        total = figure.get_figheight() * 72
        left = STRIP_LEFT - 12
        ends, level = (left / WIDTH, (left + 20) / WIDTH), 1 - (top + 5) / total
        figure.add_artist(Line2D(ends, (level, level), color=INK, linewidth=2.2, solid_capstyle="butt"))
        put_text(figure, left + 26, top + 9, "selected rows")


def _draw_scale(
    figure: Figure, box: Box, pixels: Mapping[Theme, np.ndarray], ticks: Sequence[tuple[float, str]]
) -> None:
    scale = new_axes(figure, box)
    draw_image(scale, pixels, (0, 1, 0, 1))
    scale.set_yticks([])
    scale.set_xticks([place for place, _ in ticks], [text for _, text in ticks])


def subject_map(relative_SL: np.ndarray, names: Sequence[str], *, title: str) -> Picture:
    """Subject by layer: magnitude relative to the layer's mean over subjects, on a symmetric logarithmic scale.

    `relative_SL` holds ratios of 0 or more, 1 being the layer's mean; `names` the S subjects from top to bottom.
    Colours are ColorBrewer's PuOr: orange above the mean, purple below, and end at the largest ratio, up or down, or
    at `MAX_RATIO`.

    Raises:
        InputError: matplotlib is missing.
    """
    num_subjects, num_layers = relative_SL.shape
    box = (SUBJECTS_LEFT, SUBJECTS_HEADER, WIDTH - SUBJECTS_LEFT - 6, num_subjects * SUBJECT_HEIGHT)
    bottom = box[1] + box[3]
    height = bottom + 88
    figure = new_figure(height)
    logs_SL = np.log2(np.maximum(relative_SL, 1 / MAX_RATIO))
    end = min(max(float(np.abs(logs_SL).max()), 0.1), math.log2(MAX_RATIO))
    axes = new_axes(figure, box)
    levels_SL = 0.5 + 0.5 * np.clip(logs_SL / end, -1, 1)
    cells = levels_SL.repeat(SUBJECT_PIXELS, axis=0).repeat(SUBJECT_PIXELS, axis=1)
    draw_image(
        axes,
        {theme: _diverging(cells, theme) for theme in THEMES},
        (-0.5, num_layers - 0.5, num_subjects - 0.5, -0.5),
    )
    axes.set_xticks(index_ticks(num_layers, 8))
    axes.set_yticks(range(num_subjects), [name.replace("_", " ") for name in names])
    axes.tick_params(axis="y", length=0)
    put_text(figure, box[0] + box[2] / 2, bottom + 32, "layer", ha="center")
    levels = np.linspace(0, 1, 201)[None, :]
    ticks = [
        (0.0, f"{'≤ ' if end == math.log2(MAX_RATIO) else ''}{2**-end:.2g} ×"),
        (0.5, "1 ×"),
        (1.0, f"{2**end:.2g} ×"),
    ]
    if end == math.log2(MAX_RATIO):
        ticks[2] = (1.0, f"≥ {2**end:.2g} ×")
    scale = (box[0] - 40, bottom + 48, 200.0, 10.0)
    _draw_scale(figure, scale, {theme: _diverging(levels, theme) for theme in THEMES}, ticks)
    put_text(figure, scale[0] + 228, scale[1] + 9, "of the layer’s mean")
    return Picture(figure, height, title, box)


def _diverging(levels: np.ndarray, theme: Theme) -> np.ndarray:
    """RGBA bytes of levels in [0, 1]: purple, the page's own lightness at 0.5, orange."""
    from matplotlib import colormaps

    light: np.ndarray = colormaps["PuOr_r"](levels)[..., :3]
    if theme == "light":
        return np.asarray((255 * light).round(), dtype=np.uint8)
    # On a dark page the middle must recede: from the ramp's hues, light at the ends and dark in the middle.
    strength = np.abs(2 * levels - 1)[..., None]
    ends = np.where((levels > 0.5)[..., None], np.array([253, 184, 99]), np.array([178, 171, 210]))
    middle = np.array([46, 43, 50])
    return np.asarray((middle + (ends - middle) * strength**0.8).round(), dtype=np.uint8)


def _largest(shares_LB: np.ndarray, num_full: int) -> float:
    """The largest share, in a full bin if there is one: a last bin of few rows says little."""
    return float(shares_LB[:, :num_full].max() or shares_LB.max())


def _require_shares(shares_LD: np.ndarray) -> np.ndarray:
    shares_LD = np.asarray(shares_LD)
    if shares_LD.ndim != 2 or 0 in shares_LD.shape:
        raise InputError(f"the vote frequencies have shape {shares_LD.shape}; they must be (layers, rows)")
    if not (shares_LD.min() >= 0 and shares_LD.max() <= 1):
        raise InputError(
            f"the vote frequencies run from {shares_LD.min():g} to {shares_LD.max():g}; "
            "they must be shares of prompts, 0 to 1: divide the votes by the number of prompts"
        )
    return shares_LD
