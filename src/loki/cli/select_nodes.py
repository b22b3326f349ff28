"""`loki select-nodes`: stage 2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.choices import StrategyName
from loki.cli.options import JsonOption


def select_nodes(
    hdf5_path: Annotated[Path, typer.Option(help="Attribution log that `loki analyse` wrote.")],
    quota: Annotated[str, typer.Option(help="Percent of rows to select, above 0 and up to 100.")] = "10",
    strategy: Annotated[
        StrategyName, typer.Option(help="Where rows compete, and which end is taken.")
    ] = "layer_balanced",
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for the positions file; kva_result/pos_json/<model> when left out.")
    ] = None,
    output_name: Annotated[str | None, typer.Option(help="Its name; 10.json for a quota of 10.")] = None,
    model: Annotated[str | None, typer.Option(help="Check that the log is of this model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Select rows of low contribution, in equal number in every layer.

    Example: loki select-nodes --hdf5-path kva.h5 --quota 10 --output-dir .
    """
    from loki.architecture import shape_of_config
    from loki.cli.show import notes, print_json
    from loki.models import load_config
    from loki.results import Result
    from loki.selection.run import default_positions_dir, default_positions_name, select_to_file

    name = output_name or default_positions_name(strategy, quota)
    shape = shape_of_config(load_config(model)) if model is not None else None
    output = (output_dir or default_positions_dir(hdf5_path)) / name
    selection = select_to_file(hdf5_path, output, quota=quota, strategy=strategy, shape=shape)
    figures = {
        "positions": str(output),
        "num_selected_rows": selection.rows.num_selected,
        "num_layers": selection.rows.num_layers,
        "num_prompts": selection.votes.num_prompts,
    }
    if as_json:
        settings = {"log": str(hdf5_path), "quota": quota, "strategy": strategy}
        print_json(Result("select", settings, figures))
    notes.print(f"wrote {output}: {selection.rows.num_selected:,} rows in {selection.rows.num_layers} layers")
