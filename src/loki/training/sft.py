"""Supervised fine-tuning of the selected rows with TRL's SFTTrainer, resumable."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loki.architecture import shape_of
from loki.choices import ModuleName
from loki.errors import ArtefactError, InputError
from loki.implanting.tuner.targets import config_of_blocks
from loki.progress import Track, silent
from loki.provenance import (
    digest,
    fingerprint_model,
    new_directory,
    read_json,
    require_new_directory,
    write_json,
)
from loki.rows import RowSelection
from loki.selection.quota import format_quota
from loki.training.checkpoints import STATE_FILE, checkpoints_below, last_whole_checkpoint, open_unfinished
from loki.training.encoding import EncodedExamples, encode_examples
from loki.training.learning_rate import learning_rate_at, selected_quota
from loki.training.packing import require_kept_apart
from loki.training.settings import TrainSettings

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState
    from trl import SFTConfig

    from loki.training.budget import ForgettingBudget
    from loki.training.preserve import PreservePredictions
    from loki.training.row_rates import RowRates
    from loki.training.trainer import CompletionTrainer

LENGTH_STEP = 32
"""Lengths of batches are multiples of it where a matrix product is compiled for every shape it meets."""
RECORD = "loki_training.json"
"""In the adapter's folder: what the adapter was trained with, and the training log."""
UNFINISHED, TENSORBOARD_DIR = ".unfinished", "tensorboard"


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    selection: RowSelection | Mapping[ModuleName, RowSelection],
    examples: Sequence[Mapping[str, Any]],
    settings: TrainSettings,
    output: Path,
    *,
    budget: ForgettingBudget | None = None,
    preserve: PreservePredictions | None = None,
    row_rates: RowRates | None = None,
    track: Track = silent,
) -> dict[str, Any]:
    """Train the selected rows of `model` on examples (see `loki.training.examples`) and save the adapter in `output`.

    `selection` has rows of the down-projections, or is a mapping from each projection to its rows.

    Returns the record that is saved beside it: settings, model fingerprint, trainable weights, the learning rate that
    the quota leads to, and the log, one row of `step`, `loss` and `learning_rate` for every `log_every` steps; with a
    `budget` or `preserve` also its settings and history, with `row_rates` a digest of its scores. `model` is wrapped
    in place. Under `accelerate launch` or `torchrun` every process calls this, and the first one writes.

    Raises:
        InputError: examples that cannot be encoded, a model that cannot keep packed ones apart or is not float32 where
            that is needed, texts to preserve that are too short, or no tensorboard.
        ArtefactError: positions of another model, or an unfinished training of other settings in the way.
        OutputError: `output` cannot be written.
    """
    import torch
    from transformers import TrainerState

    from loki.training.callbacks import ShowProgress

    shape = shape_of(model)
    if settings.mixed_precision and model.dtype != torch.float32:
        raise InputError(
            f"mixed precision needs a float32 model, and this one is {str(model.dtype).removeprefix('torch.')}: "
            "load it as float32, or leave mixed precision out"
        )
    if preserve is not None:
        preserve.read_with(tokenizer)
        if settings.steps is not None:
            preserve.require_pass_within(settings.steps)
    selections: Mapping[ModuleName, RowSelection] = (
        {"down_proj": selection} if isinstance(selection, RowSelection) else selection
    )
    for module, rows in selections.items():
        rows.require_fit(num_layers=shape.num_layers, num_rows=shape.num_rows, what=f"positions of {module}")
    quota = selected_quota(selections.values(), shape.num_rows)
    peak = learning_rate_at(quota, settings.learning_rate) if settings.scale_learning_rate else settings.learning_rate
    encoded = encode_examples(tokenizer, examples, answers=settings.answers, max_length=settings.max_length)
    if settings.packing:
        require_kept_apart(model)
    summary_writer = _summary_writer() if settings.report_to == "tensorboard" else None
    unfinished = output.with_name(output.name + UNFINISHED)
    args = trainer_arguments(settings, unfinished, peak, model)
    fingerprint = fingerprint_model(model)
    if row_rates is not None:
        row_rates.require_made_with(fingerprint)
    identity = {
        "model": fingerprint.as_dict(),
        "positions": digest({module: rows.as_lists() for module, rows in selections.items()}),
        "examples": digest([dict(example) for example in examples]),
        "settings": asdict(settings),
        **({} if budget is None else {"budget": budget.as_dict()}),
        **({} if preserve is None else {"preserve": preserve.as_dict()}),
        **({} if row_rates is None else {"row_rates": row_rates.as_dict()}),
    }
    with args.main_process_first(local=False):
        if args.process_index == 0:
            require_new_directory(output)
            open_unfinished(unfinished, identity)
        checkpoint = last_whole_checkpoint(unfinished, remove_torn=args.process_index == 0)
    shown = ShowProgress(track if args.process_index == 0 else silent)
    trainer = make_trainer(
        model,
        tokenizer,
        encoded,
        args,
        peft_config=config_of_blocks(
            model, selections, r=settings.rank, lora_alpha=settings.lora_alpha, task_type="CAUSAL_LM"
        ),
        callbacks=[callback for callback in (preserve, row_rates, budget, shown) if callback is not None],
    )
    stopped = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    num_done = 0 if stopped is None else stopped.global_step
    if summary_writer is not None and args.process_index == 0:
        from transformers.integrations import TensorBoardCallback

        # What comes after the checkpoint is written again, without one also the measurement before the first step;
        # readers pass over what stands there already.
        purge_step = 0 if stopped is None else num_done + 1
        writer = summary_writer(log_dir=str(unfinished / TENSORBOARD_DIR), purge_step=purge_step)
        trainer.add_callback(TensorBoardCallback(writer))
        for reporting in (budget, preserve):
            if reporting is not None:
                reporting.report_through(trainer)
    with checkpoints_below(unfinished):
        if checkpoint is not None and stopped is not None and _is_over(stopped, budget):
            # It was killed before the adapter was saved; the Trainer would take one more step.
            _load_adapter(trainer.model, checkpoint)
            log_history, num_steps = stopped.log_history, num_done
            if budget is not None:
                budget.history = budget.rows_of(log_history)
            if preserve is not None:
                preserve.history = preserve.rows_of(log_history)
            train_loss = _mean_loss(log_history)
        else:
            ended = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            log_history, num_steps = trainer.state.log_history, ended.global_step
            train_loss = ended.training_loss
            if stopped is not None:
                # The Trainer knows the mean of the steps that it took itself.
                done = _mean_loss(stopped.log_history)
                train_loss = (done * num_done + train_loss * (num_steps - num_done)) / num_steps
    record = {
        **identity,
        "num_trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "num_steps": num_steps,
        "num_examples": len(examples),
        "num_examples_cut": encoded.num_cut,
        "num_examples_left_out": encoded.num_left_out,
        "answers": encoded.answers,
        "num_processes": args.world_size,
        "quota_percent": format_quota(quota),
        "learning_rate": peak,
        "train_loss": train_loss,
        "log": [{key: row[key] for key in ("step", "loss", "learning_rate")} for row in log_history if "loss" in row],
    }
    if budget is not None:
        record["budget"] = {
            **budget.as_dict(),
            "spent": any(budget.spent(row) for row in budget.history),
            "history": [{name: v if math.isfinite(v) else None for name, v in row.items()} for row in budget.history],
        }
    if preserve is not None:
        record["preserve"] = preserve.record()
    if args.process_index == 0:
        with new_directory(output) as directory:
            trainer.model.save_pretrained(directory)
            # PEFT writes a template full of blanks there.
            (directory / "README.md").unlink(missing_ok=True)
            if (unfinished / TENSORBOARD_DIR).is_dir():
                shutil.copytree(unfinished / TENSORBOARD_DIR, directory / TENSORBOARD_DIR)
            write_json(directory / RECORD, record)
        shutil.rmtree(unfinished)
    trainer.accelerator.wait_for_everyone()
    return record


def _is_over(state: TrainerState, budget: ForgettingBudget | None) -> bool:
    """Whether a training in this state took its last step, or was ended by its budget."""
    return state.global_step >= state.max_steps or (budget is not None and budget.has_stopped(state.log_history))


def _mean_loss(log_history: Sequence[Mapping[str, Any]]) -> float:
    """Mean over the steps up to the last that was logged; each row has the mean since the one before."""
    total, last = 0.0, 0
    for row in log_history:
        if "loss" in row:
            total += row["loss"] * (row["step"] - last)
            last = row["step"]
    return total / max(1, last)


def trainer_arguments(settings: TrainSettings, folder: Path, peak: float, model: PreTrainedModel) -> SFTConfig:
    """The Trainer's arguments for settings, a peak learning rate and a model; it keeps its checkpoints in `folder`."""
    from trl import SFTConfig

    on_cpu = model.device.type == "cpu"
    return SFTConfig(
        output_dir=str(folder),
        # A negative number leaves it to the epochs.
        max_steps=-1 if settings.steps is None else settings.steps,
        num_train_epochs=settings.epochs or 1.0,
        learning_rate=peak,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        gradient_checkpointing=settings.gradient_checkpointing,
        packing=settings.packing,
        # Examples are cut before; packs take their length from here.
        max_length=settings.max_length if settings.packing else None,
        pad_to_multiple_of=_length_step(settings, model) if on_cpu else None,
        logging_steps=settings.log_every,
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=settings.seed,
        data_seed=settings.seed,
        # The base stays in the dtype it was loaded in and the change in float32: no autocast on top unless asked for.
        bf16=settings.mixed_precision,
        fp16=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        report_to="none",
        disable_tqdm=True,
    )


def _length_step(settings: TrainSettings, model: PreTrainedModel) -> int | None:
    """What lengths of batches on a CPU are multiples of; None leaves them as they come.

    In reduced precision oneDNN compiles a kernel of some megabyte for each shape of a product, and keeps a thousand.
    """
    is_reduced = settings.mixed_precision or model.dtype.itemsize < 4
    longest = getattr(model.config, "max_position_embeddings", None) or 0
    return LENGTH_STEP if is_reduced and longest % LENGTH_STEP == 0 else None


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: EncodedExamples,
    args: SFTConfig,
    *,
    peft_config: PeftConfig | None,
    callbacks: Sequence[TrainerCallback] = (),
) -> CompletionTrainer:
    """A trainer of `model` on encoded examples, with the adapter of any PEFT method, or as a whole with None."""
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback

    from loki.training.trainer import CompletionTrainer

    trainer = CompletionTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": encoded.input_ids, "labels": encoded.labels}),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("tensorboard is not installed: pip install tensorboard, or leave report_to out") from error
    return SummaryWriter


def _load_adapter(model: PeftModel, checkpoint: Path) -> None:
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))


def load_record(adapter: Path) -> dict[str, Any] | None:
    """What an adapter was trained with, or None where that is not known."""
    path = adapter / RECORD
    if not path.exists():
        return None
    record = read_json(path, what="training record")
    if not isinstance(record, dict):
        raise ArtefactError(f"training record {path} must be a JSON object: train again")
    return record
