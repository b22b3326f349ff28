import ast
import json
import os
import re
import string
import subprocess
import sys
from collections import Counter
from functools import cache

import pytest

from loki.errors import InputError
from loki.evaluation.function_calls import parse_calls, same_calls
from loki.prompts import function_calls
from loki.prompts.function_calls import Call, load_material, make_examples

PARTS = ("train", "test")
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool}


def placeholders(phrasing):
    return [name for _, name, _, _ in string.Formatter().parse(phrasing) if name is not None]


def request_of(example):
    return example.messages[-1]["content"]


def offered_names(example):
    schemas = json.loads(example.messages[0]["content"].split("Functions: ", 1)[1])
    return [schema["name"] for schema in schemas]


@cache
def pattern_of(function_name, phrasing, part):
    """A pattern that matches exactly the requests that a phrasing can make."""
    (function,) = (function for function in load_material().functions if function.name == function_name)
    pattern = ""
    for text, name, _, _ in string.Formatter().parse(phrasing):
        pattern += re.escape(text)
        if name is not None:
            values = load_material().pools[function.parameters[name]["pool"]][part]
            pattern += f"(?:{'|'.join(re.escape(str(value)) for value in values)})"
    return re.compile(pattern)


def functions_asked_for(request, part):
    """Names of all functions that have a phrasing which makes this request."""
    return {
        function.name
        for function in load_material().functions
        for phrasing in function.phrasings[part]
        # Making a pattern takes long: only those whose fixed words the request has.
        if all(text in request for text, *_ in string.Formatter().parse(phrasing))
        and pattern_of(function.name, phrasing, part).fullmatch(request)
    }


def test_there_are_at_least_40_functions_of_distinct_names_and_some_are_held_out():
    functions = load_material().functions
    assert len(functions) >= 40
    assert len({function.name for function in functions}) == len(functions)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)+", function.name) for function in functions)
    assert sum(function.held_out for function in functions) >= 8


def test_placeholders_are_the_parameters():
    for function in load_material().functions:
        required = {name for name, parameter in function.parameters.items() if not parameter.get("optional")}
        for part in PARTS:
            for phrasing in function.phrasings[part]:
                names = placeholders(phrasing)
                assert len(names) == len(set(names)), phrasing
                assert required <= set(names) <= set(function.parameters), phrasing
        mentioned = {name for part in PARTS for text in function.phrasings[part] for name in placeholders(text)}
        assert mentioned == set(function.parameters), function.name


def test_held_out_functions_have_no_training_phrasing_and_all_others_have():
    for function in load_material().functions:
        assert bool(function.phrasings["train"]) is not function.held_out, function.name
        assert len(function.phrasings["test"]) >= 3, function.name


def test_no_value_of_a_pool_is_both_in_training_and_test():
    for name, pool in load_material().pools.items():
        train, test = ({str(value).casefold() for value in pool[part]} for part in PARTS)
        assert train, name
        assert test, name
        assert not train & test, name
        assert len(train) == len(pool["train"]), name
        assert len(test) == len(pool["test"]), name


def test_values_have_the_type_of_their_parameter():
    material = load_material()
    for function in material.functions:
        for parameter in function.parameters.values():
            for part in PARTS:
                for value in material.pools[parameter["pool"]][part]:
                    assert isinstance(value, TYPES[parameter["type"]]), (function.name, value)
                    assert parameter["type"] == "boolean" or not isinstance(value, bool), (function.name, value)


def test_no_phrasing_occurs_twice():
    material = load_material()
    texts = [text for function in material.functions for part in PARTS for text in function.phrasings[part]]
    texts += [text for part in PARTS for text in material.unanswerable[part]]
    assert [text for text, count in Counter(text.casefold() for text in texts).items() if count > 1] == []


def test_test_requests_are_unseen_in_training():
    seen = {request_of(example) for example in make_examples("train", 600, 0)}
    for example in make_examples("test", 200, 0):
        request = request_of(example)
        assert request not in seen
        assert not functions_asked_for(request, "train"), request
        assert request not in load_material().unanswerable["train"]


@pytest.mark.parametrize("part", PARTS)
def test_arguments_come_from_the_pool_of_their_part(part):
    functions = {function.name: function for function in load_material().functions}
    for example in make_examples(part, 200, 1):
        for call in example.calls:
            parameters = functions[call.name].parameters
            for name, value in call.arguments.items():
                assert value in load_material().pools[parameters[name]["pool"]][part]
                assert str(value) in request_of(example)


@pytest.mark.parametrize("count", [5, 20, 100, 235])
def test_exactly_a_fifth_of_test_requests_call_held_out_functions(count):
    held_out = {function.name for function in load_material().functions if function.held_out}
    examples = make_examples("test", count, 3)
    called = [call.name for example in examples for call in example.calls]
    assert sum(name in held_out for name in called) * 5 == count
    assert all((example.kind == "unseen") == any(c.name in held_out for c in example.calls) for example in examples)


def test_training_never_calls_or_shows_a_held_out_function():
    held_out = {function.name for function in load_material().functions if function.held_out}
    for example in make_examples("train", 400, 0):
        assert example.kind in ("seen", "none")
        assert not held_out & {*offered_names(example), *(call.name for call in example.calls)}


@pytest.mark.parametrize("part", PARTS)
def test_a_fixed_share_of_requests_fits_no_function(part):
    for seed in (0, 1):
        examples = make_examples(part, 100, seed)
        assert sum(example.kind == "none" for example in examples) == round(100 * function_calls.SHARE_NONE) > 0
        assert all((example.kind == "none") == (example.calls == ()) for example in examples)
        assert all((example.kind == "none") == (example.answer == "[]") for example in examples)


@pytest.mark.parametrize("part", PARTS)
def test_a_refusal_never_offers_the_wanted_function(part):
    refusals = [example for example in make_examples(part, 400, 2) if example.kind == "none"]
    wanted = [functions_asked_for(request_of(example), part) for example in refusals]
    for example, names in zip(refusals, wanted, strict=True):
        assert not names & set(offered_names(example)), request_of(example)
    assert any(wanted), "some refusals ask for a function that exists but is not on offer"
    assert not all(wanted), "some refusals ask for what no function serves"


@pytest.mark.parametrize("part", PARTS)
def test_an_answerable_request_asks_for_the_called_function_which_is_on_offer(part):
    positions = Counter()
    for example in make_examples(part, 150, 4):
        if example.kind != "none":
            (call,) = example.calls
            names = offered_names(example)
            assert functions_asked_for(request_of(example), part) == {call.name}
            assert len(set(names)) == len(names) == function_calls.NUM_OFFERED
            positions[names.index(call.name)] += 1
    # The wanted function stands in either place; 100 fair draws leave 30..70 with a chance below 1e-4.
    assert min(positions[0], positions[1]) >= 30


@pytest.mark.parametrize("part", PARTS)
def test_answers_parse_back(part):
    for example in make_examples(part, 300, 5):
        found = parse_calls(example.answer)
        assert found == example.calls
        assert same_calls(found, example.calls)
        for a, b in zip(found, example.calls, strict=True):
            assert {name: type(value) for name, value in a.arguments.items()} == {
                name: type(value) for name, value in b.arguments.items()
            }


def test_text_of_a_call_by_hand():
    call = Call("set_x", {"name": 'He said "é"\n', "count": 3, "rate": 2.5, "on": True})
    assert str(call) == r'set_x(name="He said \"é\"\n", count=3, rate=2.5, on=True)'
    assert ast.literal_eval(str(call).split("name=")[1].split(", count")[0]) == call.arguments["name"]


def test_an_example_by_hand(monkeypatch):
    """One function with one phrasing and one value leaves nothing to chance but the order of the offers."""
    functions = tuple(
        function_calls._Function(
            name=name,
            topic=name,
            held_out=False,
            description=f"Do {name}",
            parameters={"days": {"type": "integer", "pool": "n"}, "place": {"type": "string", "pool": "p"}},
            phrasings={"train": [f"{name} at {{place}} for {{days}}"], "test": []},
        )
        for name in ("ski", "row")
    )
    pools = {"n": {"train": [3], "test": []}, "p": {"train": ["Oslo"], "test": []}}
    material = function_calls._Material(functions, pools, {"train": [], "test": []})
    monkeypatch.setattr(function_calls, "load_material", lambda: material)
    (example,) = make_examples("train", 1, 0)
    wanted = example.calls[0].name
    assert example.calls == (Call(wanted, {"days": 3, "place": "Oslo"}),)
    assert example.answer == f'[{wanted}(days=3, place="Oslo")]'
    system, user = example.messages
    assert user == {"role": "user", "content": f"{wanted} at Oslo for 3"}
    assert system["role"] == "system"
    assert f'{{"name": "{wanted}", "description": "Do {wanted}", "parameters": ' in system["content"]
    assert '"parameters": {"days": "integer", "place": "string"}}' in system["content"]
    assert sorted(offered_names(example)) == ["row", "ski"]
    assert example.as_prompt_completion() == {
        "prompt": [system, user],
        "completion": [{"role": "assistant", "content": example.answer}],
    }
    with pytest.raises(InputError, match="3 distinct train examples are more than there are: ask for fewer"):
        make_examples("train", 3, 0)


def test_requests_are_distinct():
    requests = [request_of(example) for example in make_examples("train", 800, 6)]
    assert len(set(requests)) == 800


def test_ids_are_distinct_and_name_part_and_seed():
    assert [example.id for example in make_examples("test", 3, 9)] == ["test-9-0", "test-9-1", "test-9-2"]


def test_the_same_seed_gives_the_same_examples_and_another_seed_others():
    first, again, other = (make_examples("train", 60, seed) for seed in (1, 1, 2))
    assert first == again
    assert {request_of(e) for e in first} != {request_of(e) for e in other}


def test_examples_do_not_depend_on_the_process():
    """Python's hashes differ between processes; the examples must not."""
    code = "from loki.prompts.function_calls import make_examples; print(repr(make_examples('test', 40, 7)))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {repr(make_examples("test", 40, 7)) + "\n"}


@pytest.mark.parametrize("count", [0, -3])
def test_no_examples_are_refused(count):
    with pytest.raises(InputError, match=f"{count} examples are not possible: ask for 1 or more"):
        make_examples("train", count, 0)
