"""Texts that the user names, and their tokens in windows: what a model must not forget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from loki.errors import InputError
from loki.evaluation.text import windows_of
from loki.prompts.json_lines import read_rows, text_field, user_path
from loki.prompts.questions import load_probe
from loki.prompts.render import open_prompt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

BUILT_IN = "probe"


def read_texts(text: str | Path | Sequence[str], *, what: str) -> list[str]:
    """Texts of a file, of a list, or of the built-in questions; `what` is the setting that errors name.

    Raises:
        InputError: a file that cannot be read, rows without `text`, or nothing to read.
    """
    if text == BUILT_IN:
        return [f"{open_prompt(question)} {question.choices[question.answer]}" for question in load_probe("evaluation")]
    if not isinstance(text, str | Path):
        texts = list(text)
    elif (path := user_path(text)).name.removesuffix(".gz").endswith((".jsonl", ".json")):
        texts = [text_field(row, "text", where) for where, _, row in read_rows(path)]
    else:
        try:
            texts = [path.read_text(encoding="utf-8")]
        except (OSError, ValueError) as error:
            reason = (error.strerror or error) if isinstance(error, OSError) else "it is not UTF-8"
            raise InputError(
                f"{what}: text {str(text)!r} cannot be read ({reason}): "
                f"name a text file, JSON Lines with 'text', or {BUILT_IN!r}"
            ) from error
    if not any(part.strip() for part in texts):
        raise InputError(f"{what}: the text is empty: give some text")
    return texts


def token_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_tokens: int, window: int, what: str
) -> list[torch.Tensor]:
    """Token ids (T,) of at most `window` tokens; the first of each is not predicted, the others count.

    Raises:
        InputError: no text has two tokens.
    """

    found, left = [], max_tokens
    for ids_T in chain.from_iterable(windows_of(tokenizer, text, window) for text in texts):
        if left <= 0:
            break
        found.append(ids_T[: left + 1])
        left -= len(found[-1]) - 1
    if not found:
        raise InputError(f"{what}: the text has no two tokens in a row: give a longer one")
    return found
