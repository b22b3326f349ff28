"""`loki restore-model`: a trained LoKI model as an ordinary one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.choices import DtypeName
from loki.cli.options import JsonOption


def restore_model(
    model_path: Annotated[str, typer.Option(help="LoKI model that was trained: folder or Hub id.")],
    target_pos_path: Annotated[Path, typer.Option(help="Positions file that it was made with.")],
    output_path: Annotated[Path, typer.Option(help="Folder for the ordinary model; it must not exist yet.")],
    model_name: Annotated[str, typer.Option(help="Model that it was made from: folder, Hub id, or `embedded`.")],
    torch_dtype: Annotated[DtypeName, typer.Option(help="Dtype to store; `auto` keeps the base's own.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Put the rows of a trained LoKI model back: an ordinary checkpoint that plain `transformers` loads.

    Example: loki restore-model --model-path trained --target-pos-path 10.json --output-path out --model-name embedded
    """
    from dataclasses import asdict

    from loki.cli.show import notes, print_json, track
    from loki.implanting.restore import restore_loki_model
    from loki.results import Result

    report = restore_loki_model(target_pos_path, model_path, model_name, output_path, torch_dtype, track=track)
    if as_json:
        settings = {"model_path": model_path, "positions": str(target_pos_path), "dtype": torch_dtype}
        print_json(Result("restore-model", settings, asdict(report), model=model_name))
    notes.print(
        f"wrote {output_path}: {report.num_changed:,} of {report.num_parameters:,} weights changed in the selected rows"
    )
