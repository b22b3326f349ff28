"""How the report draws: matplotlib figures as inline SVG that follows the page's theme.

Shapes: L layers, D rows (hidden size), B bins of neighbouring rows. Lengths are units of the SVG's view box,
which is `WIDTH` wide. Ink is written as `currentColor`; a coloured image is embedded twice, once for light
and once for dark pages, and a media query shows the one that fits.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loki.errors import InputError

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


def new_figure(height: float) -> Figure:
    """An empty drawing, `WIDTH` wide.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(MISSING_PACKAGES) from error
    return Figure(figsize=(WIDTH / 72, height / 72), dpi=72)


def new_map_figure(num_layers: int, *, legend: bool) -> tuple[Figure, float]:
    """An empty drawing for a map of L layers, and its height."""
    height = HEADER + _map_height(num_layers) + (88.0 if legend else 40.0)
    return new_figure(height), height


def _map_height(num_layers: int) -> float:
    return num_layers * min(max(360 / num_layers, 6.0), 16.0)


def new_axes(figure: Figure, box: Box) -> Axes:
    """Axes without a frame at a place counted from the upper left corner."""
    left, top, width, height = box
    total = figure.get_figheight() * 72
    axes = figure.add_axes((left / WIDTH, 1 - (top + height) / total, width / WIDTH, height / total))
    strip_frame(axes)
    return axes


def strip_frame(axes: Axes) -> None:
    """Take the frame away, and write ticks in the ink of the page."""
    axes.patch.set_visible(False)
    axes.spines[:].set(visible=False, color=INK, linewidth=0.6, alpha=0.6)
    axes.tick_params(length=3, width=0.6, color=INK, labelcolor=INK, labelsize=FONT_SIZE, pad=3)


def put_text(figure: Figure, left: float, top: float, text: str, *, color: str = INK, **style: Any) -> None:
    """Write text at a place counted from the upper left corner."""
    total = figure.get_figheight() * 72
    figure.text(left / WIDTH, 1 - top / total, text, color=color, fontsize=FONT_SIZE, parse_math=False, **style)


def nice_ticks(count: int, *, integer: bool = False) -> Any:
    """About `count` ticks at round numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, integer=integer, steps=[1, 2, 5, 10])


def draw_map(
    figure: Figure, levels_LB: np.ndarray, marks_LB: np.ndarray | None, num_rows: int, bin_size: int
) -> tuple[Axes, float]:
    """The map with its two axes; returns it and where the legend starts."""
    num_layers, num_bins = levels_LB.shape
    height = _map_height(num_layers)
    axes = new_axes(figure, (MAP_LEFT, HEADER, MAP_WIDTH, height))
    axes.spines[:].set_visible(True)
    # Enough pixels that a browser only ever scales down: no blur, and no thin line lost.
    repeat = -(-1152 // num_bins)
    extent = (-0.5, num_bins * bin_size - 0.5, num_layers - 0.5, -0.5)
    _draw_image(axes, {theme: _pixels(levels_LB, marks_LB, theme, repeat) for theme in RAMP}, extent)
    axes.set_xlim(-0.5, num_rows - 0.5)
    axes.set_yticks(_index_ticks(num_layers, 8))
    axes.set_xticks(_index_ticks(num_rows, 6))
    put_text(figure, 4, HEADER - 8, "layer")
    put_text(figure, MAP_LEFT + MAP_WIDTH / 2, HEADER + height + 34, "row", ha="center")
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


def draw_strip(figure: Figure, map_axes: Axes, values_L: np.ndarray, label: str) -> Axes:
    """A horizontal bar for each layer, beside the map."""
    num_layers = len(values_L)
    strip = new_axes(figure, (STRIP_LEFT, HEADER, STRIP_WIDTH, _map_height(num_layers)))
    strip.spines["left"].set_visible(True)
    strip.barh(np.arange(num_layers), values_L, height=0.66, color=INK, alpha=0.5, linewidth=0)
    strip.set_ylim(map_axes.get_ylim())
    strip.set_yticks([])
    put_text(figure, WIDTH - 4, 12, label, ha="right")
    return strip


def label_end(strip: Axes, value: float, text: str) -> None:
    """One tick near the bars' far end; its label ends there, inside the drawing."""
    strip.set_xticks([value], [text], ha="right")


def draw_legend(
    figure: Figure, top: float, *, zero: str, ticks: Sequence[tuple[float, str]], label: str, marks: bool
) -> None:
    """A blank box for zero, the colour scale, and what the thin marks are."""
    from matplotlib.lines import Line2D

    blank = new_axes(figure, (MAP_LEFT, top, 22, 10))
    blank.spines[:].set_visible(True)
    blank.set_yticks([])
    blank.set_xticks([0.5], [zero])
    scale = new_axes(figure, (MAP_LEFT + 82, top, 200, 10))
    levels = np.linspace(0, 1, 200)[None, :]
    _draw_image(scale, {theme: _colours(levels, theme) for theme in RAMP}, (0, 1, 0, 1))
    scale.set_yticks([])
    scale.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
    put_text(figure, MAP_LEFT + 292, top + 9, label)
    if marks:
        total = figure.get_figheight() * 72
        left = STRIP_LEFT - 22
        ends, level = (left / WIDTH, (left + 20) / WIDTH), 1 - (top + 5) / total
        figure.add_artist(Line2D(ends, (level, level), color=INK, linewidth=2.2, solid_capstyle="butt"))
        put_text(figure, left + 26, top + 9, "selected rows")


def as_svg(figure: Figure, height: float, label: str) -> str:
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


def _index_ticks(count: int, at_most: int) -> list[int]:
    """Round indices from 0, and the last index in place of a round one that would stand too near to it."""
    last = count - 1
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    step = next(step for step in steps if last // step + 1 < at_most)
    return [tick for tick in range(0, last, step) if last - tick >= 0.6 * step or tick == 0] + ([last] if last else [])
