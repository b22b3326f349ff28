"""`loki train`: stage 3."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.choices import DtypeName, ModuleName
from loki.training.settings import AnswersName, ReporterName


def train(
    config: Annotated[
        Path | None,
        typer.Argument(help="YAML of settings, named as the options with underscores; options come before it."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face model folder, Hub id, or `embedded`.")] = None,
    positions: Annotated[
        list[Path] | None,
        typer.Option(
            help="Positions file that `loki select-nodes` wrote, of the down-projections or of attention's output "
            "projections; give both, one after the other, to train the rows of both."
        ),
    ] = None,
    site_module: Annotated[
        ModuleName | None,
        typer.Option(
            help="Whose rows a positions file names whose provenance does not say so; down_proj when left out."
        ),
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for the adapter; it must not exist yet.")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate of AdamW, with a cosine schedule, at a quota of 10 %; for another quota q "
            "it is multiplied by (10 / q)^0.83."
        ),
    ] = None,
    scale_learning_rate: Annotated[
        bool | None,
        typer.Option(
            "--scale-learning-rate/--no-scale-learning-rate",
            help="Whether the learning rate is scaled by the quota; it is unless told otherwise.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="In place of steps: passes over the examples, such as 1 or 2.5.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="JSON Lines with prompt/completion, messages or instruction/input/output, or `function-calls` "
            "(built in, and what is used when left out)."
        ),
    ] = None,
    examples: Annotated[int | None, typer.Option(help="Use this many examples.")] = None,
    answers: Annotated[
        AnswersName | None,
        typer.Option(
            help="Which of the assistant's turns in messages are learned; auto (when left out): all if the chat "
            "template can tell them apart, else the last."
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per device and step; 4 when left out.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches per optimiser step; 1 when left out.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of rising learning rate; none when left out.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Decay of the change towards zero.")] = None,
    rank: Annotated[
        int | None, typer.Option(help="Train a change of this rank (LoKI*); the rows themselves when left out.")
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Scale of that change; twice the rank when left out.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Cut longer examples, in tokens; 2048 when left out.")] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Put several examples into one sequence.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; 50 when left out.")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory, more time."),
    ] = None,
    mixed_precision: Annotated[
        bool | None,
        typer.Option(
            "--mixed-precision/--no-mixed-precision",
            help="Products in bfloat16, of a float32 model; what is trained stays float32.",
        ),
    ] = None,
    preserve: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Keep the base's predictions on these texts while training: JSON Lines with `text`, a text file, or "
            "`probe`.",
        ),
    ] = None,
    preserve_weight: Annotated[
        float | None, typer.Option(help="Weight of the KL divergence from the base on them; 1 when left out.")
    ] = None,
    row_rates: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Scale each row's steps by the inverse root of its damage, from this log of `loki analyse --score "
            "damage`.",
        ),
    ] = None,
    report_to: Annotated[
        ReporterName | None, typer.Option(help="Also write the figures to `tensorboard` in the adapter's folder.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything drawn at random; 0 when left out.")] = None,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="`auto` (when left out) is float32 on a CPU and bfloat16 elsewhere.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu, cuda or cuda:1; the best there is when left out.")
    ] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run code from the model's folder.")
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict", help="Refuse files made with other weights or dtype.")
    ] = None,
) -> None:
    """Train the selected rows on a task, with TRL's SFTTrainer; the rest of the model stays frozen.

    An interrupted training goes on from its last checkpoint when the same command is given again. A forgetting budget
    is a section of the settings file: `budget: {text: probe, max_loss_rise: 0.05, every: 20, action: stop}`; so are
    all settings of what is preserved: `preserve: {text: own.jsonl, weight: 1, every: 2, batch_size: 4}`. Several
    processes share each step under `accelerate launch -m loki train …` or `torchrun -m loki train …`.

    Example: loki train --model embedded --positions 10.json --examples 600 --learning-rate 0.002 --steps 150
    --output-dir adapter
    """
    options = {**locals(), "positions": positions or None}
    del options["config"]
    _run(config, options)


def _run(path: Path | None, options: dict[str, object]) -> None:
    from loki.cli.show import notes, track
    from loki.models import launched_dtype, load_model, load_tokenizer
    from loki.provenance import require_new_directory
    from loki.rows import load_by_module
    from loki.selection.run import check_model
    from loki.training.config import load_train_config
    from loki.training.examples import load_examples
    from loki.training.processes import is_first_process, process_device
    from loki.training.row_rates import RowRates
    from loki.training.sft import train as run_training

    config = load_train_config(path, options)
    settings = config.settings()
    selections = load_by_module(config.positions, config.site_module)
    rows = load_examples(config.data, count=config.examples, seed=config.seed)
    budget = config.budget.budget() if config.budget else None
    preserve = config.preserve.preserve() if config.preserve else None
    row_rates = RowRates(config.row_rates) if config.row_rates else None
    is_first = is_first_process()
    if is_first:
        require_new_directory(config.output_dir)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    if preserve is not None:
        preserve.read_with(tokenizer)
        if settings.steps is not None:
            preserve.require_pass_within(settings.steps)
    base = load_model(
        config.model,
        dtype=launched_dtype(config.dtype),
        device=config.device or process_device(),
        trust_remote_code=config.trust_remote_code,
    )
    for path in config.positions:
        check_model(path, base, strict=config.strict)
    record = run_training(
        *(base, tokenizer, selections, rows, settings, config.output_dir),
        budget=budget,
        preserve=preserve,
        row_rates=row_rates,
        track=track,
    )
    if not is_first:
        return
    notes.print(
        f"wrote {config.output_dir}: {record['num_trainable']:,} weights trained, "
        f"mean loss {record['train_loss']:.3f}, learning rate {record['learning_rate']:.3g}"
        + (
            f" ({settings.learning_rate:.3g} scaled to a quota of {record['quota_percent']} %)"
            if record["learning_rate"] != settings.learning_rate
            else ""
        )
    )
    if preserve is not None and (kept := record["preserve"])["kl_last"] is not None:
        seconds = kept["seconds_per_step"]
        cost = f"; {seconds:.2f} s a step, {kept['seconds_per_step_without']:.2f} s without" if seconds else ""
        notes.print(f"preserved texts: KL from the base {kept['kl_last']:.4f} nats per token at the last pass{cost}")
