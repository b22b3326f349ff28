"""Scoring function calls: the reply is parsed and compared by name and arguments, never as text."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loki.progress import Track, silent
from loki.prompts.function_calls import Call, CallExample, Value
from loki.prompts.render import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Reply:
    """What a model said to one request, and whether it was right."""

    example: CallExample
    text: str
    right: bool


def parse_calls(text: str) -> tuple[Call, ...] | None:
    """Calls of a reply such as `[f(a="x", b=3), g()]`, or None if it is anything else.

    Arguments must be given by name, as literals. Nothing is executed.
    """
    try:
        with warnings.catch_warnings():
            # Python has opinions on style in what a model writes.
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    if not isinstance(tree.body, ast.List):
        return None
    calls = tuple(_parse_call(node) for node in tree.body.elts)
    return None if None in calls else tuple(call for call in calls if call is not None)


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
    """Greedy replies to every request, longest prompts first so that padding is small; in the examples' order."""
    import torch

    texts = [render_chat(tokenizer, example.messages) for example in examples]
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
    replies: dict[int, Reply] = {}
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
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        new_tokens = generated[:, inputs.input_ids.shape[1] :]
        for index, text in zip(batch, tokenizer.batch_decode(new_tokens, skip_special_tokens=True), strict=True):
            right = same_calls(parse_calls(text), examples[index].calls)
            replies[index] = Reply(examples[index], text.strip(), right)
    return [replies[index] for index in range(len(examples))]


def _parse_call(node: ast.expr) -> Call | None:
    if not isinstance(node, ast.Call) or node.args:
        return None
    arguments: dict[str, Value] = {}
    for keyword in node.keywords:
        try:
            value = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, MemoryError, RecursionError):
            return None
        if keyword.arg is None or keyword.arg in arguments or not isinstance(value, str | int | float | bool):
            return None
        arguments[keyword.arg] = value
    name = _dotted_name(node.func)
    return None if name is None else Call(name, arguments)


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
