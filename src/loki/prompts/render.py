"""Questions and conversations as text and as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loki.prompts.questions import Question

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def single_choice_prompt(question: Question) -> str:
    """The user message that the paper analyses: the question with lettered options (design, section 1)."""
    return single_choice_message(question.question, question.choices, question.subject)


def single_choice_message(question: str, choices: Sequence[str], subject: str | None) -> str:
    """`single_choice_prompt` of 2 to 26 options; without a subject the first sentence names none."""
    about = "" if subject is None else f" about {subject.replace('_', ' ')}"
    letters = LETTERS[: len(choices)]
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    return (
        f"There is a single choice question{about}. "
        f"Answer the question by replying {', '.join(letters[:-1])} or {letters[-1]}.\n"
        f"Question: {question}\nChoices:\n{options}\nAnswer:"
    )


def open_prompt(question: Question) -> str:
    """The text after which each option's likelihood is measured; it names no letters."""
    return f"Question: {question.question}\nAnswer:"


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """Messages in the model's chat template, ready for its reply.

    A tokenizer without a template gets the contents, a blank line between them.
    """
    if tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in messages) + "\n"
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return text


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> torch.Tensor:
    """Token ids (T,) of `render_chat`; special tokens come from the template only."""
    text = render_chat(tokenizer, messages)
    ids: torch.Tensor = tokenizer(
        text, add_special_tokens=tokenizer.chat_template is None, return_tensors="pt"
    ).input_ids[0]
    return ids
