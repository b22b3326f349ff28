"""One run of a study: a model from its base to its scores, in a process of its own."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from pydantic import BaseModel
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from loki.architecture import projections, shape_of
from loki.evaluation.completions import completion_losses
from loki.evaluation.scores import ItemScores
from loki.evaluation.text import load_texts, text_scores
from loki.implanting.scaled_change import scaled_change
from loki.models import load_model, load_tokenizer, model_label
from loki.progress import silent
from loki.prompts.encoding import encode_prompt
from loki.provenance import digest
from loki.results import Result, finite
from loki.rows import RowSelection
from loki.study.analyses import load_selection, log_path
from loki.study.corpora import load_corpora
from loki.study.costs import StepClock, forget_peak_memory, peak_memory_mib
from loki.study.methods import Setup, peft_config
from loki.study.plan import Run
from loki.study.row_damage import DamageAnchor, DamageRates, mean_damage
from loki.study.settings import MethodSection, StudySettings
from loki.study.tasks import Task, load_task
from loki.training.encoding import encode_examples
from loki.training.preserve import PreservePredictions
from loki.training.settings import TrainSettings
from loki.training.sft import make_trainer, trainer_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KIND = "study-run"
CALIBRATION_PROMPTS = 256
"""As CorDA's own examples."""
HELD_OUT = "held_out"


@dataclass(frozen=True)
class Workplace:
    """Where a run finds what it needs, and how many threads it may take."""

    settings: StudySettings
    folder: Path
    """Of the attribution logs."""
    threads: int | None = None


def identity(settings: StudySettings, run: Run) -> dict[str, Any]:
    """All that decides a run's figures, as JSON: a finished run of another identity is not this one.

    Settings at their defaults are left out, so that a new one does not disown what was finished without it.
    """
    dump = partial(BaseModel.model_dump, mode="json", exclude_defaults=True)
    shared = dump(settings, exclude={"title", "data_dir", "analyses", "methods", "device", "reference"})
    method = settings.methods.get(run.method)
    analyses = {}
    if method is not None:
        analyses = {name: dump(settings.analyses[name]) for name in sorted(method.logs)}
    train = shared.pop("train")
    if run.phase == "screen":
        train["steps"] = train.pop("screen_steps")
        shared.pop("evaluate", None)  # only the held-out loss is measured
    train.pop("screen_steps", None)
    return {
        **shared,
        **({} if run.phase in ("base", "suppress") else {"train": train}),
        "method": None if method is None else dump(method, exclude={"label", "learning_rates", "seeds"}),
        "analyses": analyses,
        "phase": run.phase,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
    }


def carry_out(place: Workplace, run: Run) -> Result:
    """Train and evaluate, or only evaluate.

    Raises:
        LokiError: data, positions or a model that cannot be used.
    """
    if place.threads is not None:
        torch.set_num_threads(place.threads)
    settings = place.settings
    tokenizer = load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code)
    task = load_task(settings.task, settings.data_dir, tokenizer, batch_size=settings.evaluate.reply_batch_size)
    model = _load(settings)
    method = settings.methods.get(run.method)
    figures: dict[str, Any] = {}
    if method is not None and run.phase == "suppress":
        rows = load_selection(method.rows, settings, place.folder, shape_of(model), run.seed)
        figures["num_suppressed_rows"] = _suppress(model, rows)
    elif method is not None:
        model, figures = _train(place, run, method, model, tokenizer, task)
    start = time.perf_counter()
    losses = completion_losses(model, tokenizer, task.held_out)
    ids = tuple(str(number) for number in range(len(losses)))
    scores = [ItemScores(HELD_OUT, "loss", ids, tuple(losses), "nats per token", higher_is_better=False)]
    if run.phase != "screen" and math.isfinite(scores[0].mean.value):
        reference = None if method is None else _load(settings)
        scores += _text_scores(settings, model, tokenizer, reference)
        answering = _answering(settings, model)
        scores += _benchmark_scores(settings, answering, tokenizer)
        if run.phase != "suppress":
            scores += task.score(answering, tokenizer, silent)
        if run.phase == "whole" and settings.evaluate.scales:
            assert reference is not None
            figures["scaled"] = _scaled_scores(settings, model, tokenizer, reference, task)
    figures |= {
        "evaluation_seconds": round(time.perf_counter() - start, 1),
        "num_threads": torch.get_num_threads(),
        "scores": [finite(score.as_dict()) for score in scores],
    }
    return Result(KIND, identity(settings, run), figures, seed=run.seed, model=model_label(settings.model))


def _load(settings: StudySettings) -> PreTrainedModel:
    return load_model(
        settings.model, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
    )


def _train(
    place: Workplace,
    run: Run,
    method: MethodSection,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The trained model, merged where its method can, and what training took."""
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
    callbacks: list[TrainerCallback] = [clock := StepClock()]
    if (anchor := method.preserve) is not None:
        texts = [text.text for text in load_texts(anchor.texts, settings.data_dir, part="analysis")]
        callbacks.append(PreservePredictions(texts, tokenizer=tokenizer, weight=anchor.weight, every=anchor.every))
    if method.damage is not None:
        damage_LD = mean_damage(log_path(place.folder, method.damage.log))
        callbacks += [DamageAnchor(damage_LD, method.damage.anchor)] if method.damage.anchor else []
        callbacks += [DamageRates(damage_LD)] if method.damage.rates else []
    config = peft_config(method, _setup(place, run, method, model, tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        args = trainer_arguments(chosen, Path(folder), run.learning_rate, on_cpu=model.device.type == "cpu")
        args.save_strategy = "no"
        trainer = make_trainer(model, tokenizer, encoded, args, peft_config=config, callbacks=callbacks)
        trained = trainer.model
        if config is None:
            trained.requires_grad_(True)
        num_trainable = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        forget_peak_memory()
        trainer.train()
        peak = peak_memory_mib()
        trained.save_pretrained(Path(folder) / "saved")
        saved_bytes = sum(path.stat().st_size for path in (Path(folder) / "saved").glob("*.safetensors"))
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
    fresh = _load(settings)
    fresh.load_state_dict(merged.state_dict())
    return fresh, figures


def _setup(
    place: Workplace, run: Run, method: MethodSection, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Setup:
    settings = place.settings
    rows = None
    if method.rows is not None:
        rows = load_selection(method.rows, settings, place.folder, shape_of(model), run.seed)
    calibration: list[torch.Tensor] = []
    if method.calibration is not None:
        prompts = load_corpora(settings.analyses[method.calibration], settings.data_dir)[:CALIBRATION_PROMPTS]
        calibration = [encode_prompt(tokenizer, prompt).ids_T[None] for prompt in prompts]
    return Setup(model, rows, calibration, run.seed)


@torch.no_grad()
def _suppress(model: PreTrainedModel, rows: RowSelection) -> int:
    """Set rows to zero, biases too, as `loki suppress` does it in a checkpoint."""
    for projection, chosen in zip(projections(model).values(), rows.rows, strict=True):
        weight_DF: torch.Tensor = projection.get_parameter("weight")
        weight_DF = weight_DF.T if isinstance(projection, Conv1D) else weight_DF
        for tensor in (weight_DF, getattr(projection, "bias", None)):
            if isinstance(tensor, torch.Tensor):
                tensor[list(chosen)] = 0
    return rows.num_selected


def _text_scores(
    settings: StudySettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: PreTrainedModel | None,
) -> list[ItemScores]:
    chosen = settings.evaluate
    scores = []
    for name, num_tokens in chosen.texts.items():
        texts = load_texts(name, settings.data_dir, part="evaluation")
        scores += text_scores(
            model, tokenizer, name, texts, reference=reference, window=chosen.window, max_tokens=num_tokens
        )
    return scores


def _benchmark_scores(
    settings: StudySettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[ItemScores]:
    chosen = settings.evaluate
    if not chosen.benchmarks:
        return []
    from loki.evaluation.harness import evaluate_tasks

    return evaluate_tasks(
        model,
        tokenizer,
        chosen.benchmarks,
        data_dir=settings.data_dir,
        limit=chosen.limit,
        part="evaluation",
        batch_size=chosen.batch_size,
    )


def _answering(settings: StudySettings, model: PreTrainedModel) -> PreTrainedModel:
    """The model in the dtype in which it answers; a copy, where that is another one."""
    name = settings.evaluate.answers_dtype
    dtype = model.dtype if name in (None, "auto") else getattr(torch, str(name))
    return model if dtype == model.dtype else copy.deepcopy(model).to(dtype)


def _scaled_scores(
    settings: StudySettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: PreTrainedModel,
    task: Task,
) -> list[dict[str, Any]]:
    """Scores of the task and the texts with parts of the change from `reference` to `model`."""
    found = []
    for scale in settings.evaluate.scales:
        scaled = scaled_change(reference, model, scale)
        scores = _text_scores(settings, scaled, tokenizer, reference)
        scores += task.score_alone(_answering(settings, scaled), tokenizer, silent)
        found.append({"scale": scale, "scores": [finite(score.as_dict()) for score in scores]})
    return found


def held_out_loss(result: Result) -> float:
    """Mean loss of the held-out completions, infinite where training came apart."""
    (scores,) = (score for score in result.figures["scores"] if score["task"] == HELD_OUT)
    losses = scores["scores"]
    return math.inf if None in losses else sum(losses) / len(losses)


def same_run(result: Result, settings: StudySettings, run: Run) -> bool:
    """Whether a result is that of this run under these settings."""
    return digest(dict(result.settings)) == digest(identity(settings, run))
