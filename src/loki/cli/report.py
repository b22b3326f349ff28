"""`loki report`: pictures of a run, of an attribution log, or of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    path: Annotated[
        Path,
        typer.Argument(
            help="Directory of a finished `loki run`, an attribution log, or the study.json of a `loki study`."
        ),
    ],
    positions: Annotated[
        list[Path] | None,
        typer.Option(help="Positions file; the first is drawn over the maps of a log, and all are compared with it."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The page; report.html in a run directory, kva.report.html beside a file kva.h5."),
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Write each figure as PNG and SVG into this folder too.")] = None,
    stability: Annotated[
        bool, typer.Option(help="Bootstrap the selection over prompts, which reads the log once more.")
    ] = True,
) -> None:
    """Draw a page that opens anywhere: maps of scores and votes, subjects, stability, before/after table.

    Example: loki report kva.h5 --positions 10.json --output report.html
    """
    from loki.cli.show import notes
    from loki.stages import report as draw_report

    written = draw_report(path, positions or (), output=output, figures_dir=figures, with_stability=stability)
    notes.print(f"wrote {written}" + (f", figures in {figures}" if figures else ""))
