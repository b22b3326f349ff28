"""Prompts as texts of a bounded number of tokens, for scores that take every position of a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from loki.errors import InputError
from loki.prompts.encoding import EncodedPrompt, encode_prompt
from loki.prompts.prompt import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_windows(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_tokens: int,
    *,
    chat_template: bool | None = None,
) -> tuple[list[str], list[EncodedPrompt]]:
    """Ids and tokens of all prompts, those of more than `max_tokens` tokens as windows `id#1`, `id#2`, …

    A plain text is scored with the last word that the answer to it is; messages are as `encode_prompt` renders them,
    without an answer.

    Raises:
        InputError: as `encode_prompt`, or a window would be called like another prompt.
    """
    ids: list[str] = []
    encoded: list[EncodedPrompt] = []
    for prompt in prompts:
        ids_T = encode_prompt(tokenizer, _whole(prompt), chat_template=chat_template).ids_T
        windows = cut(ids_T, max_tokens, tokenizer.bos_token_id)
        names = [prompt.id] if len(windows) == 1 else [f"{prompt.id}#{n}" for n in range(1, len(windows) + 1)]
        ids += names
        encoded += [EncodedPrompt(window, None) for window in windows]
    if len(encoded) > len(prompts):
        for name, number in Counter(ids).items():
            if number > 1:
                raise InputError(f"two texts or their windows are called {name!r}: give prompts other ids")
    return ids, encoded


def cut(ids_T: torch.Tensor, max_tokens: int, start_id: int | None) -> list[torch.Tensor]:
    """As few windows as there can be, of like length, so that each has the same say in a vote.

    A text that begins with the tokenizer's start token has it in front of every window: models that are used to it
    predict badly without.
    """
    if len(ids_T) <= max_tokens:
        return [ids_T]
    has_start = start_id is not None and int(ids_T[0]) == start_id
    start, body = ids_T[: int(has_start)], ids_T[int(has_start) :]
    num_windows = -(-len(body) // (max_tokens - len(start)))
    return [torch.cat([start, part]) for part in body.tensor_split(num_windows)]


def _whole(prompt: Prompt) -> Prompt:
    """A plain text with its last word, which its prompt keeps as the answer."""
    if prompt.text is None or prompt.answer is None:
        return prompt
    joined = prompt.text[-1:].isspace() or prompt.answer[:1].isspace()
    return replace(prompt, text=f"{prompt.text}{'' if joined else ' '}{prompt.answer}")
