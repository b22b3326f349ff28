"""Further parts of a finished run's change, from the adapter that it left: nothing is trained again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from loki.errors import ArtefactError
from loki.evaluation.completions import completion_losses
from loki.evaluation.remembered import RememberedModel
from loki.evaluation.text import load_texts
from loki.implanting.scaled_change import scaled_change
from loki.models import load_tokenizer, merge_in_memory
from loki.results import Result
from loki.study.dialled import dialled_parts
from loki.study.finished import held_out_loss
from loki.study.identity import identity
from loki.study.plan import Run
from loki.study.run import scaled_scores
from loki.study.tasks import load_task
from loki.study.training import Parts, Workplace, load_base

CLOSE = 0.01
"""Relative difference of held-out losses that other processors may make."""


def add_parts(place: Workplace, run: Run, begun: Result, scales: Sequence[float], adapter: Path) -> Result:
    """Score a finished run at further `scales`.

    Raises:
        ArtefactError: the adapter does not make the model that the run was scored with.
        LokiError: data or an adapter that cannot be used.
    """
    if place.threads is not None:
        torch.set_num_threads(place.threads)
    settings, method = place.settings, place.settings.methods[run.method]
    tokenizer = load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code)
    task = load_task(settings.task, settings.data_dir, tokenizer, batch_size=settings.evaluate.reply_batch_size)
    base, model = load_base(settings), merge_in_memory(load_base(settings), adapter)
    losses = completion_losses(model, tokenizer, task.held_out)
    now, then = sum(losses) / len(losses), held_out_loss(begun)
    if not abs(now - then) <= CLOSE * then:
        raise ArtefactError(
            f"the adapter that {run.id} left has a held-out loss of {now:.3f}, the run had {then:.3f}: "
            "remove the run's file to train it again"
        )
    start = time.perf_counter()
    part_of_change: Parts = partial(scaled_change, base, model)
    if method.dial is not None:
        read = load_texts(method.dial.texts, settings.data_dir, part="analysis")
        part_of_change = dialled_parts(method.dial, load_base(settings), adapter, tokenizer, task.held_out, read)
    parts = [
        *begun.figures.get("scaled", []),
        *scaled_scores(settings, scales, part_of_change, tokenizer, RememberedModel(base), task),
    ]
    figures = {
        **begun.figures,
        "scaled": sorted(parts, key=lambda part: part["scale"]),
        "evaluation_seconds": round(begun.figures["evaluation_seconds"] + time.perf_counter() - start, 1),
    }
    return Result(begun.kind, identity(settings, run), figures, seed=begun.seed, model=begun.model)
