"""Drawings of the report (LoKI figure 2 and its companions): inline SVG that follows the page's theme.

Shapes: L layers, D rows (hidden size), B bins of neighbouring rows. Lengths are units of the SVG's view box,
which is `WIDTH` wide. Ink is written as `currentColor`; a coloured image is embedded twice, once for light
and once for dark pages, and a media query shows the one that fits.
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loki.errors import InputError
from loki.rows import RowSelection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["light", "dark"]
Box = tuple[float, float, float, float]
"""Left, top, width and height, from the drawing's upper left corner."""

MISSING_PACKAGES = "the report needs matplotlib and jinja2: run `pip install 'loki-peft[report]'`"
MAX_BINS = 288
MIN_SHARE = 1e-4
"""The colour scale starts here at the latest: what is rarer takes the weakest colour."""

WIDTH = 640.0
MAP_LEFT, MAP_WIDTH = 40.0, 456.0
STRIP_LEFT, STRIP_WIDTH = 514.0, 122.0
HEADER, FONT_SIZE, PHONE_FONT_SIZE = 42.0, 11.0, 16.0
INK, ACCENT = "#010203", "#010204"
"""Stand-ins that become `currentColor` and the page's accent colour."""
MARK_RGB: Mapping[Theme, tuple[int, int, int]] = {"light": (32, 30, 36), "dark": (236, 233, 226)}
RAMP: Mapping[Theme, tuple[float, float]] = {"light": (0.90, 0.14), "dark": (0.30, 0.97)}
"""Part of magma used, from weak to strong: strong is what stands out most from the page."""
STYLE = (
    "<style>.loki-figure{stroke-linejoin:round}.loki-figure .theme-dark{display:none}"
    "@media screen and (prefers-color-scheme:dark){.loki-figure .theme-light{display:none}"
    ".loki-figure .theme-dark{display:inline}}"
    f"@media (max-width:34rem){{.loki-figure text{{font-size:{PHONE_FONT_SIZE:g}px!important}}}}</style>"
)


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

    figure, height = _map_figure(num_layers, legend=True)
    axes, bottom = _draw_map(figure, levels_LB, marks_LB, num_rows, bin_size)
    every = 1 if decades < 4 else 2
    ticks = [(step / decades, _percent(10.0 ** (step - decades))) for step in range(0, decades + 1, every)]
    if smallest < MIN_SHARE:
        ticks[0] = (0.0, f"≤ {ticks[0][1]}")
    _draw_legend(figure, bottom, zero="never", ticks=ticks, label="share of prompts", marks=marks_LB is not None)

    strip = _draw_strip(figure, axes, layer_shares(frequency_LD), "share of all votes")
    equal = 1 / num_layers
    strip.axvline(equal, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
    _text(figure, WIDTH - 4, HEADER - 8, f"dashed: equal, {_percent(equal)}", ha="right", alpha=0.8)
    top = max(float(layer_shares(frequency_LD).max()), equal) * 1.06
    strip.set_xlim(0, top)
    end = _round_down(top)
    _label_end(strip, end, _percent(end))
    return _svg(figure, height, title)


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

    figure, height = _map_figure(selection.num_layers, legend=bin_size > 1)
    axes, bottom = _draw_map(figure, levels_LB, None, num_rows, bin_size)
    if bin_size > 1:
        ticks = [(0.0, _percent(low)), (1.0, ("≥ " if shares_LB.max() > high else "") + _percent(high))]
        _draw_legend(figure, bottom, zero="none", ticks=ticks, label="of the rows in a cell", marks=False)
    counts_L = np.array([len(rows) for rows in selection.rows])
    strip = _draw_strip(figure, axes, counts_L, "rows selected in the layer")
    strip.set_xlim(0, counts_L.max() * 1.06)
    _label_end(strip, float(counts_L.max()), format_number(float(counts_L.max())))
    label = f"Map of the {selection.num_selected} selected rows in {selection.num_layers} layers"
    return _svg(figure, height, label)


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
    figure = _figure(height)
    axes = _axes(figure, box)
    axes.spines[["left", "bottom"]].set_visible(True)
    axes.plot(steps, losses, color=ACCENT, linewidth=1.7, marker="o", markersize=3.2 if len(steps) <= 40 else 0.0)
    axes.yaxis.set_major_locator(_nice_ticks(4))
    axes.xaxis.set_major_locator(_nice_ticks(5, integer=True))
    axes.margins(x=0.02, y=0.08)
    _text(figure, 4, 12, "loss", color=ACCENT)
    _text(figure, box[0] + box[2], height - 6, "step", ha="right")

    rate_steps, rates = series(log, "learning_rate")
    if np.isfinite(rates).any():
        right = axes.twinx()
        _plain(right)
        right.plot(rate_steps, rates, color=INK, linewidth=0.8, alpha=0.7)
        top = float(np.nanmax(rates))
        right.set_ylim(0, (top if top > 0 else 1.0) * 1.08)
        ticks = [0.0, _round_down(top)] if top > 0 else [0.0]
        right.set_yticks(ticks, [format_number(tick) for tick in ticks])
        _text(figure, WIDTH - 4, 12, "learning rate (thin)", ha="right", alpha=0.8)
    return _svg(figure, height, f"Training curve over {len(steps)} logged steps")


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


def _index_ticks(count: int, at_most: int) -> list[int]:
    """Round indices from 0, and the last index in place of a round one that would stand too near to it."""
    last = count - 1
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    step = next(step for step in steps if last // step + 1 < at_most)
    return [tick for tick in range(0, last, step) if last - tick >= 0.6 * step or tick == 0] + ([last] if last else [])


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


def _figure(height: float) -> Figure:
    try:
        import matplotlib  # noqa: F401
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(MISSING_PACKAGES) from error
    return Figure(figsize=(WIDTH / 72, height / 72), dpi=72)


def _map_figure(num_layers: int, *, legend: bool) -> tuple[Figure, float]:
    height = HEADER + _map_height(num_layers) + (88.0 if legend else 40.0)
    return _figure(height), height


def _map_height(num_layers: int) -> float:
    return num_layers * min(max(360 / num_layers, 6.0), 16.0)


def _axes(figure: Figure, box: Box) -> Axes:
    left, top, width, height = box
    total = figure.get_figheight() * 72
    axes = figure.add_axes((left / WIDTH, 1 - (top + height) / total, width / WIDTH, height / total))
    _plain(axes)
    return axes


def _plain(axes: Axes) -> None:
    axes.patch.set_visible(False)
    axes.spines[:].set(visible=False, color=INK, linewidth=0.6, alpha=0.6)
    axes.tick_params(length=3, width=0.6, color=INK, labelcolor=INK, labelsize=FONT_SIZE, pad=3)


def _text(figure: Figure, left: float, top: float, text: str, *, color: str = INK, **style: Any) -> None:
    total = figure.get_figheight() * 72
    figure.text(left / WIDTH, 1 - top / total, text, color=color, fontsize=FONT_SIZE, parse_math=False, **style)


def _nice_ticks(count: int, *, integer: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, integer=integer, steps=[1, 2, 5, 10])


def _draw_map(
    figure: Figure, levels_LB: np.ndarray, marks_LB: np.ndarray | None, num_rows: int, bin_size: int
) -> tuple[Axes, float]:
    """The map with its two axes; returns it and where the legend starts."""
    num_layers, num_bins = levels_LB.shape
    height = _map_height(num_layers)
    axes = _axes(figure, (MAP_LEFT, HEADER, MAP_WIDTH, height))
    axes.spines[:].set_visible(True)
    # Enough pixels that a browser only ever scales down: no blur, and no thin line lost.
    repeat = -(-1152 // num_bins)
    extent = (-0.5, num_bins * bin_size - 0.5, num_layers - 0.5, -0.5)
    _draw_image(axes, {theme: _pixels(levels_LB, marks_LB, theme, repeat) for theme in RAMP}, extent)
    axes.set_xlim(-0.5, num_rows - 0.5)
    axes.set_yticks(_index_ticks(num_layers, 8))
    axes.set_xticks(_index_ticks(num_rows, 6))
    _text(figure, 4, HEADER - 8, "layer")
    _text(figure, MAP_LEFT + MAP_WIDTH / 2, HEADER + height + 34, "row", ha="center")
    return axes, HEADER + height + 50


def _colours(levels: np.ndarray, theme: Theme) -> np.ndarray:
    """RGBA bytes of levels in [0, 1]; NaN is transparent."""
    from matplotlib import colormaps

    weak, strong = RAMP[theme]
    rgba: np.ndarray = colormaps["magma"](weak + (strong - weak) * np.nan_to_num(levels), bytes=True)
    rgba[np.isnan(levels), 3] = 0
    return rgba


def _pixels(levels_LB: np.ndarray, marks_LB: np.ndarray | None, theme: Theme, repeat: int) -> np.ndarray:
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
    return stacked.repeat(repeat, axis=1)


def _draw_image(axes: Axes, pixels: Mapping[Theme, np.ndarray], extent: Box) -> None:
    for theme, rgba in pixels.items():
        axes.imshow(rgba, extent=extent, aspect="auto", interpolation="none", gid=f"theme-{theme}")


def _draw_strip(figure: Figure, map_axes: Axes, values_L: np.ndarray, label: str) -> Axes:
    """A horizontal bar for each layer, beside the map."""
    num_layers = len(values_L)
    strip = _axes(figure, (STRIP_LEFT, HEADER, STRIP_WIDTH, _map_height(num_layers)))
    strip.spines["left"].set_visible(True)
    strip.barh(np.arange(num_layers), values_L, height=0.66, color=INK, alpha=0.5, linewidth=0)
    strip.set_ylim(map_axes.get_ylim())
    strip.set_yticks([])
    _text(figure, WIDTH - 4, 12, label, ha="right")
    return strip


def _label_end(strip: Axes, value: float, text: str) -> None:
    """One tick near the bars' far end; its label ends there, inside the drawing."""
    strip.set_xticks([value], [text], ha="right")


def _draw_legend(
    figure: Figure, top: float, *, zero: str, ticks: Sequence[tuple[float, str]], label: str, marks: bool
) -> None:
    """A blank box for zero, the colour scale, and what the thin marks are."""
    from matplotlib.lines import Line2D

    blank = _axes(figure, (MAP_LEFT, top, 22, 10))
    blank.spines[:].set_visible(True)
    blank.set_yticks([])
    blank.set_xticks([0.5], [zero])
    scale = _axes(figure, (MAP_LEFT + 82, top, 200, 10))
    levels = np.linspace(0, 1, 200)[None, :]
    _draw_image(scale, {theme: _colours(levels, theme) for theme in RAMP}, (0, 1, 0, 1))
    scale.set_yticks([])
    scale.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
    _text(figure, MAP_LEFT + 292, top + 9, label)
    if marks:
        total = figure.get_figheight() * 72
        left = STRIP_LEFT - 22
        ends, level = (left / WIDTH, (left + 20) / WIDTH), 1 - (top + 5) / total
        figure.add_artist(Line2D(ends, (level, level), color=INK, linewidth=2.2, solid_capstyle="butt"))
        _text(figure, left + 26, top + 9, "selected rows")


def _svg(figure: Figure, height: float, label: str) -> str:
    """The drawing as inline SVG: no header, no foreign identifiers, text in the page's font."""
    import matplotlib

    prefix = f"f{hashlib.sha256(label.encode()).hexdigest()[:8]}-"
    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": prefix, "image.composite_image": False}
    with matplotlib.rc_context(settings):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    alien = r"\A.*?<svg[^>]*>|<metadata>.*?</metadata>|<style.*?</style>"
    body = re.sub(alien, "", buffer.getvalue(), flags=re.DOTALL)
    body = re.sub(r'\bid="(theme-\w+)"', r'class="\1"', body)
    body = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{prefix}", body).replace("xlink:href", "href")
    body = re.sub(r"image-rendering:[\w-]+;?", "", body)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub(r"font-family: [^;\"]*;?", "", body)
    body = body.replace(INK, "currentColor").replace(ACCENT, "var(--accent, #8c2f6b)")
    name = html.escape(label, quote=True)
    return (
        f'<svg class="loki-figure" role="img" aria-label="{name}" viewBox="0 0 {WIDTH:g} {height:g}" '
        f'width="100%">{STYLE}{body}'
    )
