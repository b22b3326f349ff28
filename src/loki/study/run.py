"""One run of a study: a model from its base to its scores, in a process of its own."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel
from transformers.pytorch_utils import Conv1D

from loki.architecture import projections, shape_of
from loki.evaluation.completions import completion_losses
from loki.evaluation.remembered import RememberedModel
from loki.evaluation.scores import ItemScores
from loki.evaluation.text import load_texts, text_scores
from loki.implanting.scaled_change import scaled_change
from loki.models import load_tokenizer, model_label
from loki.progress import silent
from loki.provenance import digest
from loki.results import Result, finite
from loki.rows import RowSelection
from loki.study.analyses import load_selection
from loki.study.plan import Run
from loki.study.settings import StudySettings
from loki.study.tasks import Task, load_task
from loki.study.training import Parts, Workplace, load_base, train_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KIND = "study-run"
HELD_OUT = "held_out"


def identity(settings: StudySettings, run: Run) -> dict[str, Any]:
    """All that decides a run's figures, as JSON: a finished run of another identity is not this one.

    Settings at their defaults are left out, so that a new one does not disown what was finished without it.
    """
    dump = partial(BaseModel.model_dump, mode="json", exclude_defaults=True)
    shared = dump(settings, exclude={"title", "data_dir", "analyses", "methods", "device", "reference", "pairs"})
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
    model = load_base(settings)
    method = settings.methods.get(run.method)
    figures: dict[str, Any] = {}
    part_of_change: Parts | None = None
    if method is not None and run.phase == "suppress":
        rows = load_selection(method.rows, settings, place.folder, shape_of(model), run.seed)
        figures["num_suppressed_rows"] = _suppress(model, rows)
    elif method is not None:
        trained = train_once(place, run, method, model, tokenizer, task)
        model, part_of_change, figures = trained.model, trained.parts, dict(trained.figures)
    start = time.perf_counter()
    losses = completion_losses(model, tokenizer, task.held_out)
    ids = tuple(str(number) for number in range(len(losses)))
    scores = [ItemScores(HELD_OUT, "loss", ids, tuple(losses), "nats per token", higher_is_better=False)]
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
    """Scores of the task and the texts with parts of the change from `reference`."""
    found = []
    for scale in scales:
        scaled = part_of_change(scale)
        scores = _text_scores(settings, scaled, tokenizer, reference)
        scores += task.score_alone(_answering(settings, scaled), tokenizer, silent)
        found.append({"scale": scale, "scores": [finite(score.as_dict()) for score in scores]})
    return found


def held_out_loss(result: Result) -> float:
    """Mean loss of the held-out completions, infinite where training came apart."""
    (scores,) = (score for score in result.figures["scores"] if score["task"] == HELD_OUT)
    losses = scores["scores"]
    return math.inf if None in losses else sum(losses) / len(losses)


def lacking_scales(result: Result, settings: StudySettings, run: Run) -> tuple[float, ...] | None:
    """Parts of the change that the settings name and a finished run was not scored at; None where it is another run."""
    there, scored = _apart(dict(result.settings))
    here, wanted = _apart(identity(settings, run))
    if digest(there) != digest(here):
        return None
    if run.phase != "whole":
        return ()
    return tuple(sorted(set(wanted) - set(scored))) if set(scored) <= set(wanted) else None


def _apart(known: dict[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """An identity without its scales, and the scales."""
    evaluate = dict(known.get("evaluate", {}))
    scales = evaluate.pop("scales", [])
    return {**known, "evaluate": evaluate}, scales
