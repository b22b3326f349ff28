"""Supervised fine-tuning of the selected rows with TRL's SFTTrainer, resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from loki.architecture import shape_of
from loki.errors import ArtefactError, OutputError
from loki.implanting.tuner import LokiConfig
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
from loki.training.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TORCH_WRITER = ("PytorchStreamWriter", "inline_container")
"""What torch's file writer says of itself in the RuntimeError by which it tells of a full disk."""
RECORD = "loki_training.json"
"""In the adapter's folder: what the adapter was trained with, and the training log."""


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    selection: RowSelection,
    examples: Sequence[Mapping[str, Any]],
    settings: TrainSettings,
    output: Path,
    *,
    track: Track = silent,
) -> dict[str, Any]:
    """Train the selected rows of `model` on prompt/completion examples and save the adapter in `output`.

    Returns the record that is saved beside it: settings, model fingerprint, trainable weights and the log,
    one row of `step`, `loss` and `learning_rate` for every `log_every` steps. `model` is wrapped in place.

    Raises:
        ArtefactError: positions of another model, or an unfinished training of other settings in the way.
        OutputError: `output` cannot be written.
    """
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig

    from loki.training.callbacks import ShowProgress
    from loki.training.trainer import CompletionTrainer

    shape = shape_of(model)
    selection.require_fit(num_layers=shape.num_layers, num_rows=shape.num_rows)
    require_new_directory(output)
    identity = {
        "model": fingerprint_model(model).as_dict(),
        "positions": digest(selection.as_lists()),
        "examples": digest([dict(example) for example in examples]),
        "settings": asdict(settings),
    }
    unfinished = _open_unfinished(output, identity)
    trainer = CompletionTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(unfinished),
            max_steps=settings.steps,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulate,
            gradient_checkpointing=settings.gradient_checkpointing,
            max_length=settings.max_length,
            logging_steps=settings.log_every,
            save_steps=settings.save_every,
            save_total_limit=2,
            seed=settings.seed,
            data_seed=settings.seed,
            # The base stays in the dtype it was loaded in and the change in float32: no autocast on top.
            bf16=False,
            fp16=False,
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=model.device.type != "cpu",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([dict(example) for example in examples]),
        processing_class=tokenizer,
        peft_config=LokiConfig(positions=selection, task_type="CAUSAL_LM"),
        callbacks=[ShowProgress(track)],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = _last_whole_checkpoint(unfinished)
    try:
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in TORCH_WRITER):
            raise
        raise OutputError(f"cannot write a checkpoint below {unfinished}: {error}; make room and train on") from error
    record = {
        **identity,
        "num_trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "num_examples": len(examples),
        "train_loss": outcome.training_loss,
        "log": [
            {key: row[key] for key in ("step", "loss", "learning_rate")}
            for row in trainer.state.log_history
            if "loss" in row
        ],
    }
    with new_directory(output) as directory:
        trainer.model.save_pretrained(directory)
        # PEFT writes a template full of blanks there.
        (directory / "README.md").unlink(missing_ok=True)
        write_json(directory / RECORD, record)
    shutil.rmtree(unfinished)
    return record


def load_record(adapter: Path) -> dict[str, Any] | None:
    """What an adapter was trained with, or None where that is not known."""
    path = adapter / RECORD
    if not path.exists():
        return None
    record = read_json(path, what="training record")
    if not isinstance(record, dict):
        raise ArtefactError(f"training record {path} must be a JSON object: train again")
    return record


def _last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; torn ones are removed.

    The Trainer writes its state file last, so a checkpoint without it, or with half of it, is torn.
    """
    newest_first = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in newest_first:
        try:
            json.loads((checkpoint / "trainer_state.json").read_bytes())
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
        else:
            return checkpoint
    return None


def _open_unfinished(output: Path, identity: Mapping[str, Any]) -> Path:
    """Folder of the checkpoints, next to `output`; it may hold those of an interrupted run."""
    folder = output.with_name(output.name + ".unfinished")
    manifest = folder / "manifest.json"
    if not manifest.exists():
        write_json(manifest, identity)
    else:
        found = read_json(manifest, what="manifest of the unfinished training")
        changed = sorted(key for key in identity if found.get(key) != identity[key])
        if changed:
            raise ArtefactError(
                f"{folder} holds an unfinished training of other {', '.join(changed)}: "
                "train with the same ones to finish it, or remove that folder"
            )
    return folder
