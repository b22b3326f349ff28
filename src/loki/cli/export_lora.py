"""`loki export-lora`: an adapter as an ordinary LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.cli.options import JsonOption


def export_lora(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder that `loki train` wrote.")],
    output: Annotated[Path, typer.Argument(help="Folder for the LoRA adapter; it must not exist yet.")],
    model: Annotated[
        str | None,
        typer.Option(help="Model it was trained on: folder, Hub id, or `embedded`; the one it names when left out."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter as an ordinary LoRA adapter, for programs that know LoRA only: the same change, exactly.

    Example: loki export-lora adapter lora --model embedded
    """
    from dataclasses import asdict

    from loki.cli.show import notes, print_json
    from loki.implanting.export_lora import export_lora as run_export
    from loki.results import Result

    export = run_export(adapter, output, model=model)
    if as_json:
        print_json(Result("export-lora", {"adapter": str(adapter), "model": model}, asdict(export), model=model))
    notes.print(
        f"wrote {output}: LoRA of rank {export.rank} on {export.num_modules} modules, "
        f"{export.num_parameters:,} weights, {export.num_bytes / 1e6:,.1f} MB"
    )
