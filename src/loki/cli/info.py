"""`loki info`: what LoKI would cost for a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loki.cli.options import DeviceOption, DtypeOption, JsonOption, TrustOption
from loki.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from loki.model_costs import TrainingCost

COUNTS = ((1, ""), (10**3, "k"), (10**6, "M"), (10**9, "B"), (10**12, "T"))
BYTES = ((1, "bytes"), (10**3, "kB"), (10**6, "MB"), (10**9, "GB"), (10**12, "TB"))
TIMES = ((1, "s"), (60, "min"), (3600, "h"), (24 * 3600, "days"))


def info(
    model: Annotated[
        str,
        typer.Argument(help="Hugging Face model folder, its config.json alone, a GGUF file, Hub id, or `embedded`."),
    ],
    quota: Annotated[
        list[str] | None,
        typer.Option(help="Percent of rows to train, as often as wanted; 5, 10, 20 and 30 when left out."),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of LoKI*; 0 leaves it out.")] = 32,
    num_prompts: Annotated[int, typer.Option(help="Prompts of the analysis; MMLU has 14,042.")] = 14042,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Tell a model's layers and rows, what training each quota takes, and about how long an analysis would.

    No weights are loaded. Dtype and device are those of the analysis.

    Example: loki info embedded
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape

    from loki.cli.show import print_json
    from loki.model_costs import (
        NUM_TOKENS,
        analysis_operations,
        measure_speed,
        model_size,
        read_config,
        training_cost,
    )
    from loki.models import model_label, resolve_device, resolve_dtype
    from loki.results import Result

    if Path(model).suffix == ".h5" and Path(model).is_file():
        raise InputError(f"{model} is an attribution log, not a model: draw it with `loki report {model}`")
    if num_prompts < 1:
        raise InputError(f"num-prompts {num_prompts} is not possible: give 1 or more")
    place = resolve_device(device)
    dtype_there = resolve_dtype(dtype, place)
    size = model_size(read_config(model, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code)
    quotas = quota or ["5", "10", "20", "30"]
    costs = [training_cost(size, text, r) for r in ([0, rank] if rank else [0]) for text in quotas]
    operations = analysis_operations(size)
    speed = measure_speed(size, place, dtype_there)
    seconds = num_prompts * operations / speed
    shape = size.shape
    compute_dtype = str(dtype_there).removeprefix("torch.")
    if as_json:
        settings = {"quotas": quotas, "rank": rank, "num_prompts": num_prompts, "dtype": dtype, "device": device}
        figures = {
            "family": shape.model_type,
            "num_layers": shape.num_layers,
            "num_rows": shape.num_rows,
            "num_columns": shape.num_columns,
            "num_weights": size.num_weights,
            "dtype": size.dtype,
            "training": [asdict(cost) for cost in costs],
            "analysis_estimate": {
                "num_tokens_per_prompt": NUM_TOKENS,
                "operations_per_prompt": operations,
                "operations_per_second": speed,
                "dtype": compute_dtype,
                "device": str(place),
                "seconds": seconds,
            },
        }
        print_json(Result("info", settings, figures, model=model_label(model)))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n[bold]{escape(model_label(model))}[/bold]")
    facts = (
        f"{shape.num_layers} layers",
        f"{shape.num_rows:,} rows × {shape.num_columns:,} columns",
        f"{_scaled(size.num_weights, COUNTS)} weights",
    )
    console.print(" · ".join([shape.model_type, *facts, *([size.dtype] if size.dtype else [])]))
    console.print(_table(costs))
    console.print(
        "AdamW: trainable weights, their gradients and two moments, all float32; "
        "the frozen model and activations come on top."
    )
    console.print(
        f"Analysis of {num_prompts:,} prompts: [bold]an estimated {_scaled(max(seconds, 1), TIMES, digits=2)}[/bold] "
        f"here, if all ran at the {speed / 1e9:,.0f} GFLOPS of matrix products ({compute_dtype} on {place});\n"
        "`loki analyse MODEL --dry-run` times real prompts."
    )


def _table(costs: Sequence[TrainingCost]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(header_style="bold", box=SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("quota", "rows a layer", "trained", "share", "adapter", "AdamW"):
        table.add_column(column, justify="right", no_wrap=True)
    for index, cost in enumerate(costs):
        is_first = index == 0 or costs[index - 1].rank != cost.rank
        if is_first and index:
            table.add_section()
        method = f"LoKI*, rank {cost.rank}" if cost.rank else "LoKI"
        table.add_row(
            method if is_first else "",
            f"{cost.quota_percent} %",
            f"{cost.rows_per_layer:,}",
            _scaled(cost.num_trainable, COUNTS),
            f"{cost.trainable_percent:.2f} %",
            _scaled(cost.adapter_bytes, BYTES),
            _scaled(cost.optimiser_bytes, BYTES),
        )
    return table


def _scaled(number: float, units: Sequence[tuple[int, str]], *, digits: int = 3) -> str:
    """The number in the largest unit of which there is one or more, as `5.14 M`; the least unit has no fractions."""
    for size, unit in reversed(units):
        rounded = float(f"{number / size:.{digits}g}")
        if rounded >= 1 or size == 1:
            places = max(0, digits - len(str(int(rounded)))) if size > 1 else 0
            return f"{rounded:,.{places}f} {unit}".rstrip()
    raise AssertionError("the least unit is 1")
