"""One run of a study: a model from its base to its scores, in a process of its own."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from loki.architecture import projections, shape_of
from loki.choices import ModuleName
from loki.evaluation.completions import completion_losses
from loki.evaluation.remembered import RememberedModel
from loki.evaluation.scores import ItemScores
from loki.evaluation.text import load_texts, text_scores
from loki.implanting.scaled_change import scaled_change
from loki.models import load_tokenizer, model_label
from loki.progress import silent
from loki.results import Result, finite
from loki.rows import RowSelection
from loki.study.analyses import load_selections
from loki.study.finished import HELD_OUT
from loki.study.identity import identity
from loki.study.plan import Run
from loki.study.settings import StudySettings
from loki.study.tasks import Task, load_task
from loki.study.training import Parts, Workplace, load_base, train_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KIND = "study-run"


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
    model = load_base(settings)
    method = settings.methods.get(run.method)
    figures: dict[str, Any] = {}
    part_of_change: Parts | None = None
    if method is not None and run.phase == "suppress":
        selections = load_selections(method, settings, place.folder, shape_of(model), run.seed)
        figures["num_suppressed_rows"] = sum(_suppress(model, rows, module) for module, rows in selections.items())
    elif method is not None:
        trained = train_once(place, run, method, model, tokenizer, task)
        model, part_of_change, figures = trained.model, trained.parts, dict(trained.figures)
    start = time.perf_counter()
    scores = [_held_out_scores(model, tokenizer, task)]
    if run.phase != "screen" and math.isfinite(scores[0].mean.value):
        reference = None if method is None else RememberedModel(load_base(settings))
        scores += _text_scores(settings, model, tokenizer, reference)
        answering = _answering(settings, model)
        scores += _benchmark_scores(settings, answering, tokenizer)
        if run.phase != "suppress":
            scores += task.score(answering, tokenizer, silent)
        if run.phase == "whole" and settings.evaluate.scales:
            assert reference is not None
            part_of_change = part_of_change or partial(scaled_change, reference.model, model)
            scales = settings.evaluate.scales
            figures["scaled"] = scaled_scores(settings, scales, part_of_change, tokenizer, reference, task)
    figures |= {
        "evaluation_seconds": round(time.perf_counter() - start, 1),
        "num_threads": torch.get_num_threads(),
        "scores": [finite(score.as_dict()) for score in scores],
    }
    return Result(KIND, identity(settings, run), figures, seed=run.seed, model=model_label(settings.model))


@torch.no_grad()
def _suppress(model: PreTrainedModel, rows: RowSelection, module: ModuleName) -> int:
    """Set rows to zero, biases too, as `loki suppress` does it in a checkpoint."""
    for projection, chosen in zip(projections(model, module).values(), rows.rows, strict=True):
        weight_DF: torch.Tensor = projection.get_parameter("weight")
        weight_DF = weight_DF.T if isinstance(projection, Conv1D) else weight_DF
        for tensor in (weight_DF, getattr(projection, "bias", None)):
            if isinstance(tensor, torch.Tensor):
                tensor[list(chosen)] = 0
    return rows.num_selected


def _held_out_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> ItemScores:
    losses = completion_losses(model, tokenizer, task.held_out)
    ids = tuple(str(number) for number in range(len(losses)))
    return ItemScores(HELD_OUT, "loss", ids, tuple(losses), "nats per token", higher_is_better=False)


def _text_scores(
    settings: StudySettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: RememberedModel | None,
) -> list[ItemScores]:
    chosen = settings.evaluate
    scores = []
    for name, num_tokens in chosen.texts.items():
        texts = load_texts(name, settings.data_dir, part="evaluation")
        scores += text_scores(
            model, tokenizer, name, texts, reference=reference, window=chosen.window, max_tokens=num_tokens
        ).model
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


def scaled_scores(
    settings: StudySettings,
    scales: Sequence[float],
    part_of_change: Parts,
    tokenizer: PreTrainedTokenizerBase,
    reference: RememberedModel,
    task: Task,
) -> list[dict[str, Any]]:
    """Scores of held-out examples, the texts and the task with parts of the change from `reference`."""
    found = []
    for scale in scales:
        scaled = part_of_change(scale)
        scores = [_held_out_scores(scaled, tokenizer, task)]
        scores += _text_scores(settings, scaled, tokenizer, reference)
        scores += task.score_alone(_answering(settings, scaled), tokenizer, silent)
        found.append({"scale": scale, "scores": [finite(score.as_dict()) for score in scores]})
    return found
