"""Function calls of the Berkeley Function Calling Leaderboard (BFCL): requests with every accepted call.

Single requests only. BFCL's multi-turn part is not read, and so is not measured.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loki.errors import InputError
from loki.prompts.json_lines import read_rows, shown, text_field, text_value, user_path, whole_text
from loki.prompts.render import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BfclKind = Literal["single", "multiple", "parallel", "irrelevance"]
INSTRUCTION = "Reply with function calls such as [name(argument=value), ...], or with [] if no function fits."
REFUSAL = "[]"
LEFT_OUT = ""
"""Among the accepted values of an argument it says that the argument may be left out."""
SCHEMA_FIELDS = ("parameters", "arguments")
"""Where a function's arguments are described: as BFCL names it, and as some rows of ACEBench do."""


@dataclass(frozen=True)
class AcceptedCall:
    """A call that must be made, in any of several wordings."""

    name: str
    arguments: Mapping[str, Sequence[Any]]
    """Accepted values of each argument, in BFCL's form: in an object each key has a list of accepted values again."""


@dataclass(frozen=True)
class BfclRequest:
    """A request with functions on offer, and the calls that are right."""

    id: str
    category: str
    """As the file names it, such as `live_multiple`."""
    functions: tuple[Mapping[str, Any], ...]
    """Functions on offer, as the file describes them."""
    messages: tuple[Mapping[str, str], ...]
    """What the model reads: instruction, functions and the row's own system text in one message, then the request."""
    answer: str
    """One right reply, for training; `[]` where no function fits."""
    ground_truth: tuple[AcceptedCall, ...]
    """One for each call, in any order; empty where no function fits."""

    @property
    def kind(self) -> BfclKind:
        """No call, several calls, one call with a choice of functions, or one call of the only function."""
        if not self.ground_truth:
            return "irrelevance"
        if len(self.ground_truth) > 1:
            return "parallel"
        return "multiple" if len(self.functions) > 1 else "single"

    @property
    def live(self) -> bool:
        """Whether users of the leaderboard wrote it."""
        return self.category.startswith("live_")

    def as_prompt_completion(self) -> dict[str, Any]:
        """The form that `loki train` and TRL take."""
        return {"prompt": list(self.messages), "completion": [{"role": "assistant", "content": self.answer}]}


def load_requests(
    path: str | Path,
    *,
    count: int | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int | None = None,
) -> list[BfclRequest]:
    """The first `count` requests of a file (None: all), in an order drawn from `seed`; fewer are a part of more.

    With `max_tokens`, requests that are longer with their answer, in the tokenizer's chat template, are left out
    first; how many is logged.

    Raises:
        InputError: a file that `read_requests` does not read, `max_tokens` without a tokenizer, or too few requests.
    """
    if count is not None and count < 1:
        raise InputError(f"{count} requests are not possible: ask for 1 or more")
    requests = read_requests(path)
    num_read = len(requests)
    if max_tokens is not None:
        if tokenizer is None:
            raise InputError(f"a limit of {max_tokens} tokens needs a tokenizer to count them: give one")
        requests = [request for request in requests if num_tokens(tokenizer, request) <= max_tokens]
        logger.info("%d of %d requests have more than %d tokens", num_read - len(requests), num_read, max_tokens)
    limit, remedy = ("", "") if max_tokens is None else (f" of at most {max_tokens} tokens", ", or allow more tokens")
    if count is not None and len(requests) < count:
        raise InputError(f"{count} requests are more than the {len(requests)}{limit} in {path}: ask for fewer{remedy}")
    if not requests:
        raise InputError(f"{path} has no requests{limit}: name a file that has{remedy}")
    random.Random(seed).shuffle(requests)
    return requests[:count]


def read_requests(path: str | Path) -> list[BfclRequest]:
    """All requests of a JSON Lines file in the file's order.

    A row has `id`, `category`, `functions`, `messages`, `answer` and `ground_truth`; both of the last are null where
    no function fits. Three forms are known:

    - BFCL: `ground_truth` lists calls, each with the accepted values of every argument;
    - ACEBench: it is one object from name to arguments, each with its only value. A number after the name of a
      repeated call (`_1`) is no part of it. `time`, the time that the request assumes, joins the system message;
    - ToolACE: conversations whose assistant turns have `tool_calls`. The first such turn is the answer to all
      before it, and the row's own system text, which lists the functions in another form, is not taken.

    Raises:
        InputError: the file cannot be read, or a row has another form.
    """
    return [_request(row, where) for where, _, row in read_rows(user_path(path))]


def num_tokens(tokenizer: PreTrainedTokenizerBase, request: BfclRequest) -> int:
    """Tokens of the request with its answer, as training reads them."""
    if tokenizer.chat_template is None:
        prompt = tokenizer(render_chat(tokenizer, request.messages)).input_ids
        return len(prompt) + len(tokenizer(request.answer, add_special_tokens=False).input_ids) + 1
    messages = [*request.messages, {"role": "assistant", "content": request.answer}]
    return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])


def argument_schema(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a function's description that has `properties` and `required`; empty where it takes nothing."""
    return next((function[name] for name in SCHEMA_FIELDS if function.get(name)), {})


def _request(row: Mapping[str, Any], where: str) -> BfclRequest:
    functions = _functions(row.get("functions"), where)
    turns = _turns(row.get("messages"), where)
    called = next((index for index, turn in enumerate(turns) if turn.get("tool_calls")), None)
    if called == 0:
        raise InputError(f"{where}: the first message has 'tool_calls': begin with the user's request")
    if called is None:
        category = text_field(row, "category", where)
        truth = _ground_truth(row.get("ground_truth"), {function["name"] for function in functions}, where)
        answer = _answer(row, truth, where)
    else:
        category, answer = "toolace", turns[called]["content"]
        truth = _tool_calls(turns[called]["tool_calls"], where)
        turns = turns[:called]
    return BfclRequest(
        id=text_field(row, "id", where),
        category=category,
        functions=functions,
        messages=_messages(functions, turns, row.get("time"), where),
        answer=answer,
        ground_truth=tuple(truth),
    )


def _functions(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: 'functions' must be a list of one or more objects, not {shown(value)}")
    for function in value:
        if not isinstance(function, Mapping):
            raise InputError(
                f"{where}: a function must be an object with 'name' and 'parameters', not {shown(function)}"
            )
        text_value(function.get("name"), f"{where}: a function's 'name'")
        schema = argument_schema(function)
        if not isinstance(schema, Mapping) or not isinstance(schema.get("properties", {}), Mapping):
            raise InputError(
                f"{where}: 'parameters' of {function['name']!r} must be an object with 'properties', "
                f"not {shown(schema)}"
            )
    return tuple(value)


def _turns(value: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: 'messages' must be a list of objects with 'role' and 'content', not {shown(value)}")
    for turn in value:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(name), str) for name in ("role", "content")):
            raise InputError(f"{where}: a message needs 'role' and 'content', both texts, not {shown(turn)}")
    return value


def _messages(
    functions: Sequence[Mapping[str, Any]], turns: Sequence[Mapping[str, Any]], time: Any, where: str
) -> tuple[Mapping[str, str], ...]:
    offered = json.dumps(list(functions), ensure_ascii=False, separators=(",", ":"))
    parts = [f"{INSTRUCTION}\nFunctions: {offered}"]
    if time:
        parts.append(text_value(time, f"{where}: 'time'").strip())
    parts += [turn["content"].strip() for turn in turns if turn["role"] == "system"]
    spoken = [{"role": turn["role"], "content": turn["content"]} for turn in turns if turn["role"] != "system"]
    messages = ({"role": "system", "content": "\n\n".join(parts)}, *spoken)
    for message in messages:
        whole_text(message["content"], where)
    return messages


def _answer(row: Mapping[str, Any], truth: Sequence[AcceptedCall], where: str) -> str:
    if truth:
        return text_field(row, "answer", where)
    if row.get("answer") not in (None, REFUSAL):
        raise InputError(
            f"{where}: 'ground_truth' has no calls but 'answer' is {shown(row['answer'])}: give both, or none"
        )
    return REFUSAL


def _tool_calls(value: Any, where: str) -> list[AcceptedCall]:
    if not isinstance(value, list) or not all(isinstance(call, Mapping) for call in value):
        raise InputError(
            f"{where}: 'tool_calls' must be a list of objects with 'name' and 'arguments', not {shown(value)}"
        )
    return [_exact_call(call.get("name"), call.get("arguments"), where) for call in value]


def _ground_truth(value: Any, names: set[str], where: str) -> list[AcceptedCall]:
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [_exact_call(_offered_name(name, names), arguments, where) for name, arguments in value.items()]
    if not isinstance(value, list) or not all(isinstance(call, Mapping) and len(call) == 1 for call in value):
        raise InputError(
            f"{where}: 'ground_truth' must be null, an object of calls, or a list of objects with one call each, "
            f"not {shown(value)}"
        )
    return [_accepted_call(name, arguments, where) for call in value for name, arguments in call.items()]


def _accepted_call(name: str, arguments: Any, where: str) -> AcceptedCall:
    if isinstance(arguments, Mapping) and all(isinstance(accepted, list) for accepted in arguments.values()):
        return AcceptedCall(name, dict(arguments))
    # ACEBench writes some calls as a list too: their values are no lists of accepted ones.
    return _exact_call(name, arguments, where)


def _offered_name(name: str, names: set[str]) -> str:
    """The name without the number that keeps the keys of an object apart."""
    return name if name in names else re.sub(r"_\d+$", "", name)


def _exact_call(name: Any, arguments: Any, where: str) -> AcceptedCall:
    """A call of which each argument has one value."""
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise InputError(f"{where}: a call needs a name and an object of arguments, not {shown({name: arguments})}")
    return AcceptedCall(name, {key: [_only(value)] for key, value in arguments.items()})


def _only(value: Any) -> Any:
    """A value in BFCL's form of accepted values: objects, alone or in a list, list what each key may be."""
    if isinstance(value, Mapping):
        return {key: [inner] for key, inner in value.items()}
    if isinstance(value, list):
        return [_only(item) if isinstance(item, Mapping) else item for item in value]
    return value
