"""Prompts as tokens, and the token with which the right answer begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loki.errors import InputError
from loki.prompts.prompt import Prompt
from loki.prompts.render import render_chat

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedPrompt:
    """What the model reads, and what it should say next."""

    ids_T: torch.Tensor  # noqa: N815
    """Token ids, int64."""
    answer_id: int | None
    """First token of the answer as it follows the prompt; None where the prompt has no answer."""


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, chat_template: bool | None = None
) -> EncodedPrompt:
    """Tokens (T,) of a prompt, and the first one of its answer.

    `chat_template` None puts messages into the template where the tokenizer has one, False joins their contents
    by blank lines and ends with the last of them. A text is never put into a template. In a template all special
    tokens come from it; elsewhere the tokenizer adds its own at the start, and none of its own at the end.

    The answer follows a template's generation prompt, or text that ends in white space, as it stands, and any
    other text after a space. Its first token is the one that prompt and answer, tokenised together, have after
    the tokens of the prompt. Where tokens join the end of the prompt with the start of the answer there is none:
    then it is the first token of the answer (with its space) alone.

    Raises:
        InputError: no template where one is asked for, messages that it refuses, or nothing to tokenise.
    """
    import torch

    templated = prompt.messages is not None and (
        chat_template if chat_template is not None else tokenizer.chat_template is not None
    )
    text = _text(tokenizer, prompt, templated=templated)
    ids = _encode(tokenizer, text, special=not templated)
    if not ids:
        raise InputError(f"prompt {prompt.id!r} has no tokens: write some text")
    answer_id = None
    if prompt.answer is not None:
        separate = not templated and not text[-1:].isspace() and not prompt.answer[:1].isspace()
        answer_id = _first_id(tokenizer, text, ids, f" {prompt.answer}" if separate else prompt.answer, templated)
        if answer_id is None:
            raise InputError(f"prompt {prompt.id!r} has an answer without tokens, {prompt.answer!r}: write some text")
    return EncodedPrompt(torch.tensor(ids, dtype=torch.int64), answer_id)


def _text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, templated: bool) -> str:
    if prompt.text is not None:
        return prompt.text
    assert prompt.messages is not None
    if not templated:
        # A line break after the last message would make a base model begin a paragraph instead of answering.
        return "\n\n".join(message["content"] for message in prompt.messages)
    if tokenizer.chat_template is None:
        raise InputError(
            "the model's tokenizer has no chat template: leave out --chat-template to join messages as plain text"
        )
    return _fill_template(tokenizer, prompt.messages, prompt.id)


def _fill_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], prompt_id: str) -> str:
    from jinja2 import TemplateError

    try:
        return render_chat(tokenizer, messages)
    except TemplateError as error:
        raise InputError(
            f"prompt {prompt_id!r} does not fit the model's chat template ({' '.join(str(error).split())}): "
            "change its messages, or join them as plain text with --no-chat-template"
        ) from error


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
    if special and ids and ids[-1] in tokenizer.all_special_ids:
        # The last position is attributed: it must be the text's own, not an end mark that the tokenizer appends.
        bare: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        ends = (end for end in range(len(ids), 0, -1) if ids[max(0, end - len(bare)) : end] == bare)
        return ids[: next(ends, len(ids))]
    return ids


def _first_id(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int], answer: str, templated: bool
) -> int | None:
    together = _encode(tokenizer, text + answer, special=not templated)
    if together[: len(ids)] == ids and len(together) > len(ids):
        return together[len(ids)]
    alone = _encode(tokenizer, answer, special=False)
    return alone[0] if alone else None
