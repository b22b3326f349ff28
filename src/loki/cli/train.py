"""`loki train`: stage 3."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.cli.options import DeviceOption, DtypeOption, ModelOption, SeedOption, StrictOption, TrustOption


def train(
    model: ModelOption,
    positions: Annotated[Path, typer.Option(help="Positions file that `loki select-nodes` wrote.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the adapter; it must not exist yet.")],
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW with a cosine schedule.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")],
    data: Annotated[
        str, typer.Option(help="JSON Lines with prompt/completion or messages, or `function-calls` (built in).")
    ] = "function-calls",
    examples: Annotated[int | None, typer.Option(help="Use this many examples.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per device and step.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches per optimiser step.")] = 1,
    warmup_steps: Annotated[int, typer.Option(help="Steps of rising learning rate.")] = 0,
    weight_decay: Annotated[float, typer.Option(help="Decay of the change towards zero.")] = 0.0,
    max_length: Annotated[int, typer.Option(help="Cut longer examples, in tokens.")] = 2048,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    strict: StrictOption = False,
) -> None:
    """Train the selected rows on a task, with TRL's SFTTrainer; the rest of the model stays frozen.

    An interrupted training goes on from its last checkpoint when the same command is given again.

    Example: loki train --model embedded --positions 10.json --examples 600 --learning-rate 0.002 --steps 150
    --output-dir adapter
    """
    from loki.cli.show import notes, track
    from loki.models import load_model, load_tokenizer
    from loki.provenance import require_new_directory
    from loki.rows import RowSelection
    from loki.selection.run import check_model
    from loki.training.examples import load_examples
    from loki.training.settings import TrainSettings
    from loki.training.sft import train as run_training

    settings = TrainSettings(
        learning_rate=learning_rate,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        max_length=max_length,
        save_every=save_every,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    selection = RowSelection.load(positions)
    rows = load_examples(data, count=examples, seed=seed)
    require_new_directory(output_dir)
    base = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    check_model(positions, base, strict=strict)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    record = run_training(base, tokenizer, selection, rows, settings, output_dir, track=track)
    notes.print(
        f"wrote {output_dir}: {record['num_trainable']:,} weights trained, mean loss {record['train_loss']:.3f}"
    )
