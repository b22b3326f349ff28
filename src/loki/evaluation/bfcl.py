"""Scoring function calls as the Berkeley Function Calling Leaderboard (BFCL) does: against all accepted values.

The rules are those of BFCL's check of Python calls, so that a share of right replies means the same here. Four
things differ on purpose:

- parallel calls are matched as a whole, where BFCL takes the first that fits and may then find the next one taken;
- arguments must be literals given by name: BFCL also takes an unquoted word as text, works out sums, and overlooks
  arguments without a name;
- a reply that begins a call and breaks off is no refusal, though no call can be read from it;
- the score of a group is the share over its requests, not a mean of shares of categories.

Single requests only: BFCL's multi-turn part is not measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loki.errors import InputError
from loki.evaluation.function_calls import NamedArguments, generate_replies, read_calls
from loki.evaluation.scores import ItemScores
from loki.progress import Track, silent
from loki.prompts.bfcl import LEFT_OUT, AcceptedCall, BfclRequest, argument_schema

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 128
METRIC = "right"
TYPES: Mapping[str, type] = {
    "string": str,
    "any": str,
    "integer": int,
    "float": float,
    "number": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "object": dict,
}
"""Python's type for each name of a type, in BFCL's words and in JSON Schema's."""
OVERLOOKED = re.compile(r"[ ,./\-_*^]")
"""Characters that do not count in a text: `April 1, 2024` is `april 1 2024`."""


@dataclass(frozen=True)
class BfclReply:
    """What a model said to one request, and whether it was right."""

    request: BfclRequest
    text: str
    right: bool


def answer_bfcl(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[BfclRequest],
    *,
    batch_size: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
    track: Track = silent,
) -> list[BfclReply]:
    """Greedy replies to every request, in the given order."""
    texts = generate_replies(
        model,
        tokenizer,
        [request.messages for request in requests],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        track=track,
    )
    return [BfclReply(request, text, is_right(text, request)) for request, text in zip(requests, texts, strict=True)]


def score_bfcl(replies: Sequence[BfclReply], task: str = "bfcl") -> dict[str, ItemScores]:
    """Share of right replies: all, by kind, and live and non-live among those that want a call.

    Groups are `bfcl`, `bfcl_calls` (all that want a call), `bfcl_single`, `bfcl_multiple`, `bfcl_parallel`,
    `bfcl_live`, `bfcl_non_live` and `bfcl_irrelevance` (the share of right refusals, which a model that never calls
    anything gets in full), or so with another `task`; one without requests is left out, and live and non-live where
    nothing is live.

    Raises:
        InputError: no replies.
    """
    if not replies:
        raise InputError("no replies are there to score: answer at least one request")
    calling = [reply for reply in replies if reply.request.ground_truth]
    live = [reply for reply in calling if reply.request.live]
    groups = {
        task: list(replies),
        f"{task}_calls": calling,
        f"{task}_single": [reply for reply in replies if reply.request.kind == "single"],
        f"{task}_multiple": [reply for reply in replies if reply.request.kind == "multiple"],
        f"{task}_parallel": [reply for reply in replies if reply.request.kind == "parallel"],
        f"{task}_live": live,
        f"{task}_non_live": [reply for reply in calling if live and not reply.request.live],
        f"{task}_irrelevance": [reply for reply in replies if reply.request.kind == "irrelevance"],
    }
    return {
        name: ItemScores(
            task=name,
            metric=METRIC,
            ids=tuple(reply.request.id for reply in group),
            scores=tuple(float(reply.right) for reply in group),
        )
        for name, group in groups.items()
        if group
    }


def is_right(text: str, request: BfclRequest) -> bool:
    """Whether a reply makes the calls that the request wants, in any order, or none where no function fits.

    A reply may stand in back quotes and may lack the brackets at its ends, as in BFCL.
    """
    calls = read_calls(_in_brackets(text), _names(request))
    if not request.ground_truth:
        return not calls and not _begins_call(text, request.functions)
    return calls is not None and right_calls(calls, request)


def right_calls(calls: Sequence[NamedArguments], request: BfclRequest) -> bool:
    """Whether the calls can be paired with the wanted ones so that each fits."""
    if len(calls) != len(request.ground_truth):
        return False
    schemas = {function["name"]: argument_schema(function) for function in request.functions}
    fitting = [
        [index for index, call in enumerate(calls) if _call_fits(call, accepted, schemas.get(accepted.name, {}))]
        for accepted in request.ground_truth
    ]
    return _can_be_paired(fitting)


def _names(request: BfclRequest) -> set[str]:
    """Of the functions on offer, and of their arguments."""
    arguments = (argument_schema(function).get("properties", {}) for function in request.functions)
    return {function["name"] for function in request.functions}.union(*arguments)


def _in_brackets(text: str) -> str:
    text = text.strip("`\n ")
    return f"{'' if text.startswith('[') else '['}{text}{'' if text.endswith(']') else ']'}"


def _begins_call(text: str, functions: Sequence[Mapping[str, Any]]) -> bool:
    names = "|".join(re.escape(function["name"]) for function in functions)
    return re.search(rf"(?<![\w.])({names})\(", text) is not None


def _can_be_paired(fitting: Sequence[Sequence[int]]) -> bool:
    """Whether every wanted call gets a call of its own out of those that fit it (Kuhn's augmenting paths)."""
    wanted_by: dict[int, int] = {}

    def find_call(wanted: int, tried: set[int]) -> bool:
        for index in fitting[wanted]:
            if index not in tried:
                tried.add(index)
                if index not in wanted_by or find_call(wanted_by[index], tried):
                    wanted_by[index] = wanted
                    return True
        return False

    return all(find_call(wanted, set()) for wanted in range(len(fitting)))


def _call_fits(call: NamedArguments, accepted: AcceptedCall, schema: Mapping[str, Any]) -> bool:
    name, arguments = call
    properties = schema.get("properties", {})
    missing = set(schema.get("required") or ()) - set(arguments)
    if name != accepted.name or missing or not _has_all(arguments, accepted.arguments):
        return False
    return all(
        argument in properties
        and argument in accepted.arguments
        and _argument_fits(value, accepted.arguments[argument], properties[argument])
        for argument, value in arguments.items()
    )


def _has_all(given: Mapping[str, object], accepted: Mapping[str, Sequence[Any]]) -> bool:
    return all(name in given or LEFT_OUT in values for name, values in accepted.items())


def _argument_fits(value: Any, accepted: Sequence[Any], schema: Mapping[str, Any]) -> bool:
    """Whether type and value are accepted.

    The type is the schema's (a whole number may stand for a float, but not inside a list) or that of the first
    accepted value. Where these two differ, values must be equal as they stand; otherwise texts, also those in a list
    or an object, count without case, spaces and punctuation, and True, 1 and 1.0 are equal only inside of those.
    """
    first = _first_type(accepted)
    wanted = _type(schema, default=first)
    inner = _type(schema.get("items"), default=None) if wanted is list else None
    if isinstance(value, tuple) and schema.get("type") == "tuple":
        value = list(value)
    if wanted is float and type(value) is int:
        value = _as_float(value)
    found = type(value)
    if found is not wanted:
        return found is first and value in accepted
    if inner is not None and not any(_items_are(value, inner, option) for option in accepted):
        return False
    if first not in (None, wanted):
        return value in accepted
    if wanted is dict:
        return any(_object_fits(value, option) for option in accepted)
    if inner is dict:
        return any(_objects_fit(value, option) for option in accepted)
    return _normal(value) in [_normal([] if wanted is list and option == LEFT_OUT else option) for option in accepted]


def _first_type(accepted: Iterable[Any]) -> type | None:
    return next((type(option) for option in accepted if option != LEFT_OUT), None)


def _type(schema: Any, *, default: type | None) -> type | None:
    name = schema.get("type") if isinstance(schema, Mapping) else None
    return TYPES.get(name, default) if isinstance(name, str) else default


def _items_are(values: Sequence[Any], inner: type, option: Any) -> bool:
    """Whether all items have the schema's type, or that of the first item of one accepted list."""
    return not isinstance(option, list) or all(type(value) in (inner, _first_type(option)) for value in values)


def _object_fits(value: Mapping[str, Any], option: Any) -> bool:
    return (
        isinstance(option, Mapping)
        and _has_all(value, option)
        and all(
            key in option and _normal_text(inner) in [_normal_text(accepted) for accepted in option[key]]
            for key, inner in value.items()
        )
    )


def _objects_fit(values: Sequence[Any], option: Any) -> bool:
    options = [] if option == LEFT_OUT else option
    return isinstance(options, list) and len(values) == len(options) and all(map(_object_fits, values, options))


def _normal(value: Any) -> Any:
    if isinstance(value, list):
        return [_normal_text(item) for item in value]
    return _normal_text(value)


def _normal_text(value: Any) -> Any:
    return OVERLOOKED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value


def _as_float(value: int) -> float | int:
    try:
        return float(value)
    except OverflowError:
        return value
