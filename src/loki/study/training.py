"""One training of a study, the same for every method but for what the method is."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from loki.architecture import shape_of
from loki.evaluation.text import load_texts
from loki.log.reader import AttributionLog
from loki.models import load_model
from loki.prompts.encoding import encode_prompt
from loki.provenance import new_directory
from loki.results import finite
from loki.study.analyses import load_selections, log_path
from loki.study.corpora import load_corpora
from loki.study.costs import StepClock, forget_peak_memory, peak_memory_mib
from loki.study.dialled import dialled_parts
from loki.study.identity import identity
from loki.study.methods import Setup, peft_config
from loki.study.plan import Run
from loki.study.row_damage import DamageAnchor
from loki.study.settings import MethodSection, StudySettings
from loki.study.tasks import Task
from loki.training.callbacks import SaveInTime
from loki.training.checkpoints import checkpoints_below, last_whole_checkpoint, open_unfinished
from loki.training.encoding import encode_examples
from loki.training.preserve import PreservePredictions
from loki.training.row_rates import RowRates
from loki.training.settings import TrainSettings
from loki.training.sft import make_trainer, trainer_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALIBRATION_PROMPTS = 256
"""As CorDA's own examples."""
Parts = Callable[[float], "PreTrainedModel"]
"""A model with a part of a change, by how large a part: above 0, below 1."""


@dataclass(frozen=True)
class Workplace:
    """Where a run finds what it needs, and how many threads it may take."""

    settings: StudySettings
    folder: Path
    """Of the attribution logs."""
    threads: int | None = None
    adapters: Path | None = None
    """Where whole runs leave their adapters; None keeps none."""
    unfinished: Path | None = None
    """Where trainings leave checkpoints, to go on from when they are interrupted; None keeps none."""
    save_seconds: float = math.inf
    """Between two of them."""


@dataclass(frozen=True)
class Trained:
    """What one training leaves."""

    model: PreTrainedModel
    """Merged, where its method can."""
    parts: Parts | None
    """Parts of its change, where they are dialled."""
    figures: Mapping[str, Any]
    """What it took."""


def load_base(settings: StudySettings) -> PreTrainedModel:
    """The study's model, untrained."""
    return load_model(
        settings.model, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
    )


def train_once(
    place: Workplace,
    run: Run,
    method: MethodSection,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
) -> Trained:
    """Train by one method, from the last checkpoint on where the same training was interrupted.

    Raises:
        LokiError: data, positions or a model that cannot be used, or checkpoints of another training in the way.
    """
    settings = place.settings
    assert run.learning_rate is not None
    train = settings.train
    chosen = TrainSettings(
        learning_rate=run.learning_rate,
        steps=train.screen_steps if run.phase == "screen" else train.steps,
        batch_size=train.batch_size,
        warmup_steps=train.warmup_steps,
        seed=run.seed,
        scale_learning_rate=False,
        log_every=10,
        save_every=10**9,
        mixed_precision=train.mixed_precision,
    )
    torch.manual_seed(run.seed)
    encoded = encode_examples(tokenizer, task.examples)
    clock = StepClock()
    callbacks = [clock, *_guards(place, method, tokenizer), SaveInTime(place.save_seconds)]
    config = peft_config(method, _setup(place, run, method, model, tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        unfinished = Path(folder) if place.unfinished is None else place.unfinished / run.id
        open_unfinished(unfinished, identity(settings, run))
        checkpoint = last_whole_checkpoint(unfinished)
        args = trainer_arguments(chosen, unfinished, run.learning_rate, model)
        args.save_strategy, args.save_total_limit = SaveStrategy.NO, 1
        trainer = make_trainer(model, tokenizer, encoded, args, peft_config=config, callbacks=callbacks)
        trained = trainer.model
        if config is None:
            trained.requires_grad_(True)
        num_trainable = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        forget_peak_memory()
        with checkpoints_below(unfinished):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        peak = peak_memory_mib()
        trained.save_pretrained(Path(folder) / "saved")
        saved_bytes = sum(path.stat().st_size for path in (Path(folder) / "saved").glob("*.safetensors"))
        if place.adapters is not None and run.phase == "whole" and config is not None:
            _keep(Path(folder) / "saved", place.adapters / run.id)
        parts = None
        if method.dial is not None and run.phase == "whole":
            read = load_texts(method.dial.texts, settings.data_dir, part="analysis")
            parts = dialled_parts(
                method.dial, load_base(settings), Path(folder) / "saved", tokenizer, task.held_out, read
            )
    log = [row for row in trainer.state.log_history if "loss" in row]
    figures = {
        "num_trainable": num_trainable,
        "seconds_per_step": clock.median,
        "train_seconds": round(sum(clock.seconds), 1),
        "peak_memory_mib": round(peak, 1),
        "saved_bytes": saved_bytes,
        "log": [finite({key: row[key] for key in ("step", "loss")}) for row in log],
    }
    merged: PreTrainedModel = trained if config is None else cast(PeftModel, trained).merge_and_unload()
    # A trainer leaves a forward method on the model that is bound to this very object, and that a copy would call: the
    # weights go into a model that no trainer has seen.
    fresh = load_base(settings)
    fresh.load_state_dict(merged.state_dict())
    return Trained(fresh, parts, figures)


def _keep(adapter: Path, kept: Path) -> None:
    """Copy an adapter; one of a run that did not come to its end is replaced."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(kept, ignore_errors=True)
    with new_directory(kept) as folder:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)


def _guards(place: Workplace, method: MethodSection, tokenizer: PreTrainedTokenizerBase) -> list[TrainerCallback]:
    """What holds the model back while it trains."""
    found: list[TrainerCallback] = []
    if (anchor := method.preserve) is not None:
        texts = [text.text for text in load_texts(anchor.texts, place.settings.data_dir, part="analysis")]
        found.append(PreservePredictions(texts, tokenizer=tokenizer, weight=anchor.weight, every=anchor.every))
    if method.damage is not None:
        path = log_path(place.folder, method.damage.log)
        if method.damage.anchor:
            with AttributionLog(path) as log:
                found.append(DamageAnchor(log.mean_scores(), method.damage.anchor))
        if method.damage.rates:
            found.append(RowRates(path))
    return found


def _setup(
    place: Workplace, run: Run, method: MethodSection, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Setup:
    settings = place.settings
    rows = load_selections(method, settings, place.folder, shape_of(model), run.seed)
    calibration: list[torch.Tensor] = []
    if method.calibration is not None:
        prompts = load_corpora(settings.analyses[method.calibration], settings.data_dir)[:CALIBRATION_PROMPTS]
        calibration = [encode_prompt(tokenizer, prompt).ids_T[None] for prompt in prompts]
    return Setup(model, rows, calibration, run.seed)
