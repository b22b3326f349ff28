"""`loki uninstall`: an adapter's rows of a merged model become the base's again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.choices import ModuleName
from loki.cli.options import JsonOption


def uninstall(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder that was merged, or a positions file: whose rows.")],
    model: Annotated[str, typer.Option(help="The merged model: folder or Hub id.")],
    base: Annotated[str, typer.Option(help="The model before merging: folder, Hub id, or `embedded`.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the checkpoint; it must not exist yet.")],
    site_module: Annotated[
        ModuleName | None,
        typer.Option(help="Whose rows a positions file names: the feed-forward block's (default) or attention's."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse rows that are not the base's plus the adapter's change.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Put the rows of a merged adapter back to the base's, bit for bit; all other rows stay as they are.

    Example: loki uninstall adapter --model merged --base embedded --output-dir without
    """
    from dataclasses import asdict

    from loki.cli.show import notes, print_json, track
    from loki.implanting.uninstall import uninstall as run_uninstall
    from loki.results import Result

    report = run_uninstall(adapter, model, base, output_dir, module=site_module, strict=strict, track=track)
    if as_json:
        settings = {
            "adapter": str(adapter),
            "model": model,
            "base": base,
            "site_module": site_module,
            "strict": strict,
        }
        print_json(Result("uninstall", settings, asdict(report), model=model))
    notes.print(
        f"wrote {output_dir}: {report.num_rows:,} rows are the base's again, "
        f"{report.num_changed:,} of {report.num_parameters:,} weights changed"
    )
