"""Prompts from a JSON Lines file of one's own: what *this* model must not forget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loki.errors import InputError
from loki.prompts.json_lines import (
    answer_field,
    choices_field,
    read_rows,
    shown,
    text_field,
    text_value,
    user_path,
    whole_text,
)
from loki.prompts.prompt import Prompt
from loki.prompts.render import LETTERS, single_choice_message

KINDS = ("question", "prompt", "text", "messages")


def load_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a `.jsonl` or `.jsonl.gz` file, whose rows may be of different kinds.

    - `question` and 2 to 26 `choices`, perhaps with the `answer` as index or letter;
    - `prompt`, one user message, perhaps with its `answer`;
    - `text`, whose last word is the answer to what precedes it;
    - `messages`, each with `role` and `content`; a last one of the assistant is the answer, or `answer` is.

    Any row may have an `id` (else it is named `file:line`) and a `subject`. Null is like absent; other fields
    are left alone.

    Raises:
        InputError: a file that cannot be read or has no rows, a row of another form, or an id given twice.
    """
    path = user_path(path)
    lines: dict[str, int] = {}
    prompts = []
    for where, number, row in read_rows(path):
        prompt = _prompt({name: value for name, value in row.items() if value is not None}, path, number, where)
        if prompt.id in lines:
            raise InputError(f"{where} has the id {shown(prompt.id)} of line {lines[prompt.id]}: ids must be unique")
        lines[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"{path} has no rows: give at least one prompt")
    return prompts


def stem(path: Path) -> str:
    """The file's name without `.jsonl` or `.jsonl.gz`."""
    return Path(path.name.removesuffix(".gz")).stem


def _prompt(row: Mapping[str, Any], path: Path, number: int, where: str) -> Prompt:
    kinds = [kind for kind in KINDS if kind in row]
    if not kinds:
        raise InputError(f"{where} is no prompt: it needs 'question' and 'choices', or 'prompt', 'text' or 'messages'")
    if len(kinds) > 1:
        raise InputError(f"{where} has {' and '.join(map(repr, kinds))}: a row is one prompt, keep one of them")
    subject = text_field(row, "subject", where) if "subject" in row else None
    content, answer = _CONTENTS[kinds[0]](row, where)
    prompt_id = _id(row, where, default=f"{stem(path)}:{number}")
    if isinstance(content, str):
        return Prompt(prompt_id, text=content, answer=answer, subject=subject)
    return Prompt(prompt_id, messages=content, answer=answer, subject=subject)


Content = tuple[str | tuple[Mapping[str, str], ...], str | None]
"""A text or messages, and the answer to it."""


def _question(row: Mapping[str, Any], where: str) -> Content:
    question, choices = text_field(row, "question", where), choices_field(row, where)
    answer = LETTERS[answer_field(row, len(choices), where)] if "answer" in row else None
    return _user_message(single_choice_message(question, choices, row.get("subject"))), answer


def _user_prompt(row: Mapping[str, Any], where: str) -> Content:
    return _user_message(text_field(row, "prompt", where)), _answer(row, where)


def _plain_text(row: Mapping[str, Any], where: str) -> Content:
    text = text_field(row, "text", where).rstrip()
    beginning, *rest = text.rsplit(maxsplit=1)
    if not rest:
        raise InputError(
            f"{where}: 'text' is one word, {shown(text)}, with nothing before it: "
            "write two words or more, or use 'prompt' and 'answer'"
        )
    (word,) = rest
    between = text[len(beginning) : -len(word)]
    # Tokens of words begin with their space; line breaks and tabs are tokens of their own.
    return beginning if not between.strip(" ") else beginning + between, word


def _conversation(row: Mapping[str, Any], where: str) -> Content:
    values = row["messages"]
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: 'messages' must be a list of messages, not {shown(values)}")
    messages = tuple(_message(value, f"{where}: message {number}") for number, value in enumerate(values, start=1))
    answer = _answer(row, where)
    if messages[-1]["role"] == "assistant":
        if answer is not None:
            raise InputError(f"{where} ends with the assistant's message and has an 'answer' too: keep one of them")
        answer = text_value(messages[-1]["content"], f"{where}: the assistant's last message")
        messages = messages[:-1]
    if not any(message["content"].strip() for message in messages):
        raise InputError(f"{where}: 'messages' have nothing to answer: give a user message")
    return messages, answer


_CONTENTS = {"question": _question, "prompt": _user_prompt, "text": _plain_text, "messages": _conversation}


def _message(value: Any, what: str) -> Mapping[str, str]:
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise InputError(f"{what} must be an object with the texts 'role' and 'content', not {shown(value)}")
    return {"role": text_field(value, "role", what), "content": whole_text(value["content"], f"{what}: 'content'")}


def _user_message(content: str) -> tuple[Mapping[str, str], ...]:
    return ({"role": "user", "content": content},)


def _answer(row: Mapping[str, Any], where: str) -> str | None:
    return text_field(row, "answer", where) if "answer" in row else None


def _id(row: Mapping[str, Any], where: str, *, default: str) -> str:
    value = row.get("id", default)
    return str(value) if type(value) is int else text_value(value, f"{where}: 'id'")
