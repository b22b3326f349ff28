"""`loki run`: one settings file, all stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loki.cli.options import ForceOption, JsonOption, OutputDirOption

if TYPE_CHECKING:
    from loki.run_settings import RunSettings


def run(
    config: Annotated[Path, typer.Argument(help="YAML file of settings; `loki demo --print-config` shows one.")],
    output_dir: OutputDirOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Analyse, select, train, merge, evaluate and report, into one run directory.

    Finished stages are used again, an interrupted one goes on where it stopped.

    Example: loki run run.yaml --output-dir runs/mine
    """
    from loki.run_settings import load_settings

    show_run(load_settings(config, output_dir=output_dir), force=force, as_json=as_json)


def show_run(settings: RunSettings, *, force: bool, as_json: bool) -> None:
    """Run all stages and show the closing table."""
    from loki.cli.show import notes, print_comparisons, print_json, track
    from loki.models import model_label
    from loki.pipeline import run_pipeline
    from loki.stages import REPORT_FILE, StageName

    def announce(stage: StageName, finished: bool) -> None:
        notes.print(f"{stage}: finished before" if finished else f"{stage} …")

    summary = run_pipeline(settings, force=force, track=track, announce=announce)
    if as_json:
        print_json(summary)
    else:
        print_comparisons(summary.comparisons, f"{model_label(settings.model)}, before and after")
    directory = settings.output_dir
    notes.print(
        f"{summary.figures['seconds']:.0f} s in all; merged model in {directory / 'merged'}, "
        f"pictures in {directory / REPORT_FILE}"
    )
