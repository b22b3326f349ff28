"""The curves of `loki dial`: what the task keeps against what the text loses."""

from __future__ import annotations

from loki.errors import InputError
from loki.reporting.drawing import Picture
from loki.reporting.fronts import Point, front_chart
from loki.results import Result

WAYS = {"scale": ("all alike", "other"), "layers": ("by layer", "random"), "rows": ("by row", "loki")}
"""How each way is called, and in which colour of the fronts it is drawn."""


def dial_picture(result: Result) -> Picture:
    """One curve for each way, the whole change at its end.

    Raises:
        InputError: nothing has moved, or matplotlib is missing.
    """
    points = [
        Point(WAYS[point["by"]][0], WAYS[point["by"]][1], point["gain_kept_percent"], point["kl"], point["by"])
        for point in result.figures["points"]
        if point["kl"] > 0
    ]
    if not points:
        raise InputError("no point has moved from the base: there is no curve to draw")
    return front_chart(
        points,
        learned="what was learned, %",
        forgotten="KL divergence from the base, nats per token",
        title="Kept against forgotten",
    )
