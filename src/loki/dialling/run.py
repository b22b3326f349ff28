"""The curve of what a change is worth against what it costs, and the point on it that a budget allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loki.dialling.adapter import DialledAdapter
from loki.dialling.budget import Budget
from loki.dialling.measure import Measured, Yardstick, perplexity_rise
from loki.dialling.settings import Knob, WayName, knobs
from loki.dialling.shares import Shares, integrated
from loki.errors import ArtefactError, InputError
from loki.progress import Track, silent
from loki.provenance import read_json, write_json

HALVINGS = 4
"""Of the gap between the last point within the budget and the first beyond it."""
PROGRESS = "points.json"


@dataclass(frozen=True)
class Point:
    """One position of one knob, measured."""

    by: WayName
    position: float
    measured: Measured


@dataclass(frozen=True)
class Dialled:
    """All that was measured, and the point of least task loss within the budget."""

    base: Measured
    whole: Measured
    points: tuple[Point, ...]
    """By way, in ascending positions."""
    chosen: Point
    scales_U: np.ndarray  # noqa: N815
    """Of the chosen point."""
    gap_percent: Mapping[str, float]
    """How far the shares are from adding up, in percent of what the whole change did, `gain` and `damage`."""

    def kept(self, measured: Measured) -> float:
        """Percent of the fall of the task's loss that a point keeps."""
        return 100 * (self.base.task_loss - measured.task_loss) / (self.base.task_loss - self.whole.task_loss)

    def figures(self) -> dict[str, Any]:
        """Plain JSON form."""

        def row(measured: Measured) -> dict[str, float]:
            return {
                **asdict(measured),
                "perplexity_rise_percent": perplexity_rise(measured, self.base),
                "gain_kept_percent": self.kept(measured),
            }

        def point(found: Point) -> dict[str, Any]:
            return {"by": found.by, "position": found.position, **row(found.measured)}

        return {
            "base": asdict(self.base),
            "whole": row(self.whole),
            "chosen": point(self.chosen),
            "units": len(self.scales_U),
            "units_at_zero": int((self.scales_U == 0).sum()),
            "points": [point(found) for found in self.points],
            "shares_gap_percent": dict(self.gap_percent),
        }


class Progress:
    """What an interrupted run has measured already, in a file; None keeps nothing."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, dict(identity)
        self.found: dict[str, list[float]] = {}
        if path is not None and path.exists():
            values = read_json(path, what="measurements")
            if not isinstance(values, dict) or values.get("identity") != self.identity:
                raise ArtefactError(
                    f"{path} is of a dial with other settings: give the same ones to go on, or remove {path.parent}"
                )
            self.found = values["found"]

    def get(self, name: str) -> list[float] | None:
        """What is known under a name."""
        return self.found.get(name)

    def put(self, name: str, values: Sequence[float]) -> None:
        """Keep values under a name, before anything else happens."""
        self.found[name] = list(map(float, values))
        if self.path is not None:
            write_json(self.path, {"identity": self.identity, "found": self.found})


def dial(
    adapter: DialledAdapter,
    yardstick: Yardstick,
    budget: Budget,
    ways: Sequence[WayName],
    *,
    num_points: int = 5,
    progress: Progress | None = None,
    track: Track = silent,
) -> Dialled:
    """Measure the curve of each way, come close to the budget on each, and set the adapter to the best point within.

    Raises:
        InputError: training has not lowered the task's loss, so there is nothing to weigh against forgetting.
    """
    if num_points < 1:
        raise InputError(f"--points {num_points} is not possible: give 1 or more")
    progress = progress or Progress(None, {})
    ones_U = np.ones(adapter.num_units)

    def measured(name: str, scales_U: np.ndarray, *, track: Track = silent) -> Measured:
        values = progress.get(name)
        if values is None:
            adapter.set(scales_U)
            values = list(asdict(yardstick.measure(what=name, track=track)).values())
            progress.put(name, values)
        return Measured(*values)

    base, whole = measured("base", 0 * ones_U, track=track), measured("whole", ones_U, track=track)
    if not whole.task_loss < base.task_loss:
        raise InputError(
            f"the adapter does not help with these examples (loss {base.task_loss:.4f} without it, "
            f"{whole.task_loss:.4f} with it): give held-out examples of the task it was trained on"
        )
    shares, gaps = Shares(ones_U, ones_U), {}
    if set(ways) - {"scale"}:
        shares = _shares(adapter, yardstick, progress, track)
        gaps = {
            "gain": _gap(shares.gain_U, base.task_loss - whole.task_loss),
            "damage": _gap(shares.damage_U, whole.kl),
        }
    turned = knobs(shares, adapter.layers_U)
    points: list[Point] = []
    positions = [float(position) for position in np.linspace(0, 1, num_points + 1)[1:]]
    for by in ways:
        for position in track(positions, f"by {by}"):
            points.append(Point(by, position, measured(f"{by} {position:.6f}", turned[by](position))))
        points += _towards(budget, base, by, turned[by], [point for point in points if point.by == by], measured)
    points.sort(key=lambda point: (ways.index(point.by), point.position))
    within = [point for point in points if budget.allows(point.measured, base)]
    chosen = min(within, key=lambda point: point.measured.task_loss, default=Point(ways[0], 0.0, base))
    scales_U = turned[chosen.by](chosen.position)
    adapter.set(scales_U)
    return Dialled(base, whole, tuple(points), chosen, scales_U, gaps)


def _towards(
    budget: Budget, base: Measured, by: WayName, knob: Knob, points: Sequence[Point], measured: Any
) -> list[Point]:
    """Points between the last position within the budget and the first beyond it, each halving the gap."""
    low, high = 0.0, None
    for point in points:
        if budget.allows(point.measured, base):
            low = point.position
        else:
            high = point.position
            break
    found: list[Point] = []
    for _ in range(HALVINGS if high is not None else 0):
        assert high is not None
        middle = (low + high) / 2
        point = Point(by, middle, measured(f"{by} {middle:.6f}", knob(middle)))
        found.append(point)
        low, high = (middle, high) if budget.allows(point.measured, base) else (low, middle)
    return found


def _shares(adapter: DialledAdapter, yardstick: Yardstick, progress: Progress, track: Track) -> Shares:
    found = []
    for name, losses, sign in (("gain", yardstick.task_losses, -1), ("damage", yardstick.divergences, 1)):
        values = progress.get(name)
        if values is None:
            values = (sign * integrated(adapter, losses, what=f"{name} by part", track=track)).tolist()
            progress.put(name, values)
        found.append(np.array(values))
    return Shares(*found)


def _gap(shares_U: np.ndarray, total: float) -> float:
    return 100 * abs(float(shares_U.sum()) - total) / abs(total) if total else 0.0
