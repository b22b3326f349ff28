"""The built-in function-calling task: a seeded generator over hand-written functions and phrasings.

Test requests use phrasings and argument values that training never shows; a fifth of them call
functions that training never shows. Some requests fit none of the functions on offer.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from loki.errors import InputError

Part = Literal["train", "test"]
Kind = Literal["seen", "unseen", "none"]
"""The called function was in training, was not, or no function fits."""
Value = str | int | float | bool

NUM_OFFERED = 2
SHARE_NONE = 0.1
SHARE_UNSEEN = 0.2
MAX_ATTEMPTS = 200
INSTRUCTION = "Reply with a function call such as [name(argument=value)], or with [] if no function fits."


@dataclass(frozen=True)
class Call:
    """A function call with literal arguments."""

    name: str
    arguments: Mapping[str, Value]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={_literal(value)}' for name, value in self.arguments.items())})"


@dataclass(frozen=True)
class CallExample:
    """A request with functions on offer, and the right reply."""

    id: str
    kind: Kind
    messages: tuple[Mapping[str, str], ...]
    """System and user message."""
    calls: tuple[Call, ...]
    """The right calls; empty where no function fits."""

    @property
    def answer(self) -> str:
        """The right reply as text."""
        return f"[{', '.join(map(str, self.calls))}]"

    def as_prompt_completion(self) -> dict[str, Any]:
        """The form that `loki train` and TRL take."""
        return {"prompt": list(self.messages), "completion": [{"role": "assistant", "content": self.answer}]}


@dataclass(frozen=True)
class _Function:
    name: str
    topic: str
    held_out: bool
    description: str
    parameters: Mapping[str, Mapping[str, Any]]
    phrasings: Mapping[str, Sequence[str]]

    def schema(self) -> dict[str, Any]:
        types = {name: parameter["type"] for name, parameter in self.parameters.items()}
        return {"name": self.name, "description": self.description, "parameters": types}


@dataclass(frozen=True)
class _Material:
    functions: tuple[_Function, ...]
    pools: Mapping[str, Mapping[str, Sequence[Value]]]
    unanswerable: Mapping[str, Sequence[str]]


@cache
def load_material() -> _Material:
    """Functions, phrasings and argument values, as shipped."""
    text = resources.files("loki.prompts").joinpath("data/functions.json").read_text(encoding="utf-8")
    values = json.loads(text)
    functions = tuple(_Function(**function) for function in values["functions"])
    return _Material(functions, values["pools"], values["unanswerable"])


def make_examples(part: Part, count: int, seed: int) -> list[CallExample]:
    """`count` distinct examples of one part of the task, the same for the same seed.

    Raises:
        InputError: `count` is below 1, or more than the material has distinct requests for.
    """
    if count < 1:
        raise InputError(f"{count} examples are not possible: ask for 1 or more")
    draw = random.Random(f"{part}-{seed}")
    kinds = _kinds(part, count)
    draw.shuffle(kinds)
    examples: list[CallExample] = []
    requests: set[str] = set()
    for kind in kinds:
        for _ in range(MAX_ATTEMPTS):
            example = _draw_example(f"{part}-{seed}-{len(examples)}", part, kind, draw)
            if example.messages[-1]["content"] not in requests:
                break
        else:
            raise InputError(f"{count} distinct {part} examples are more than there are: ask for fewer")
        requests.add(example.messages[-1]["content"])
        examples.append(example)
    return examples


def _kinds(part: Part, count: int) -> list[Kind]:
    """How many examples there are of each kind: fixed shares, not chance."""
    num_none = round(SHARE_NONE * count)
    num_unseen = round(SHARE_UNSEEN * count) if part == "test" else 0
    shares: list[tuple[Kind, int]] = [
        ("none", num_none),
        ("unseen", num_unseen),
        ("seen", count - num_none - num_unseen),
    ]
    return [kind for kind, number in shares for _ in range(number)]


def _draw_example(example_id: str, part: Part, kind: Kind, draw: random.Random) -> CallExample:
    functions = load_material().functions
    known = [function for function in functions if not function.held_out]
    if kind == "none" and draw.random() < 0.5:
        request, offered = draw.choice(load_material().unanswerable[part]), draw.sample(known, NUM_OFFERED)
        return _example(example_id, kind, offered, request, ())
    wanted = draw.choice([f for f in functions if f.held_out] if kind == "unseen" else known)
    request, call = _draw_request(wanted, part, draw)
    if kind == "none":
        others = [function for function in known if function.topic != wanted.topic]
        return _example(example_id, kind, draw.sample(others, NUM_OFFERED), request, ())
    offered = [wanted, *draw.sample([f for f in known if f != wanted], NUM_OFFERED - 1)]
    draw.shuffle(offered)
    return _example(example_id, kind, offered, request, (call,))


def _draw_request(function: _Function, part: Part, draw: random.Random) -> tuple[str, Call]:
    """A phrasing filled with values of its part, and the call it asks for, arguments in the schema's order."""
    phrasing = draw.choice(function.phrasings[part])
    mentioned = {name for _, name, _, _ in string.Formatter().parse(phrasing) if name}
    pools = load_material().pools
    arguments = {
        name: draw.choice(pools[parameter["pool"]][part])
        for name, parameter in function.parameters.items()
        if name in mentioned
    }
    return phrasing.format(**arguments), Call(function.name, arguments)


def _example(
    example_id: str, kind: Kind, offered: Sequence[_Function], request: str, calls: tuple[Call, ...]
) -> CallExample:
    schemas = json.dumps([function.schema() for function in offered], ensure_ascii=False)
    messages = (
        {"role": "system", "content": f"{INSTRUCTION}\nFunctions: {schemas}"},
        {"role": "user", "content": request},
    )
    return CallExample(example_id, kind, messages, calls)


def _literal(value: Value) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
