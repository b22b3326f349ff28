"""Training examples: the built-in function-calling task, or a JSON Lines file of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loki.errors import InputError
from loki.prompts.function_calls import make_examples

BUILT_IN = "function-calls"


def load_examples(source: str, *, count: int | None, seed: int) -> list[dict[str, Any]]:
    """Examples in TRL's prompt/completion form (lists of chat messages); the loss is on completions only.

    `source` is `function-calls` (`count` examples are made from `seed`), or a JSON Lines file whose rows have
    `prompt` and `completion` (texts or lists of messages) or `messages` that end with the assistant's, of
    which the first `count` are taken.

    Raises:
        InputError: no such file, a row of another form, or no rows.
    """
    if source == BUILT_IN:
        if count is None:
            raise InputError(f"{BUILT_IN} needs the number of examples to make: give --examples")
        return [example.as_prompt_completion() for example in make_examples("train", count, seed)]
    path = Path(source).expanduser()
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(
            f"training data {source!r} cannot be read ({error.strerror}): name a JSON Lines file or {BUILT_IN!r}"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"training data {source!r} is not UTF-8 text: name a JSON Lines file") from error
    if not lines:
        raise InputError(f"training data {source!r} is empty: give at least one example")
    return [_example(line, f"{source}, line {number}") for number, line in enumerate(lines[:count], start=1)]


def _example(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error.msg}") from error
    if isinstance(row, Mapping):
        if "prompt" in row and "completion" in row:
            return {
                "prompt": _messages(row["prompt"], "user", where),
                "completion": _messages(row["completion"], "assistant", where),
            }
        messages = row.get("messages")
        if isinstance(messages, list) and len(messages) > 1:
            messages = _messages(messages, "user", where)
            if messages[-1]["role"] == "assistant":
                return {"prompt": messages[:-1], "completion": messages[-1:]}
    raise InputError(
        f"{where} has neither 'prompt' and 'completion' nor 'messages' that end with the assistant's: "
        "write it in one of these forms"
    )


def _messages(value: Any, role: str, where: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(
        isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value
    ):
        raise InputError(f"{where}: a message needs 'role' and 'content'")
    return [{"role": str(message["role"]), "content": str(message["content"])} for message in value]
