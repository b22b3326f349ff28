"""Scoring function calls: the reply is parsed and compared by name and arguments, never as text."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loki.evaluation.odd_names import with_stand_ins
from loki.progress import Track, silent
from loki.prompts.function_calls import Call, CallExample, Value
from loki.prompts.render import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 48
NamedArguments = tuple[str, Mapping[str, object]]
"""A call as it was read: the function's name, and its arguments by name."""


@dataclass(frozen=True)
class Reply:
    """What a model said to one request, and whether it was right."""

    example: CallExample
    text: str
    right: bool


def read_calls(text: str, names: Collection[str] = ()) -> tuple[NamedArguments, ...] | None:
    """Name and arguments of each call of a reply such as `[f(a="x", b=[1, 2]), g()]`, or None if it is anything else.

    Arguments must be given by name, as literals: texts, numbers, True, False, None, and lists, tuples and
    dictionaries of them. Nothing is executed. Of `names`, those of functions and arguments, the ones that Python's
    grammar does not know are read too.
    """
    text, known = with_stand_ins(text, names)
    try:
        with warnings.catch_warnings():
            # Python has opinions on style in what a model writes.
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    if not isinstance(tree.body, ast.List):
        return None
    calls = tuple(_read_call(node, known) for node in tree.body.elts)
    return None if None in calls else tuple(call for call in calls if call is not None)


def parse_calls(text: str) -> tuple[Call, ...] | None:
    """Calls of a reply such as `[f(a="x", b=3), g()]`, or None if it is anything else.

    Arguments must be given by name, as single literals. Nothing is executed.
    """
    found = read_calls(text)
    if found is None:
        return None
    calls = []
    for name, values in found:
        arguments = {argument: value for argument, value in values.items() if isinstance(value, Value)}
        if len(arguments) < len(values):
            return None
        calls.append(Call(name, arguments))
    return tuple(calls)


def same_calls(found: Sequence[Call] | None, expected: Sequence[Call]) -> bool:
    """Equal names and arguments, in any order of arguments.

    Texts are compared without regard to case, as the Berkeley Function Calling Leaderboard does; 3 equals 3.0,
    but neither "3" nor True equals 3.
    """
    if found is None or len(found) != len(expected):
        return False
    return all(
        a.name == b.name
        and a.arguments.keys() == b.arguments.keys()
        and all(_same_value(a.arguments[name], b.arguments[name]) for name in b.arguments)
        for a, b in zip(found, expected, strict=True)
    )


def answer_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[CallExample],
    *,
    batch_size: int = 16,
    track: Track = silent,
) -> list[Reply]:
    """Greedy replies to every request, in the examples' order."""
    texts = generate_replies(
        model,
        tokenizer,
        [example.messages for example in examples],
        batch_size=batch_size,
        max_new_tokens=MAX_NEW_TOKENS,
        track=track,
    )
    return [
        Reply(example, text, same_calls(parse_calls(text), example.calls))
        for example, text in zip(examples, texts, strict=True)
    ]


def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    *,
    batch_size: int,
    max_new_tokens: int,
    track: Track = silent,
) -> list[str]:
    """Greedy reply to each conversation, longest prompts first so that padding is small; in the given order."""
    import torch

    texts = [render_chat(tokenizer, messages) for messages in conversations]
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
    replies: dict[int, str] = {}
    for start in track(range(0, len(order), batch_size), "answering"):
        batch = order[start : start + batch_size]
        inputs = tokenizer(
            [texts[index] for index in batch],
            add_special_tokens=tokenizer.chat_template is None,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(model.device)
        with torch.no_grad():
            generated = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        new_tokens = generated[:, inputs.input_ids.shape[1] :]
        for index, text in zip(batch, tokenizer.batch_decode(new_tokens, skip_special_tokens=True), strict=True):
            replies[index] = text.strip()
    return [replies[index] for index in range(len(texts))]


def _read_call(node: ast.expr, known: Mapping[str, str]) -> NamedArguments | None:
    """`known` are names by the stand-ins that the tree has for them."""
    if not isinstance(node, ast.Call) or node.args:
        return None
    arguments: dict[str, object] = {}
    for keyword in node.keywords:
        try:
            value = ast.literal_eval(keyword.value)
            plain = _is_plain(value)
        except (ValueError, TypeError, MemoryError, RecursionError):
            return None
        if keyword.arg is None or keyword.arg in arguments or not plain:
            return None
        arguments[keyword.arg] = value
    name = _dotted_name(node.func)
    named = {known.get(argument, argument): value for argument, value in arguments.items()}
    return None if name is None else (known.get(name, name), named)


def _is_plain(value: object) -> bool:
    """Whether it is made of what JSON knows and tuples: no bytes, complex numbers, sets or `...`."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _dotted_name(node: ast.expr) -> str | None:
    """`f` or `math.sqrt`; None for anything that is not a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return ".".join(reversed([*parts, node.id]))


def _same_value(a: Value, b: Value) -> bool:
    if isinstance(a, str) and isinstance(b, str):
        return a.casefold() == b.casefold()
    # In Python True equals 1; as arguments they differ.
    return isinstance(a, bool) == isinstance(b, bool) and a == b
