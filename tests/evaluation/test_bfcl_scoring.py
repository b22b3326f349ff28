"""The check of function calls against hand-made cases of every rule of BFCL's, and the scores of groups."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki.embedded import EMBEDDED_NAME
from loki.errors import InputError
from loki.evaluation.bfcl import BfclReply, answer_bfcl, is_right, right_calls, score_bfcl
from loki.evaluation.function_calls import parse_calls, read_calls
from loki.models import load_model, load_tokenizer
from loki.prompts.bfcl import AcceptedCall, BfclRequest
from loki.prompts.render import render_chat


def request(truth, properties=None, *, required=(), id_="r", category="simple_python", others=()):
    """A request for calls of `f`, whose arguments have the given types."""
    schema = {"properties": properties or {}, "required": list(required)}
    functions = ({"name": "f", "parameters": schema}, *({"name": name, "parameters": schema} for name in others))
    return BfclRequest(
        id_,
        category,
        functions,
        ({"role": "system", "content": "Call."}, {"role": "user", "content": f"Do {id_}."}),
        "[]",
        tuple(AcceptedCall(name, arguments) for name, arguments in truth),
    )


def fits(value, accepted, schema):
    """Whether `f(a=value)` is right where `a` may be one of `accepted`."""
    return right_calls([("f", {"a": value})], request([("f", {"a": accepted})], {"a": schema}))


STRING, INTEGER, FLOAT, BOOLEAN = ({"type": name} for name in ("string", "integer", "float", "boolean"))
STRINGS, FLOATS = {"type": "array", "items": STRING}, {"type": "array", "items": FLOAT}
OBJECT, OBJECTS = {"type": "dict"}, {"type": "array", "items": {"type": "dict"}}


@pytest.mark.parametrize(
    ("value", "accepted", "schema", "right"),
    [
        # Texts: case, spaces and some punctuation do not count, and both quotes are alike.
        ("april 1 2024", ["April 1, 2024"], STRING, True),
        ("APRIL-1/2024", ["April 1, 2024"], STRING, True),
        ("x^2", ["x**2"], STRING, True),
        ("don't", ['don"t'], STRING, True),
        ("a:b", ["ab"], STRING, False),
        ("May 1, 2024", ["April 1, 2024"], STRING, False),
        ("ny", ["New York", "NY"], STRING, True),
        ("", ["NY", ""], STRING, True),
        ("", ["NY"], STRING, False),
        (5, ["5"], STRING, False),
        # Numbers: a whole number may stand for a float, not the other way round.
        (5, [5], INTEGER, True),
        (6, [5], INTEGER, False),
        (-5, [-5], INTEGER, True),
        (5.0, [5], INTEGER, False),
        ("5", [5], INTEGER, False),
        (True, [1], INTEGER, False),
        (5, [5.0], FLOAT, True),
        (5, [5], FLOAT, True),
        (5.0, [5], FLOAT, True),
        (5, [5.5], FLOAT, False),
        (10**400, [5.5], FLOAT, False),
        (10**400, [10**400], FLOAT, True),
        (5, [5.0], {"type": "number"}, True),
        (True, [True], BOOLEAN, True),
        (False, [True], BOOLEAN, False),
        (1, [True], BOOLEAN, False),
        ("True", [True], BOOLEAN, False),
        # Another type than the schema's counts where the first accepted value has it, and then as it stands.
        (None, ["", None], STRING, True),
        (None, [""], STRING, False),
        ("now", ["now"], INTEGER, True),
        ("Now", ["now"], INTEGER, False),
        (3, ["now"], INTEGER, False),
        ("x", ["x"], {}, True),
        (3, [3], {}, True),
        # Lists.
        (["a b", "C"], [["AB", "c"]], STRINGS, True),
        (["c", "ab"], [["ab", "c"]], STRINGS, False),
        (["ab"], [["ab", "c"]], STRINGS, False),
        (["x"], [["y"], ["x"]], STRINGS, True),
        ([], [["x"], ""], STRINGS, True),
        ([], [["x"]], STRINGS, False),
        ("x", [["x"]], STRINGS, False),
        ([1.5, 2.0], [[1.5, 2.0]], FLOATS, True),
        ([1.5, 2], [[1.5, 2.0]], FLOATS, False),
        ([1, 2.0], [[1, 2.0]], FLOATS, True),
        ((1.5, 2.0), [[1.5, 2.0]], FLOATS, False),
        ((1.5, 2.0), [[1.5, 2.0]], {"type": "tuple", "items": FLOAT}, True),
        ([[1, 2]], [[[1, 2]]], {"type": "array", "items": {"type": "array"}}, True),
        ([[1, 3]], [[[1, 2]]], {"type": "array", "items": {"type": "array"}}, False),
        ([1, "x"], [[1, "X"]], {"type": "array"}, True),
        # Objects: each key has accepted values of its own.
        ({"k": "A b", "n": 2}, [{"k": ["x", "ab"], "n": [2]}], OBJECT, True),
        ({"n": 2, "k": "ab"}, [{"k": ["ab"], "n": [2]}], OBJECT, True),
        ({"k": "ab"}, [{"k": ["ab"], "n": [2]}], OBJECT, False),
        ({"k": "ab"}, [{"k": ["ab"], "n": [2, ""]}], OBJECT, True),
        ({"k": "ab", "n": 3}, [{"k": ["ab"], "n": [2, ""]}], OBJECT, False),
        ({"k": "ab", "m": 3}, [{"k": ["ab"]}], OBJECT, False),
        ({"k": "c"}, [{"k": ["ab"]}, {"k": ["c"]}], OBJECT, True),
        ({}, [{"k": [""]}], OBJECT, True),
        ({}, ["", {"k": [1]}], OBJECT, False),
        ({"k": ["a", "b"]}, [{"k": [["a", "b"]]}], OBJECT, True),
        ({"k": ["A", "b"]}, [{"k": [["a", "b"]]}], OBJECT, False),
        ({"k": {"x": 1}}, [{"k": [{"x": 1}]}], OBJECT, True),
        ("k", [{"k": ["ab"]}], OBJECT, False),
        ([{"k": "A"}, {"k": "b"}], [[{"k": ["a"]}, {"k": ["b"]}]], OBJECTS, True),
        ([{"k": "b"}, {"k": "a"}], [[{"k": ["a"]}, {"k": ["b"]}]], OBJECTS, False),
        ([{"k": "a"}], [[{"k": ["a"]}, {"k": ["b"]}]], OBJECTS, False),
        ([{"k": "b"}], [[{"k": ["a"]}], [{"k": ["b"]}]], OBJECTS, True),
        (["a"], [[{"k": ["a"]}]], OBJECTS, False),
        ([], [[{"k": ["a"]}], ""], OBJECTS, True),
        ([{"k": "a"}], ["", None], OBJECTS, False),
    ],
)
def test_values_by_hand(value, accepted, schema, right):
    assert fits(value, accepted, schema) is right


PROPERTIES = {"a": INTEGER, "b": INTEGER}


@pytest.mark.parametrize(
    ("call", "right"),
    [
        (("f", {"a": 1}), True),
        (("f", {"a": 1, "b": 2}), True),
        (("f", {"b": 2, "a": 1}), True),
        (("f", {"b": 2}), False),
        (("f", {"a": 1, "b": 3}), False),
        (("f", {"a": 1, "c": 2}), False),
        (("F", {"a": 1}), False),
        (("m.f", {"a": 1}), False),
    ],
)
def test_names_and_arguments_by_hand(call, right):
    assert right_calls([call], request([("f", {"a": [1], "b": ["", 2]})], PROPERTIES)) is right


def test_what_the_function_requires_must_be_there_even_if_it_may_be_left_out():
    accepted = [("f", {"a": [1], "b": ["", 2]})]
    assert right_calls([("f", {"a": 1})], request(accepted, PROPERTIES, required=["a"]))
    assert not right_calls([("f", {"a": 1})], request(accepted, PROPERTIES, required=["a", "b"]))


def test_an_argument_must_be_accepted_and_known_to_the_function():
    assert not right_calls([("f", {"a": 1, "c": 3})], request([("f", {"a": [1], "c": [3]})], PROPERTIES))
    assert not right_calls([("f", {"a": 1, "b": 2})], request([("f", {"a": [1]})], PROPERTIES))


def test_several_calls_are_right_in_any_order():
    wanted = request([("f", {"a": [1]}), ("f", {"a": [2]}), ("g", {"a": [1]})], PROPERTIES, others=["g"])
    calls = [("f", {"a": 1}), ("f", {"a": 2}), ("g", {"a": 1})]
    assert all(right_calls(order, wanted) for order in itertools.permutations(calls))
    assert not right_calls(calls[:2], wanted)
    assert not right_calls([*calls, calls[0]], wanted)
    assert not right_calls([calls[0], calls[0], calls[2]], wanted)


def test_a_call_that_fits_two_is_given_to_the_one_that_needs_it():
    """The first that fits is not always the right one: a=1 fits both, and only it fits the second."""
    wanted = request([("f", {"a": [1, 2, 3]}), ("f", {"a": [1, 2]}), ("f", {"a": [1]})], PROPERTIES)
    calls = [("f", {"a": 1}), ("f", {"a": 2}), ("f", {"a": 3})]
    assert all(right_calls(order, wanted) for order in itertools.permutations(calls))
    assert not right_calls([("f", {"a": 2}), ("f", {"a": 2}), ("f", {"a": 3})], wanted)


@given(st.data())
def test_pairing_agrees_with_trying_every_order(data):
    values = st.integers(0, 3)
    accepted = data.draw(st.lists(st.lists(values, min_size=1, max_size=3), min_size=1, max_size=4))
    given_ = data.draw(st.lists(values, min_size=len(accepted), max_size=len(accepted)))
    wanted = request([("f", {"a": options}) for options in accepted], PROPERTIES)
    right = any(
        all(value in options for value, options in zip(order, accepted, strict=True))
        for order in itertools.permutations(given_)
    )
    assert right_calls([("f", {"a": value}) for value in given_], wanted) is right


ONE = request([("f", {"a": [-1]})], PROPERTIES)
NONE = request([], PROPERTIES)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("[f(a=-1)]", True),
        ("f(a=-1)", True),
        ("`[f(a=-1)]`", True),
        ("```\n[f(a=-1)]\n```", True),
        ("[f(a=-1)", True),
        ("Sure! [f(a=-1)]", False),
        ("[f(a=-1)] done", False),
        ("[f(-1)]", False),
        ("[f(a=b)]", False),
        ("[f(a=0-1)]", False),
        ("[]", False),
        ("", False),
    ],
)
def test_how_a_reply_may_be_written(text, right):
    assert is_right(text, ONE) is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("[]", True),
        ("", True),
        ("I cannot do that.", True),
        ("No function such as half(x) fits.", True),
        ("[f(a=-1)]", False),
        ("f()", False),
        ("[unknown(a=1)]", False),
        ("[f(a=1, b=", False),
        ("I call f(1) now", False),
    ],
)
def test_a_refusal_makes_no_call_and_begins_none(text, right):
    assert is_right(text, NONE) is right


def test_nested_values_are_read_and_nothing_else():
    (call,) = read_calls('[m.f(a=[1, {"k": (None, "x")}], b=-2.5, c=False)]')
    assert call == ("m.f", {"a": [1, {"k": (None, "x")}], "b": -2.5, "c": False})
    for value in ("{1, 2}", 'b"x"', "1j", "...", '{1: "x"}', "[b'x']", "(x,)", "1+1", "f()"):
        assert read_calls(f"[f(a={value})]") is None, value
    assert parse_calls("[f(a=[1])]") is None
    assert parse_calls("[f(a=None)]") is None


def reply(id_, right, **changes):
    return BfclReply(request(changes.pop("truth", [("f", {})]), id_=id_, **changes), "", right)


def test_scores_of_groups_by_hand():
    two = [("f", {}), ("f", {})]
    replies = [
        reply("s1", True),
        reply("s2", False, category="live_simple"),
        reply("m", True, category="live_multiple", others=["g"]),
        reply("p", False, truth=two),
        reply("i1", True, truth=[]),
        reply("i2", False, truth=[]),
        reply("i3", True, truth=[], category="live_irrelevance"),
    ]
    scores = score_bfcl(replies)
    found = {name: dict(zip(group.ids, group.scores, strict=True)) for name, group in scores.items()}
    assert found == {
        "bfcl": {"s1": 1, "s2": 0, "m": 1, "p": 0, "i1": 1, "i2": 0, "i3": 1},
        "bfcl_calls": {"s1": 1, "s2": 0, "m": 1, "p": 0},
        "bfcl_single": {"s1": 1, "s2": 0},
        "bfcl_multiple": {"m": 1},
        "bfcl_parallel": {"p": 0},
        "bfcl_live": {"s2": 0, "m": 1},
        "bfcl_non_live": {"s1": 1, "p": 0},
        "bfcl_irrelevance": {"i1": 1, "i2": 0, "i3": 1},
    }
    assert all(group.task == name and group.metric == "right" for name, group in scores.items())
    assert scores["bfcl"].mean.value == pytest.approx(400 / 7)


def test_a_group_without_requests_has_no_score():
    # Nothing is live: what others than BFCL collected has no such parts.
    assert set(score_bfcl([reply("s", True)])) == {"bfcl", "bfcl_calls", "bfcl_single"}
    assert set(score_bfcl([reply("s", True)], "toolace")) == {"toolace", "toolace_calls", "toolace_single"}
    with pytest.raises(InputError, match="no replies are there to score: answer at least one request"):
        score_bfcl([])


def test_replies_are_paired_with_their_requests(tokenizer):
    requests = [request([("f", {"a": [index]})], PROPERTIES, id_="x" * (index + 1)) for index in range(5)]
    said = {
        tuple(tokenizer(render_chat(tokenizer, item.messages)).input_ids): f" [f(a={index % 4})] "
        for index, item in enumerate(requests)
    }
    seen = []

    def generate(input_ids, attention_mask, max_new_tokens, **_):
        seen.append((len(input_ids), max_new_tokens))
        texts = [said[tuple(ids[mask.bool()].tolist())] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        new = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="right")
        return torch.cat([input_ids, new.input_ids], dim=1)

    model = SimpleNamespace(device=torch.device("cpu"), generate=generate)
    replies = answer_bfcl(model, tokenizer, requests, batch_size=2, max_new_tokens=9)
    assert [item.request.id for item in replies] == [item.id for item in requests]
    assert [item.text for item in replies] == ["[f(a=0)]", "[f(a=1)]", "[f(a=2)]", "[f(a=3)]", "[f(a=0)]"]
    assert [item.right for item in replies] == [True, True, True, True, False]
    assert seen == [(2, 9), (2, 9), (1, 9)]


@pytest.mark.real
def test_the_real_model_answers_eight_requests_as_one_by_one():
    cities = ("Oslo", "Lima", "Rome", "Cairo", "Paris", "Quito", "Kyoto", "Minsk")
    function = {
        "name": "get_weather",
        "parameters": {"type": "dict", "properties": {"city": STRING}, "required": ["city"]},
    }
    system = (
        f"Reply with a function call such as [name(argument=value)].\nFunctions: [{function}]\n"
        + '"Weather in Bonn?" is answered [get_weather(city="Bonn")]'
    )
    requests = [
        BfclRequest(
            city,
            "simple_python",
            (function,),
            ({"role": "system", "content": system}, {"role": "user", "content": f"Weather in {city}?"}),
            f'[get_weather(city="{city}")]',
            (AcceptedCall("get_weather", {"city": [city]}),),
        )
        for city in cities
    ]
    model, tokenizer = load_model(EMBEDDED_NAME, dtype="float32"), load_tokenizer(EMBEDDED_NAME)
    replies = answer_bfcl(model, tokenizer, requests, batch_size=8, max_new_tokens=12)
    alone = [answer_bfcl(model, tokenizer, [item], max_new_tokens=12)[0] for item in requests[:2]]
    assert [item.text for item in replies[:2]] == [item.text for item in alone]
    assert len({item.text for item in replies}) > 1
    assert [item.right for item in replies] == [is_right(item.text, item.request) for item in replies]
