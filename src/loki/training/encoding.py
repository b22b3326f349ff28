"""Examples as tokens, with labels on the assistant's answers only.

TRL labels the completion of prompt/completion data, and all turns of a conversation only where the chat template
marks them with `{% generation %}`, which few templates do. Here the turns are found by rendering the conversation up
to each of them, which works with every template that renders a conversation's beginning as it renders the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loki.errors import InputError
from loki.prompts.render import render_chat
from loki.training.examples import ASSISTANT
from loki.training.settings import AnswersName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that is not learned."""

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class EncodedExamples:
    """What the trainer reads."""

    input_ids: list[np.ndarray]
    """Tokens of each example, (T,) int32."""
    labels: list[np.ndarray]
    """The same where a token belongs to an answer, `IGNORED` elsewhere."""
    answers: AnswersName
    """Which turns of conversations were labelled: `all` or `last`."""
    num_cut: int
    """Examples that lost tokens at their end."""
    num_left_out: int
    """Examples of whose answers nothing was left."""


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    answers: AnswersName = "auto",
    max_length: int | None = None,
) -> EncodedExamples:
    """Tokens and labels of examples in the form of `loki.training.examples.load_examples`.

    Learned are answers, each with the end mark that the template gives it: the last message by the assistant, and
    with `answers="all"` all in the completion, in a `conversation` those in the prompt too. `auto` is `all` if the
    chat template renders every conversation up to each of these turns as it renders the whole, and else `last`.
    Without a chat template contents are joined by blank lines, and the completion is learned with the end token.

    Raises:
        InputError: messages that the template refuses, turns that cannot be told apart where all are asked for, or
            no example with an answer within `max_length`.
    """
    chosen: AnswersName = "last" if answers == "last" else "all"
    encoded = []
    for number, example in enumerate(examples, start=1):
        pair = _encode(tokenizer, example, f"example {number}", all_turns=chosen == "all")
        if pair is None:
            if answers == "all":
                raise InputError(
                    f"example {number} has earlier answers that this chat template does not render alike in the "
                    "middle of a conversation and at its end: learn the last answer only (answers: last)"
                )
            logger.info("this chat template does not tell earlier answers apart: only the last of each is learned")
            return encode_examples(tokenizer, examples, answers="last", max_length=max_length)
        encoded.append(pair)
    cut = [(ids[:max_length], labels[:max_length]) for ids, labels in encoded]
    kept = [pair for pair in cut if (pair[1][1:] != IGNORED).any()]
    if not kept:
        raise InputError(
            f"no example has an answer within {max_length} tokens: raise the max length"
            if max_length
            else "no example has an answer of any token: write some text"
        )
    num_cut = sum(max_length is not None and len(ids) > max_length for ids, _ in encoded)
    if len(kept) < len(cut):
        logger.warning(
            f"{len(cut) - len(kept)} of {len(cut)} examples are left out: "
            f"nothing of their answers lies within {max_length} tokens"
        )
    return EncodedExamples(
        [ids for ids, _ in kept], [labels for _, labels in kept], chosen, num_cut, len(cut) - len(kept)
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any], where: str, *, all_turns: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens and labels, or None where an earlier turn cannot be found."""
    prompt, completion = example["prompt"], example["completion"]
    if tokenizer.chat_template is None:
        if all_turns and example.get("conversation"):
            return None
        begin = list(tokenizer(render_chat(tokenizer, prompt)).input_ids)
        answer = tokenizer("".join(message["content"] for message in completion), add_special_tokens=False).input_ids
        return _labelled([*begin, *answer, tokenizer.eos_token_id], [(len(begin), None)])
    messages: Messages = [*prompt, *completion]
    whole = _render(tokenizer, messages, where, prompted=False)
    first = 0 if all_turns and example.get("conversation") else len(prompt)
    turns = [index for index in range(first, len(messages)) if messages[index]["role"] == ASSISTANT]
    turns = turns if all_turns else turns[-1:]
    spans: list[tuple[int, int | None]] = []
    for index in turns:
        start = _common(_render(tokenizer, messages[:index], where, prompted=True), whole)
        end = None
        if index < len(messages) - 1:
            so_far = _render(tokenizer, messages[: index + 1], where, prompted=False)
            end = _common(so_far, whole)
            if end < len(so_far) or start >= end:
                if all_turns:
                    return None
                raise InputError(
                    f"{where} ends with a message by {messages[-1]['role']!r}, and this chat template renders what "
                    "precedes it otherwise at the end: end with the assistant's answer"
                )
        spans.append((start, end))
    if not spans:
        # A completion by another role, which prompt/completion data may have, is learned as it stands.
        spans.append((_common(_render(tokenizer, prompt, where, prompted=True), whole), None))
    return _labelled(whole, spans)


def _labelled(ids: Sequence[int], spans: Sequence[tuple[int, int | None]]) -> tuple[np.ndarray, np.ndarray]:
    ids_T = np.array(ids, dtype=np.int32)
    labels_T = np.full_like(ids_T, IGNORED)
    for start, end in spans:
        labels_T[start:end] = ids_T[start:end]
    return ids_T, labels_T


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, *, prompted: bool) -> list[int]:
    from jinja2 import TemplateError

    try:
        found: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=True, return_dict=True, add_generation_prompt=prompted
        )["input_ids"]
    except TemplateError as error:
        raise InputError(
            f"{where} does not fit the model's chat template ({' '.join(str(error).split())}): change its messages"
        ) from error
    return found


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two sequences begin alike with."""
    pairs = zip(ids, others, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(others)))
