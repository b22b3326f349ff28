"""What the command line shows: progress bars, the before/after table, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TypeVar

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from loki.results import Comparison, Measure, Result

T = TypeVar("T")
notes = Console(stderr=True, highlight=False)
"""Progress and notes; the terminal's standard output carries results only."""


def track(items: Sequence[T], what: str) -> Iterable[T]:
    """Go through items behind a progress bar with counts, time gone and time left."""
    columns = (
        TextColumn("  {task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes) as progress:
        yield from progress.track(items, description=what)


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
