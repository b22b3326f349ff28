"""General knowledge: the likelihood of each option's text, and how far predictions moved.

Options are compared by their text and not by their letter, because small models answer letters at chance
while they rank texts well above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loki.progress import Track, silent
from loki.prompts.questions import Question
from loki.prompts.render import open_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class QuestionScore:
    """How a model ranks the options of one question."""

    right: bool
    """The option of highest log-probability per byte is the right one."""
    log_probability: float
    """Log-probability of the right option's text, in nats."""


@dataclass(frozen=True)
class _Texts:
    """One question with each of its options: token ids, the option's part of them, bytes of its text."""

    input_ids_OT: torch.Tensor  # noqa: N815
    attention_mask_OT: torch.Tensor  # noqa: N815
    is_option_OT: torch.Tensor  # noqa: N815
    num_bytes_O: torch.Tensor  # noqa: N815


def score_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    reference: PreTrainedModel | None = None,
    track: Track = silent,
) -> tuple[list[QuestionScore], list[float]]:
    """Score every question; with `reference`, also the mean KL(reference ‖ model) of each question.

    The KL divergence is the mean over the tokens of the question with its right option, in nats per token,
    with both models reading the same text. Without `reference` the second list is empty.
    """
    scores, divergences = [], []
    for question in track(questions, "asking"):
        texts = _encode(tokenizer, question, model.device)
        log_probabilities_OTV = _log_probabilities(model, texts)
        next_ids = texts.input_ids_OT[:, 1:, None]
        token_OT = log_probabilities_OTV[:, :-1].gather(-1, next_ids).squeeze(-1) * texts.is_option_OT[:, 1:]
        option_O = token_OT.sum(-1)
        scores.append(
            QuestionScore(
                right=int((option_O / texts.num_bytes_O).argmax()) == question.answer,
                log_probability=float(option_O[question.answer]),
            )
        )
        if reference is not None:
            real = texts.attention_mask_OT[question.answer].bool()
            found_TV = log_probabilities_OTV[question.answer][real]
            expected_TV = _log_probabilities(reference, texts)[question.answer][real]
            divergence_T = (expected_TV.exp() * (expected_TV - found_TV)).sum(-1)
            divergences.append(float(divergence_T.mean()))
    return scores, divergences


def _encode(tokenizer: PreTrainedTokenizerBase, question: Question, device: torch.device) -> _Texts:
    prompt = tokenizer(open_prompt(question)).input_ids
    options = [tokenizer(f" {choice}", add_special_tokens=False).input_ids for choice in question.choices]
    length = len(prompt) + max(map(len, options))
    input_ids = torch.zeros(len(options), length, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    is_option = torch.zeros_like(input_ids)
    for index, option in enumerate(options):
        end = len(prompt) + len(option)
        input_ids[index, :end] = torch.tensor([*prompt, *option])
        attention_mask[index, :end] = 1
        is_option[index, len(prompt) : end] = 1
    num_bytes = torch.tensor([len(choice.encode()) for choice in question.choices])
    return _Texts(input_ids.to(device), attention_mask.to(device), is_option.to(device), num_bytes.to(device))


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, texts: _Texts) -> torch.Tensor:
    """Log-probabilities (options, tokens, vocabulary) in float32."""
    logits: torch.Tensor = model(input_ids=texts.input_ids_OT, attention_mask=texts.attention_mask_OT).logits
    return logits.float().log_softmax(-1)
