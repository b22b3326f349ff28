"""Learned against forgotten: every method of a study a curve, and the front that none is better than in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from loki.errors import InputError
from loki.reporting.drawing import ACCENT, HIGH, INK, LOW, WIDTH, Picture, new_axes, new_figure, nice_ticks, put_text
from loki.reporting.numbers import format_number

FAMILIES = {"loki": ACCENT, "random": HIGH, "other": LOW}
"""Colours of the points: rows chosen by attribution, rows drawn at random, and other projects' methods."""
MARKERS = {"loki": "o", "random": "s", "other": "^"}
"""Shapes say it too, to readers who do not see the colours."""
SIGNS = {"loki": "\u25cf", "random": "\u25a0", "other": "\u25b2"}
KEY_TOP, KEY_LINE, SHORT_LABEL = 392.0, 17.0, 38
"""Where the key begins, how high its lines are, and how many letters stand beside each other even on a phone."""


Role = Literal["whole", "part", "seed"]
"""The whole of a change, a part of it, drawn small, or one of several seeds, drawn faint and on no front."""
SIZES: Mapping[Role, tuple[float, float]] = {"whole": (26, 0.75), "part": (8, 0.75), "seed": (7, 0.3)}
"""Area of a point, in square points, and its opacity."""


@dataclass(frozen=True)
class Point:
    """One run, or the mean of a method's."""

    label: str
    family: str
    """A key of `FAMILIES`."""
    learned: float
    """Higher is better."""
    forgotten: float
    """Lower is better."""
    run: str | None = None
    """Points of one run are joined, from the least forgotten to the most."""
    role: Role = "whole"


def front(points: Sequence[Point]) -> list[Point]:
    """Points that no other one is at least as good as in both and better than in one, by what they forgot."""
    points = [point for point in points if point.role != "seed"]

    def is_beaten(point: Point) -> bool:
        return any(
            other.learned >= point.learned
            and other.forgotten <= point.forgotten
            and (other.learned > point.learned or other.forgotten < point.forgotten)
            for other in points
        )

    return sorted((point for point in points if not is_beaten(point)), key=lambda point: point.forgotten)


def front_chart(points: Sequence[Point], *, learned: str, forgotten: str, title: str) -> Picture:
    """What was learned (upwards) against what was forgotten (to the right, logarithmic), with the front as a line.

    `learned` and `forgotten` name the axes. Each label has a number, at the best of its whole runs and in the key,
    which goes from the most learned to the least. The line is the front of all but single seeds.

    Raises:
        InputError: no point, or one that forgot nothing or less, which a logarithmic axis cannot show; matplotlib is
            missing.
    """
    if not points:
        raise InputError("there is no run to draw: run the study first")
    if not all(point.forgotten > 0 for point in points):
        odd = next(point for point in points if not point.forgotten > 0)
        raise InputError(f"{odd.label!r} forgot {odd.forgotten:g}: a logarithmic axis takes what is above 0")
    from matplotlib.ticker import LogLocator, NullFormatter

    best_runs: dict[str, Point] = {}
    for point in sorted(points, key=lambda point: point.learned, reverse=True):
        if point.role == "whole":
            best_runs.setdefault(point.label, point)
    columns = 2 if all(len(label) <= SHORT_LABEL for label in best_runs) else 1
    lines = -(-len(best_runs) // columns)
    height, box = KEY_TOP + lines * KEY_LINE, (52.0, 34.0, WIDTH - 72.0, 290.0)
    figure = new_figure(height)
    axes = new_axes(figure, box)
    axes.spines[["left", "bottom"]].set_visible(True)
    axes.set_xscale("log")
    best = front(points)
    axes.step(
        [point.forgotten for point in best],
        [point.learned for point in best],
        where="post",
        color=INK,
        linewidth=0.8,
        alpha=0.6,
        zorder=1,
    )
    for run in dict.fromkeys(point.run for point in points if point.run is not None):
        path = sorted((point for point in points if point.run == run), key=lambda point: point.forgotten)
        axes.plot(
            [point.forgotten for point in path],
            [point.learned for point in path],
            color=FAMILIES[path[0].family],
            linewidth=0.7,
            alpha=0.45,
            zorder=1,
        )
    for family, role in product(FAMILIES, SIZES):
        alike = [point for point in points if (point.family, point.role) == (family, role)]
        area, opacity = SIZES[role]
        axes.scatter(
            [point.forgotten for point in alike],
            [point.learned for point in alike],
            s=area,
            marker=MARKERS[family],
            color=FAMILIES[family],
            alpha=opacity,
            linewidths=0,
            zorder=2,
        )
    for place, (label, point) in enumerate(best_runs.items()):
        axes.annotate(
            str(place + 1),
            (point.forgotten, point.learned),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=8,
            color=FAMILIES[point.family],
        )
        left = 12 + place // lines * WIDTH / columns
        put_text(
            figure,
            left,
            KEY_TOP + place % lines * KEY_LINE,
            f"{place + 1} {SIGNS[point.family]} {label}",
            color=FAMILIES[point.family],
        )
    axes.margins(x=0.06, y=0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _place: format_number(value, 1))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(nice_ticks(5))
    put_text(figure, 4, 14, learned)
    put_text(figure, WIDTH - 4, 14, "line: the front", ha="right", alpha=0.8)
    put_text(figure, box[0] + box[2], KEY_TOP - 28, f"{forgotten} (logarithmic)", ha="right")
    return Picture(figure, height, title)
