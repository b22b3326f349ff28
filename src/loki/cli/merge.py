"""`loki merge`: adapters into an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.choices import DtypeName
from loki.cli.options import JsonOption, ModelOption


def merge(
    model: ModelOption,
    adapter: Annotated[
        list[Path],
        typer.Option(help="Adapter folder that `loki train` wrote; may be repeated where adapters share no rows."),
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder for the checkpoint; it must not exist yet.")],
    dtype: Annotated[DtypeName, typer.Option(help="Dtype to store; `auto` keeps the model's own.")] = "auto",
    kl: Annotated[
        str | None,
        typer.Option(
            help="Text file on which predictions before and after merging are compared, or `probe` for built-in "
            "questions. Loads both models, one after the other.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Merge adapters into an ordinary checkpoint that plain `transformers` loads.

    Example: loki merge --model embedded --adapter adapter --output-dir merged
    """
    from dataclasses import asdict

    from loki.cli.show import notes, print_json, track
    from loki.errors import InputError
    from loki.implanting.divergence import divergence_tokens, kl_to_adapter
    from loki.implanting.merge import merge as run_merge
    from loki.models import resolve_dtype
    from loki.results import Result

    if kl is not None and len(adapter) > 1:
        raise InputError(f"--kl {kl} compares with one adapter, not {len(adapter)}: leave it out, or merge one by one")
    input_ids = None if kl is None else divergence_tokens(kl, model)
    chosen = None if dtype == "auto" else resolve_dtype(dtype)
    report = run_merge(model, adapter, output_dir, dtype=chosen, track=track)
    divergence = None if input_ids is None else kl_to_adapter(model, adapter[0], output_dir, input_ids)
    if as_json:
        settings = {"model": model, "adapters": [str(path) for path in adapter], "dtype": dtype, "kl": kl}
        figures = {**asdict(report), **({} if divergence is None else asdict(divergence))}
        print_json(Result("merge", settings, figures, model=model))
    notes.print(
        f"wrote {output_dir}: {report.num_changed:,} of {report.num_parameters:,} weights changed, "
        f"{report.lost_percent:.2g} % of the change lost in rounding"
    )
    if divergence is not None:
        notes.print(
            f"KL divergence between adapter and merged model: {divergence.kl_nats_per_token:.2g} nats per token "
            f"over {divergence.num_tokens} tokens"
        )
