"""How the report draws: matplotlib figures as inline SVG that follows the page's theme, and as files.

Lengths are units of the SVG's view box, which is `WIDTH` wide. Figures are drawn in the colours of a light page.
Inline, these become the page's variables, and a coloured image is embedded twice, of which a media query shows the
one that fits.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loki.errors import InputError
from loki.provenance import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["light", "dark"]
THEMES: tuple[Theme, ...] = ("light", "dark")
Box = tuple[float, float, float, float]
"""Left, top, width and height, from the drawing's upper left corner."""

MISSING_PACKAGES = "the report needs matplotlib and jinja2: run `pip install 'loki-peft[report]'`"
WIDTH = 640.0
FONT_SIZE, PHONE_FONT_SIZE = 11.0, 16.0
FILE_DPI = 200

INK, ACCENT, PAGE = "#211f24", "#8c2f6b", "#fffffe"
HIGH, LOW = "#b35806", "#542788"
"""The ends of ColorBrewer's PuOr, which colour-blind readers tell apart: high attribution and low."""
VARIABLES: Mapping[str, str] = {
    INK: "currentColor",
    ACCENT: f"var(--accent, {ACCENT})",
    PAGE: f"var(--page, {PAGE})",
    HIGH: f"var(--high, {HIGH})",
    LOW: f"var(--low, {LOW})",
}
STYLE = (
    "<style>.loki-figure{stroke-linejoin:round}.loki-figure .theme-dark{display:none}"
    "@media screen and (prefers-color-scheme:dark){.loki-figure .theme-light{display:none}"
    ".loki-figure .theme-dark{display:inline}}"
    f"@media screen and (max-width:34rem){{.loki-figure text{{font-size:{PHONE_FONT_SIZE:g}px!important}}}}</style>"
)


@dataclass(frozen=True)
class Picture:
    """A finished drawing."""

    figure: Figure
    height: float
    label: str
    """Its accessible name."""
    map_box: Box | None = None
    """Where a map's cells lie, for the page's script."""

    def inline(self) -> str:
        """SVG for the page: no header, no foreign identifiers, text and colours of the page."""
        prefix = f"f{hashlib.sha256(self.label.encode()).hexdigest()[:8]}-"
        raw = self._render("svg", transparent=True, fonttype="none", salt=prefix).decode()
        alien = r"\A.*?<svg[^>]*>|<metadata>.*?</metadata>|<style.*?</style>"
        body = re.sub(alien, "", raw, flags=re.DOTALL)
        body = re.sub(r'\bid="(theme-\w+)"', r'class="\1"', body)
        body = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{prefix}", body).replace("xlink:href", "href")
        body = re.sub(r"image-rendering:[\w-]+;?", "", body)
        body = re.sub(r"font: (?:(bold|\d{3}) )?([\d.]+px)[^;\"]*", _font, body)
        body = re.sub(r"font-family: [^;\"]*;?", "", body)
        # A hundredth of a unit is far below a pixel in a path; in a transform it would not be.
        body = re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)
        for colour, variable in VARIABLES.items():
            body = body.replace(colour, variable)
        name = html.escape(self.label, quote=True)
        return (
            f'<svg class="loki-figure" role="img" aria-label="{name}" viewBox="0 0 {WIDTH:g} {self.height:g}" '
            f'width="100%">{STYLE}{body}'
        )

    def save(self, path_without_ending: Path) -> list[Path]:
        """Write `.png` and `.svg` files that stand alone, in the light theme on white.

        Raises:
            OutputError: the folder cannot be written.
        """
        dark = [image for axes in self.figure.axes for image in axes.images if image.get_gid() == "theme-dark"]
        for image in dark:
            image.set_visible(False)
        paths = []
        for ending in ("png", "svg"):
            path = path_without_ending.with_name(f"{path_without_ending.name}.{ending}")
            write_bytes(path, self._render(ending, transparent=False, fonttype="path", salt=path_without_ending.name))
            paths.append(path)
        for image in dark:
            image.set_visible(True)
        return paths

    def _render(self, ending: str, *, transparent: bool, fonttype: str, salt: str) -> bytes:
        import matplotlib

        buffer = io.BytesIO()
        settings = {"svg.fonttype": fonttype, "svg.hashsalt": salt, "image.composite_image": False}
        names = ("Date", "Creator", "Format", "Type") if ending == "svg" else ("Software",)
        with matplotlib.rc_context(settings):
            self.figure.savefig(
                buffer,
                format=ending,
                dpi=72 if ending == "svg" else FILE_DPI,
                transparent=transparent,
                facecolor="none" if transparent else "white",
                metadata=dict.fromkeys(names),
            )
        return buffer.getvalue()


def _font(match: re.Match[str]) -> str:
    weight = f"font-weight: {match[1]}; " if match[1] else ""
    return f"{weight}font-size: {match[2]}"


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
    figure.text(
        left / WIDTH, 1 - top / total, text, **{"color": color, "fontsize": FONT_SIZE, "parse_math": False, **style}
    )


def draw_image(axes: Axes, pixels: Mapping[Theme, np.ndarray], extent: Box) -> None:
    """RGBA pixels, one array for each theme, over left, right, bottom and top of the axes' data."""
    for theme, rgba in pixels.items():
        axes.imshow(rgba, extent=extent, aspect="auto", interpolation="none", gid=f"theme-{theme}")


def nice_ticks(count: int, *, integer: bool = False) -> Any:
    """About `count` ticks at round numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, integer=integer, steps=[1, 2, 5, 10])


def index_ticks(count: int, at_most: int) -> list[int]:
    """Round indices from 0, and the last index in place of a round one that would stand too near to it."""
    last = count - 1
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    step = next(step for step in steps if last // step + 1 < at_most)
    return [tick for tick in range(0, last, step) if last - tick >= 0.6 * step or tick == 0] + ([last] if last else [])
