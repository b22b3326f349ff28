"""`loki create-model`: an ordinary model as a LoKI model, for trainers that know nothing of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.choices import DtypeName
from loki.cli.options import JsonOption, TrustOption


def create_model(
    model_name: Annotated[str, typer.Option(help="Hugging Face model folder, Hub id, or `embedded`.")],
    target_pos_path: Annotated[Path, typer.Option(help="Positions file: the rows to train, a list for each layer.")],
    save_dir: Annotated[Path, typer.Option(help="Folder for the LoKI model; it must not exist yet.")],
    torch_dtype: Annotated[DtypeName, typer.Option(help="Dtype to store; `auto` keeps the model's own.")] = "auto",
    model_type: Annotated[
        str | None, typer.Option(help="Checked against the model's config, which says it anyway.")
    ] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Split a model's down-projections into trainable and frozen rows, for any trainer of Hugging Face models.

    The trainer loads the folder with `trust_remote_code=True` and trains it in full: only the selected rows require
    gradients. `loki restore-model` makes an ordinary model of it afterwards.

    Example: loki create-model --model-name embedded --target-pos-path 10.json --save-dir loki-model
    """
    from dataclasses import asdict

    from loki.cli.show import notes, print_json, track
    from loki.implanting.convert import create_loki_model
    from loki.results import Result

    report = create_loki_model(
        model_name=model_name,
        target_pos_path=target_pos_path,
        save_dir=save_dir,
        torch_dtype=torch_dtype,
        trust_remote_code=trust_remote_code,
        model_type=model_type,
        track=track,
    )
    if as_json:
        settings = {"model": model_name, "positions": str(target_pos_path), "dtype": torch_dtype}
        print_json(Result("create-model", settings, asdict(report), model=model_name))
    notes.print(
        f"wrote {save_dir}: {report.num_trainable:,} of {report.num_parameters:,} weights are trainable; "
        "load it with trust_remote_code=True"
    )
