"""`loki suppress`: a model without its selected rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.choices import ModuleName
from loki.cli.options import JsonOption, ModelOption, TrustOption


def suppress(
    model: ModelOption,
    positions: Annotated[Path, typer.Option(help="Positions file: the rows to set to zero.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the checkpoint; it must not exist yet.")],
    site_module: Annotated[
        ModuleName | None,
        typer.Option(help="Whose rows a positions file names whose provenance does not say so; down_proj if left out."),
    ] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Set selected rows, and their biases, to zero: what a model loses by that shows what they hold.

    Example: loki suppress --model embedded --positions layer_highest_1.json --output-dir suppressed
    """
    from dataclasses import asdict

    from loki.cli.show import notes, print_json, track
    from loki.implanting.suppress import suppress as run_suppress
    from loki.results import Result
    from loki.rows import module_of

    module = module_of(positions, site_module)
    report = run_suppress(model, positions, output_dir, module=module, trust_remote_code=trust_remote_code, track=track)
    if as_json:
        settings = {"model": model, "positions": str(positions), "site_module": module}
        print_json(Result("suppress", settings, asdict(report), model=model))
    notes.print(
        f"wrote {output_dir}: {report.num_suppressed_rows:,} rows set to zero, "
        f"{report.num_changed:,} of {report.num_parameters:,} weights"
    )
