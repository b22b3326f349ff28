"""`loki merge`: an adapter into an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.choices import DtypeName
from loki.cli.options import JsonOption, ModelOption


def merge(
    model: ModelOption,
    adapter: Annotated[Path, typer.Option(help="Adapter folder that `loki train` wrote.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the checkpoint; it must not exist yet.")],
    dtype: Annotated[DtypeName, typer.Option(help="Dtype to store; `auto` keeps the model's own.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter into an ordinary checkpoint that plain `transformers` loads.

    Example: loki merge --model embedded --adapter adapter --output-dir merged
    """
    from dataclasses import asdict

    from loki.cli.show import notes, print_json
    from loki.implanting.merge import merge as run_merge
    from loki.models import resolve_dtype
    from loki.results import Result

    report = run_merge(model, adapter, output_dir, dtype=None if dtype == "auto" else resolve_dtype(dtype))
    if as_json:
        settings = {"model": model, "adapter": str(adapter), "dtype": dtype}
        print_json(Result("merge", settings, asdict(report), model=model))
    notes.print(
        f"wrote {output_dir}: {report.num_changed:,} of {report.num_parameters:,} weights changed, "
        f"{report.lost_percent:.2g} % of the change lost in rounding"
    )
