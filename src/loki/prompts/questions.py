"""Multiple-choice questions: the built-in probe of general knowledge (4 questions for each MMLU subject)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Literal

ProbeSplit = Literal["analysis", "evaluation"]
MmluSplit = Literal["dev", "validation", "test"]


@dataclass(frozen=True)
class Question:
    """A question with two or more options, one of them right."""

    id: str
    subject: str
    """As MMLU names it, with underscores: `high_school_biology`."""
    split: ProbeSplit | MmluSplit
    """Questions used to attribute knowledge are never used to measure it."""
    question: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right option, from 0."""


def load_probe(split: ProbeSplit | None = None) -> list[Question]:
    """The built-in probe, written for this project: one half of it, or all."""
    text = resources.files("loki.prompts").joinpath("data/probe.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    questions = [Question(**{**row, "choices": tuple(row["choices"])}) for row in rows]
    return [question for question in questions if split in (None, question.split)]
