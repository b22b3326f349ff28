"""BFCL's requests: what each form of row becomes, the drawn order, the limit of tokens, and what is refused."""

import gzip
import json
import logging
from collections import Counter

import pytest

from loki.errors import InputError
from loki.evaluation.bfcl import is_right
from loki.prompts.bfcl import AcceptedCall, load_requests, num_tokens, read_requests
from loki.training.encoding import encode_examples

BREW = {
    "name": "tea.brew",
    "description": "Brew a pot – hot.",
    "parameters": {
        "type": "dict",
        "properties": {"leaf": {"type": "string"}, "minutes": {"type": "integer"}},
        "required": ["leaf"],
    },
}
POUR = {"name": "pour", "arguments": {"type": "object", "properties": {"cups": {"type": "integer"}}}}
TRUTH = [{"tea.brew": {"leaf": ["oolong", "Wulong"], "minutes": ["", 4]}}]


def user(content):
    return {"role": "user", "content": content}


def row(**changes):
    values = {
        "id": "r1",
        "category": "live_simple",
        "functions": [BREW],
        "messages": [user("Oolong, please.")],
        "answer": '[tea.brew(leaf="oolong")]',
        "ground_truth": TRUTH,
    }
    return {**values, **changes}


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows):
        path = tmp_path / "calls.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
        return path

    return write_rows


@pytest.fixture
def read_one(write):
    def read(**changes):
        (request,) = read_requests(write(row(**changes)))
        return request

    return read


def test_a_request_is_read_with_instruction_and_functions_before_it(read_one):
    request = read_one()
    offered = (
        '[{"name":"tea.brew","description":"Brew a pot – hot.","parameters":{"type":"dict",'
        '"properties":{"leaf":{"type":"string"},"minutes":{"type":"integer"}},"required":["leaf"]}}]'
    )
    system = (
        "Reply with function calls such as [name(argument=value), ...], or with [] if no function fits.\n"
        f"Functions: {offered}"
    )
    assert request.messages == ({"role": "system", "content": system}, user("Oolong, please."))
    assert request.functions == (BREW,)
    assert (request.id, request.category) == ("r1", "live_simple")
    assert request.ground_truth == (AcceptedCall("tea.brew", {"leaf": ["oolong", "Wulong"], "minutes": ["", 4]}),)
    assert request.as_prompt_completion() == {
        "prompt": [{"role": "system", "content": system}, user("Oolong, please.")],
        "completion": [{"role": "assistant", "content": '[tea.brew(leaf="oolong")]'}],
    }


def test_its_own_system_text_and_the_time_join_the_one_system_message(read_one):
    turns = [{"role": "system", "content": "\nYou keep a tea room. \n"}, user("Hello"), user("Oolong")]
    request = read_one(messages=turns, time="It is noon.")
    assert [message["role"] for message in request.messages] == ["system", "user", "user"]
    assert request.messages[0]["content"].endswith('"required":["leaf"]}}]\n\nIt is noon.\n\nYou keep a tea room.')
    assert read_one(time="").messages == read_one().messages


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "single"),
        ({"functions": [BREW, POUR]}, "multiple"),
        ({"functions": [BREW, POUR], "ground_truth": [*TRUTH, {"pour": {"cups": [2]}}]}, "parallel"),
        ({"ground_truth": TRUTH * 2}, "parallel"),
        ({"ground_truth": None, "answer": None}, "irrelevance"),
        ({"ground_truth": [], "answer": "[]"}, "irrelevance"),
    ],
)
def test_kinds_come_from_calls_and_functions(read_one, changes, kind):
    request = read_one(**changes)
    assert request.kind == kind
    assert (request.answer == "[]") == (kind == "irrelevance")


@pytest.mark.parametrize(("category", "live"), [("live_simple", True), ("simple_python", False), ("alive_x", False)])
def test_live_is_what_the_category_begins_with(read_one, category, live):
    assert read_one(category=category).live is live


def test_one_object_of_calls_has_only_values_and_numbered_names(read_one):
    truth = {
        "pour_1": {"cups": 2, "guests": [{"name": "Ann"}, {"name": "Bo"}], "to": {"room": {"floor": 1}}},
        "pour_2": {"cups": 3},
        "tea.brew": {},
    }
    assert read_one(functions=[BREW, POUR], ground_truth=truth).ground_truth == (
        AcceptedCall(
            "pour",
            {"cups": [2], "guests": [[{"name": ["Ann"]}, {"name": ["Bo"]}]], "to": [{"room": [{"floor": 1}]}]},
        ),
        AcceptedCall("pour", {"cups": [3]}),
        AcceptedCall("tea.brew", {}),
    )


def test_a_number_that_belongs_to_the_name_stays(read_one):
    numbered = {**POUR, "name": "pour_1"}
    assert read_one(functions=[numbered], ground_truth={"pour_1": {"cups": 2}}).ground_truth[0].name == "pour_1"


def test_a_list_of_calls_may_have_only_values_too(read_one):
    truth = [{"tea.brew": {"leaf": "green", "minutes": 3}}]
    assert read_one(ground_truth=truth).ground_truth == (AcceptedCall("tea.brew", {"leaf": ["green"], "minutes": [3]}),)


def test_of_a_conversation_the_first_turn_with_calls_is_the_answer(write):
    turns = [
        user("Hello"),
        {"role": "assistant", "content": "What may I do?"},
        user("Two cups."),
        {"role": "assistant", "content": "[pour(cups=2)]", "tool_calls": [{"name": "pour", "arguments": {"cups": 2}}]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "There.", "tool_calls": [{"name": "pour", "arguments": {"cups": 9}}]},
    ]
    (request,) = read_requests(write({"id": "t", "system": "Other", "functions": [POUR], "messages": turns}))
    assert request.category == "toolace"
    assert request.answer == "[pour(cups=2)]"
    assert request.ground_truth == (AcceptedCall("pour", {"cups": [2]}),)
    assert [message["content"] for message in request.messages[1:]] == ["Hello", "What may I do?", "Two cups."]
    assert "Other" not in request.messages[0]["content"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"functions": []}, r"'functions' must be a list of one or more objects, not \[\]"),
        ({"functions": ["f"]}, "a function must be an object with 'name' and 'parameters', not 'f'"),
        ({"functions": [{"parameters": {}}]}, "a function's 'name' must be a text that is not blank, not nothing"),
        (
            {"functions": [{"name": "f", "parameters": {"properties": ["x"]}}]},
            r"'parameters' of 'f' must be an object with 'properties', not \{'properties': \['x'\]\}",
        ),
        ({"functions": [{"name": "f", "parameters": "x"}]}, "'parameters' of 'f' must be an object with 'properties'"),
        ({"messages": "x"}, "'messages' must be a list of objects with 'role' and 'content', not 'x'"),
        ({"messages": [{"role": "user"}]}, "a message needs 'role' and 'content', both texts, not {'role': 'user'}"),
        ({"id": ""}, "'id' must be a text that is not blank, not ''"),
        ({"category": None}, "'category' must be a text that is not blank, not nothing"),
        ({"answer": None}, "'answer' must be a text that is not blank, not nothing"),
        ({"ground_truth": None}, r"'ground_truth' has no calls but 'answer' is '\[tea.brew.*: give both, or none"),
        ({"ground_truth": "f"}, "'ground_truth' must be null, an object of calls, or a list of objects with one call"),
        ({"ground_truth": [{"f": {}, "g": {}}]}, "a list of objects with one call each"),
        ({"ground_truth": [{"f": 3}]}, "a call needs a name and an object of arguments, not {'f': 3}"),
        (
            {"messages": [user("x"), {"role": "assistant", "content": "y", "tool_calls": "z"}]},
            "'tool_calls' must be a list of objects with 'name' and 'arguments', not 'z'",
        ),
        (
            {"messages": [user("x"), {"role": "assistant", "content": "y", "tool_calls": [{"name": "f"}]}]},
            "a call needs a name and an object of arguments, not {'f': None}",
        ),
        (
            {"messages": [{"role": "assistant", "content": "y", "tool_calls": [{"name": "f", "arguments": {}}]}]},
            "the first message has 'tool_calls': begin with the user's request",
        ),
        ({"messages": [user("\ud83d")]}, r"has \\ud83d, half of a character"),
        ({"time": 12}, "'time' must be a text that is not blank, not 12"),
    ],
)
def test_what_a_row_cannot_be(write, changes, message):
    with pytest.raises(InputError, match=f"calls.jsonl.gz, line 2:? .*{message}"):
        read_requests(write(row(), row(**changes)))


def several(number):
    return [row(id=f"r{index}", messages=[user("please " * (index + 1))]) for index in range(number)]


def test_the_order_is_drawn_and_fewer_are_the_beginning_of_more(write):
    path = write(*several(20))
    ids = [request.id for request in load_requests(path)]
    assert sorted(ids) == sorted(f"r{index}" for index in range(20))
    assert ids != [f"r{index}" for index in range(20)]
    assert [request.id for request in load_requests(path, count=7)] == ids[:7]
    assert [request.id for request in load_requests(path, seed=1)] != ids


def test_the_limit_counts_tokens_as_training_reads_them(write, tokenizer, caplog):
    path = write(*several(6))
    requests = read_requests(path)
    encoded = encode_examples(tokenizer, [request.as_prompt_completion() for request in requests])
    lengths = [len(ids) for ids in encoded.input_ids]
    assert [num_tokens(tokenizer, request) for request in requests] == lengths
    with caplog.at_level(logging.INFO):
        kept = load_requests(path, tokenizer=tokenizer, max_tokens=lengths[3])
    assert sorted(request.id for request in kept) == ["r0", "r1", "r2", "r3"]
    assert f"2 of 6 requests have more than {lengths[3]} tokens" in caplog.text


def test_without_a_template_too(write, tokenizer):
    tokenizer.chat_template = None
    requests = read_requests(write(*several(2)))
    encoded = encode_examples(tokenizer, [request.as_prompt_completion() for request in requests])
    assert [num_tokens(tokenizer, request) for request in requests] == [len(ids) for ids in encoded.input_ids]


def test_what_cannot_be_taken(write, tokenizer):
    path = write(*several(3))
    with pytest.raises(InputError, match="0 requests are not possible: ask for 1 or more"):
        load_requests(path, count=0)
    with pytest.raises(InputError, match=r"4 requests are more than the 3 in .*calls.jsonl.gz: ask for fewer$"):
        load_requests(path, count=4)
    with pytest.raises(InputError, match="a limit of 9 tokens needs a tokenizer to count them: give one"):
        load_requests(path, max_tokens=9)
    with pytest.raises(
        InputError,
        match=r"1 requests are more than the 0 of at most 9 tokens in .*: ask for fewer, or allow more tokens",
    ):
        load_requests(path, count=1, tokenizer=tokenizer, max_tokens=9)
    with pytest.raises(InputError, match=r"has no requests of at most 9 tokens: name a file that has, or allow more"):
        load_requests(path, tokenizer=tokenizer, max_tokens=9)
    with pytest.raises(InputError, match=r"has no requests: name a file that has$"):
        load_requests(write())


UNANSWERABLE = {
    "bfcl_train": {
        *("simple_python_335", "simple_python_353", "multiple_178", "parallel_185"),
        *("parallel_multiple_69", "parallel_multiple_138", "parallel_multiple_155"),
        *("parallel_multiple_169", "parallel_multiple_189", "parallel_multiple_191"),
        *("live_simple_106-63-0", "live_simple_112-68-0"),
        *("live_multiple_406-140-2", "live_multiple_407-140-3", "live_multiple_410-140-6"),
    },
    "bfcl_test": {
        *("simple_python_354", "parallel_multiple_3", "parallel_multiple_86", "parallel_multiple_118"),
        *("live_multiple_862-181-3", "live_multiple_964-207-0"),
    },
    "acebench_normal_en": {"normal_single_turn_parallel_function_84"},
}
"""Rows whose reference answer is wrong by their own accepted values or types, here as for BFCL's own check."""


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "kinds", "num_live"),
    [
        ("bfcl_train", {"single": 418, "multiple": 751, "parallel": 269, "irrelevance": 117}, 760),
        ("bfcl_test", {"single": 126, "multiple": 227, "parallel": 96, "irrelevance": 69}, 268),
        ("acebench_normal_en", None, 0),
    ],
)
def test_every_reference_answer_is_right_but_known_ones(data_dir, name, kinds, num_live):
    requests = read_requests(data_dir / "toolcall" / f"{name}.jsonl.gz")
    assert kinds is None or Counter(request.kind for request in requests) == kinds
    assert sum(request.live for request in requests) == num_live
    assert {request.id for request in requests if not is_right(request.answer, request)} == UNANSWERABLE[name]


@pytest.mark.data
def test_training_and_test_requests_share_no_function_and_one_text(data_dir):
    train, test = (read_requests(data_dir / "toolcall" / f"bfcl_{part}.jsonl.gz") for part in ("train", "test"))
    train_functions, test_functions = (
        {json.dumps(function, sort_keys=True) for request in part for function in request.functions}
        for part in (train, test)
    )
    assert not train_functions & test_functions
    train_texts = {request.messages[-1]["content"] for request in train}
    # The one that no answer fits.
    assert [item.id for item in test if item.messages[-1]["content"] in train_texts] == ["live_multiple_964-207-0"]


@pytest.mark.data
def test_conversations_of_toolace_are_read_for_training(data_dir):
    requests = read_requests(data_dir / "toolcall/toolace_first100_reconstructed.jsonl")
    assert len(requests) == 83
    assert all(request.ground_truth and request.answer.startswith("[") for request in requests)
