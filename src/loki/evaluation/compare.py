"""Before and after: two models on the same task and the same questions, as one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loki.errors import InputError
from loki.evaluation.completions import completion_losses
from loki.evaluation.forgetting import forgetting
from loki.evaluation.function_calls import Reply, answer_requests
from loki.evaluation.knowledge import score_questions
from loki.evaluation.statistics import mean, paired_change, share
from loki.progress import Track, silent
from loki.prompts.function_calls import CallExample, Kind
from loki.prompts.questions import Question
from loki.results import Comparison, Measure, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KIND_NOTES: Mapping[Kind, str] = {
    "seen": "functions of the training data, in phrasings and with values that it lacks",
    "unseen": "functions that the training data lacks",
    "none": "requests that fit none of the functions on offer: the right reply is []",
}
KIND_NAMES: Mapping[Kind, str] = {
    "seen": "Task, functions seen",
    "unseen": "Task, functions unseen",
    "none": "Task, no function fits",
}


@dataclass(frozen=True)
class Evaluation:
    """The before/after table and further figures."""

    comparisons: tuple[Comparison, ...]
    figures: dict[str, Any]


def compare_models(
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    requests: Sequence[CallExample] = (),
    completions: Sequence[Mapping[str, Any]] = (),
    questions: Sequence[Question] = (),
    track: Track = silent,
) -> Evaluation:
    """Compare two models of the same shape on function calls, completions and knowledge questions.

    Differences are paired: their standard errors come from the differences of single items.

    Raises:
        InputError: the models' parameters differ in names or shapes.
    """
    _require_same_form(before, after)
    rows: list[Comparison] = []
    figures: dict[str, Any] = {}
    if requests:
        replies_before = answer_requests(before, tokenizer, requests, track=track)
        replies_after = answer_requests(after, tokenizer, requests, track=track)
        rows += _task_rows(replies_before, replies_after)
        figures["num_task_requests"] = len(requests)
    if completions:
        losses = [completion_losses(model, tokenizer, completions, track=track) for model in (before, after)]
        rows.append(
            _paired_row(
                "Task, loss of completions",
                *losses,
                unit="nats per token",
                higher_is_better=False,
                note="mean over each completion's tokens",
            )
        )
        figures["num_completions"] = len(completions)
    if questions:
        rows += _knowledge_rows(before, after, tokenizer, questions, track, figures)
    changed, total = count_changed(before, after)
    rows.append(
        Comparison(
            "Weights changed",
            before=None,
            after=Measure(100 * changed / total, unit="%"),
            change=None,
            higher_is_better=False,
            note=f"{changed:,} of {total:,}",
        )
    )
    figures["num_weights_changed"], figures["num_weights"] = changed, total
    return Evaluation(tuple(rows), figures)


def _require_same_form(before: nn.Module, after: nn.Module) -> None:
    forms = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (before, after)]
    for name in sorted(forms[0].keys() | forms[1].keys()):
        there, here = (form.get(name) for form in forms)
        if there != here:
            raise InputError(
                f"the two models are not of one form ({name} is {there} before and {here} after): "
                "name the model that training started from"
            )


@torch.no_grad()
def count_changed(before: nn.Module, after: nn.Module) -> tuple[int, int]:
    """How many weights differ between two models of the same shape, and how many there are."""
    others = dict(after.named_parameters())
    changed = total = 0
    for name, parameter in before.named_parameters():
        changed += int((parameter != others[name].to(parameter.device, parameter.dtype)).sum())
        total += parameter.numel()
    return changed, total


def _task_rows(before: Sequence[Reply], after: Sequence[Reply]) -> list[Comparison]:
    rows = []
    for kind, name in KIND_NAMES.items():
        right = [[reply.right for reply in replies if reply.example.kind == kind] for replies in (before, after)]
        if right[0]:
            rows.append(_share_row(name, *right, note=KIND_NOTES[kind]))
    return rows


def _knowledge_rows(
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    track: Track,
    figures: dict[str, Any],
) -> list[Comparison]:
    scores_before, _ = score_questions(before, tokenizer, questions, track=track)
    scores_after, divergences = score_questions(after, tokenizer, questions, reference=before, track=track)
    accuracy = _share_row(
        "Knowledge, accuracy",
        [score.right for score in scores_before],
        [score.right for score in scores_after],
        note="the right option's text is the likeliest per byte",
    )
    rows = [
        accuracy,
        _paired_row(
            "Knowledge, log-probability",
            [score.log_probability for score in scores_before],
            [score.log_probability for score in scores_after],
            unit="nats",
            note="of the right option's text",
        ),
        Comparison(
            "KL divergence to the base",
            before=None,
            after=mean(divergences, "nats per token"),
            change=None,
            higher_is_better=False,
            note="mean over the tokens of the questions with their right answers",
        ),
    ]
    figures["num_questions"] = len(questions)
    assert accuracy.before is not None
    assert accuracy.after is not None
    if accuracy.before.value > 0:
        lost = forgetting({"probe": accuracy.before.value}, {"probe": accuracy.after.value})
        rows.append(
            Comparison(
                "Forgetting score",
                before=None,
                after=Measure(lost.score, unit="%"),
                change=None,
                higher_is_better=False,
                note="share of the knowledge accuracy that was lost; negative is a gain",
            )
        )
        figures["forgetting_score_percent"] = lost.score
        figures["forgetting_losses_only_percent"] = lost.losses_only
    return rows


def _share_row(name: str, before: Sequence[bool], after: Sequence[bool], *, note: str) -> Comparison:
    change = paired_change([100.0 * right for right in before], [100.0 * right for right in after], "points")
    return Comparison(name, share(before), share(after), change, note=note)


def _paired_row(
    name: str,
    before: Sequence[float],
    after: Sequence[float],
    *,
    unit: Unit,
    higher_is_better: bool = True,
    note: str,
) -> Comparison:
    return Comparison(
        name,
        mean(before, unit),
        mean(after, unit),
        paired_change(before, after, unit),
        higher_is_better,
        note,
    )
