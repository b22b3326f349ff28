"""Prompt: one text or conversation whose next token is attributed, and the answer that should follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loki.errors import InputError
from loki.prompts.questions import Question
from loki.prompts.render import LETTERS, single_choice_prompt


@dataclass(frozen=True)
class Prompt:
    """A conversation for the chat template, or a plain text that never goes through it."""

    id: str
    messages: tuple[Mapping[str, str], ...] | None = None
    """Each with `role` and `content`; what follows is the assistant's reply."""
    text: str | None = None
    """Exactly one of `messages` and `text` is given."""
    answer: str | None = None
    """What should follow: a letter, a word or a reply; None where nobody said."""
    subject: str | None = None
    """As MMLU names it, or the user's own."""

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise InputError(f"prompt {self.id!r} needs either messages or a text: give one of them")


def question_prompt(question: Question) -> Prompt:
    """The question as the paper asks it, as one user message; the answer is the right option's letter."""
    message = {"role": "user", "content": single_choice_prompt(question)}
    return Prompt(question.id, messages=(message,), answer=LETTERS[question.answer], subject=question.subject)
