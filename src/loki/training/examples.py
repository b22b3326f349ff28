"""Training examples: the built-in function-calling task, or a JSON Lines file of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from loki.errors import InputError
from loki.prompts.function_calls import make_examples
from loki.prompts.json_lines import read_rows, shown, user_path, whole_text

BUILT_IN = "function-calls"
ASSISTANT = "assistant"
TOOL_FIELDS = ("tools", "tool_calls")
"""What a template would have to render, and nothing here does."""

Messages = list[dict[str, str]]


def load_examples(source: str, *, count: int | None, seed: int) -> list[dict[str, Any]]:
    """Examples in TRL's prompt/completion form, lists of chat messages; only answers are learned.

    `source` is `function-calls` (`count` examples are made from `seed`), or a JSON Lines file, plain or gzipped, of
    which the first `count` rows are taken. Each has

    - `prompt` and `completion`, texts or lists of messages; or
    - `messages` that end with the assistant's; or
    - `instruction` and `output`, perhaps with `input`, `system` and `history` (the Alpaca form); the input follows
      the instruction after a line break.

    The last message is the completion. Where the assistant speaks before it too, and the row does not say itself
    which is the completion, `"conversation": True` says that its earlier turns are answers as well.

    Raises:
        InputError: no such file, a row of another form, or no rows.
    """
    if count is not None and count < 1:
        raise InputError(f"{count} examples are not possible: give 1 or more")
    if source == BUILT_IN:
        if count is None:
            raise InputError(f"{BUILT_IN} needs the number of examples to make: give --examples")
        return [example.as_prompt_completion() for example in make_examples("train", count, seed)]
    path = user_path(source)
    if not path.exists():
        raise InputError(
            f"training data {source!r} cannot be read (No such file or directory): "
            f"name a JSON Lines file or {BUILT_IN!r}"
        )
    examples = [_example(row, where) for where, _, row in islice(read_rows(path), count)]
    if not examples:
        raise InputError(f"training data {source!r} is empty: give at least one example")
    return examples


def _example(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name in TOOL_FIELDS:
        if row.get(name):
            raise InputError(f"{where} has {name!r}, which are not rendered here: write them into the messages as text")
    if "prompt" in row and "completion" in row:
        return {
            "prompt": _messages(row["prompt"], "user", where),
            "completion": _messages(row["completion"], ASSISTANT, where),
        }
    if isinstance(row.get("messages"), list):
        messages = _messages(row["messages"], "user", where)
        if len(messages) > 1 and messages[-1]["role"] == ASSISTANT:
            return _conversation(messages)
    elif "instruction" in row and "output" in row:
        return _conversation(_instruction(row, where))
    raise InputError(
        f"{where} has neither 'prompt' and 'completion' nor 'messages' that end with the assistant's nor "
        "'instruction' and 'output': write it in one of these forms"
    )


def _conversation(messages: Messages) -> dict[str, Any]:
    example: dict[str, Any] = {"prompt": messages[:-1], "completion": messages[-1:]}
    if any(message["role"] == ASSISTANT for message in messages[:-1]):
        example["conversation"] = True
    return example


def _instruction(row: Mapping[str, Any], where: str) -> Messages:
    """Messages of a row in the Alpaca form; null is like absent."""
    messages: Messages = []
    if row.get("system"):
        messages.append(_message("system", row["system"], f"{where}: 'system'"))
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{where}: 'history' must be a list of [instruction, answer] pairs, not {shown(pair)}")
        messages += [
            _message(role, text, f"{where}: 'history'") for role, text in zip(("user", ASSISTANT), pair, strict=True)
        ]
    asked = [row["instruction"], *([row["input"]] if row.get("input") else [])]
    parts = [_message("user", text, f"{where}: instruction and input")["content"] for text in asked]
    return [
        *messages,
        {"role": "user", "content": "\n".join(parts)},
        _message(ASSISTANT, row["output"], f"{where}: 'output'"),
    ]


def _messages(value: Any, role: str, where: str) -> Messages:
    if isinstance(value, str):
        return [_message(role, value, where)]
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: messages must be a list of objects with 'role' and 'content', not {shown(value)}")
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"{where}: a message needs 'role' and 'content', not {shown(message)}")
        for name in TOOL_FIELDS:
            if message.get(name):
                raise InputError(f"{where}: a message has {name!r}, which are not rendered here: write them as text")
        messages.append(_message(message["role"], message.get("content"), where))
    return messages


def _message(role: str, content: Any, where: str) -> dict[str, str]:
    if not isinstance(content, str):
        raise InputError(f"{where}: a message needs 'role' and 'content', both texts, not {shown(content)}")
    return {"role": role, "content": whole_text(content, where)}
