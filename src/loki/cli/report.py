"""`loki report`: pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run_dir: Annotated[Path, typer.Argument(help="Directory of a finished `loki run`.")]) -> None:
    """Draw report.html from a finished run: heatmaps, selected rows, training curve, before/after table.

    Example: loki report runs/demo
    """
    from loki.cli.show import notes
    from loki.stages import report as draw_report

    notes.print(f"wrote {draw_report(run_dir)}")
