"""What the command line shows: progress bars, the before/after table, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TypeVar

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from loki.results import Comparison, Measure, Result

T = TypeVar("T")
notes = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress and notes; the terminal's standard output carries results only."""


def track(items: Sequence[T], what: str, *, sizes: Sequence[int] | None = None, unit: str = "") -> Iterable[T]:
    """Go through items behind a progress bar with counts, speed where sizes have a unit, time gone and time left."""
    sizes = sizes or [1] * len(items)
    columns: list[ProgressColumn] = [TextColumn("  {task.description:<12}"), BarColumn(), MofNCompleteColumn()]
    if unit:
        columns.append(_SpeedColumn(unit))
    columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    # The speed of the last minutes: one item may take a minute, and the default window would hold none.
    with Progress(*columns, console=notes, speed_estimate_period=600) as progress:
        task = progress.add_task(what, total=sum(sizes))
        for item, size in zip(items, sizes, strict=True):
            yield item
            progress.advance(task, size)


class _SpeedColumn(ProgressColumn):
    """Items a second since the start."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.completed / task.elapsed if task.elapsed else 0
        return Text(f"{speed:.2f} {self.unit}/s")


def print_json(result: Result) -> None:
    """The whole result on standard output."""
    print(json.dumps(asdict(result), indent=1, ensure_ascii=False))


def print_comparisons(comparisons: Sequence[Comparison], title: str) -> None:
    """The before/after table."""
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE, pad_edge=False
    )
    table.add_column("measure", overflow="fold")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in comparisons:
        table.add_row(row.name, _text(row.before), _text(row.after), _text(row.change, signed=True))
    Console(highlight=False).print(table)


def _text(measure: Measure | None, *, signed: bool = False) -> str:
    if measure is None:
        return ""
    return f"+{measure}" if signed and measure.value > 0 else str(measure)
