"""`loki select-nodes`: stage 2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from loki.choices import StrategyName
from loki.cli.options import JsonOption, SeedOption

DEFAULT_QUOTA = "10"


def select_nodes(
    hdf5_path: Annotated[
        Path | None, typer.Option(help="Attribution log that `loki analyse` wrote; random rows need none.")
    ] = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(help="Percent of rows to select, above 0 and up to 100; may be repeated. Default: 10."),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Where rows compete, and which end of which score is taken: {', '.join(get_args(StrategyName))}; "
            "may be repeated. Default: layer_balanced.",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for the positions files; kva_result/pos_json/<model> when left out.")
    ] = None,
    output_name: Annotated[str | None, typer.Option(help="The file's name; 10.json for a quota of 10.")] = None,
    layers: Annotated[str | None, typer.Option(help="Select from these layers only, such as 8-29 or 0,5,8-29.")] = None,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="Leave the rows of this positions file alone; may be repeated.")
    ] = None,
    stability: Annotated[
        bool, typer.Option("--stability", help="Say how much of the selection other prompts would choose again.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Check that the log is of this model.")] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Select rows by an attribution log, of low contribution and in equal number in every layer unless told otherwise.

    Example: loki select-nodes --hdf5-path kva.h5 --quota 10 --output-dir .
    """
    from loki.architecture import shape_of_config
    from loki.cli.kept_memory import keep_freed_memory
    from loki.cli.show import notes, print_json
    from loki.errors import InputError
    from loki.models import load_config
    from loki.results import Result
    from loki.selection.run import (
        Constraints,
        Request,
        default_positions_dir,
        default_positions_name,
        select_to_files,
    )
    from loki.selection.stability import RESAMPLES
    from loki.selection.strategies import parse_strategy

    keep_freed_memory()
    strategies = [parse_strategy(name) for name in strategy or ["layer_balanced"]]
    wanted = [(name, percent) for name in strategies for percent in quota or [DEFAULT_QUOTA]]
    if output_name is not None and len(wanted) > 1:
        raise InputError(f"--output-name {output_name} is one name for {len(wanted)} selections: leave it out")
    if output_dir is None:
        if hdf5_path is None:
            raise InputError("no --hdf5-path: name the log, or for random rows give --model and --output-dir instead")
        output_dir = default_positions_dir(hdf5_path)
    shape = shape_of_config(load_config(model)) if model is not None else None
    requests = [
        Request(output_dir / (output_name or default_positions_name(name, percent)), percent, name)
        for name, percent in wanted
    ]
    constraints = Constraints(layers, exclude or (), seed, RESAMPLES if stability else 0)
    made = select_to_files(hdf5_path, requests, constraints, shape=shape)
    figures = []
    for selected in made:
        rows, votes = selected.selection.rows, selected.selection.votes
        figures.append(
            {
                "positions": str(selected.request.output),
                "strategy": selected.request.strategy,
                "quota": selected.request.quota,
                "num_selected_rows": rows.num_selected,
                "num_layers": sum(map(bool, rows.rows)),
                "num_prompts": None if votes is None else votes.num_prompts,
                "stability": None if selected.stability is None else selected.stability.mean,
            }
        )
        again = "" if selected.stability is None else f"; stability {selected.stability.mean:.3f}"
        num_layers = figures[-1]["num_layers"]
        notes.print(
            f"wrote {selected.request.output}: {rows.num_selected:,} rows in {num_layers} layers{again}", markup=False
        )
    if as_json:
        settings = {
            "log": None if hdf5_path is None else str(hdf5_path),
            "layers": layers,
            "exclude": [str(path) for path in exclude or ()],
        }
        print_json(Result("select", settings, {"selections": figures}, seed=seed))
