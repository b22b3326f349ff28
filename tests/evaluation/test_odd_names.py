"""Names that are no names in Python, in replies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki.evaluation.function_calls import read_calls
from loki.evaluation.odd_names import is_odd, with_stand_ins

NAMES = ["Get News", "Get News by Topic", "/mail/valid", "Agent's List", "m.f", "from", "sort-by"]


@pytest.mark.parametrize(
    ("name", "odd"),
    [("f", False), ("m.f", False), ("Get News", True), ("from", True), ("a.class", True), ("a-b", True), ("f.", True)],
)
def test_what_python_cannot_read(name, odd):
    assert is_odd(name) is odd


@pytest.mark.parametrize(
    ("reply", "calls"),
    [
        ('[Get News(q="x")]', [("Get News", {"q": "x"})]),
        ('[Get News by Topic(q="x"), Get News()]', [("Get News by Topic", {"q": "x"}), ("Get News", {})]),
        (
            '[/mail/valid(a=1), m.f(from="a", sort-by = "b")]',
            [("/mail/valid", {"a": 1}), ("m.f", {"from": "a", "sort-by": "b"})],
        ),
        ("[Agent's List(q='it')]", [("Agent's List", {"q": "it"})]),
        # In a text a name is a text, whichever quotes it has and however they are escaped.
        ('[m.f(q="Get News(1)")]', [("m.f", {"q": "Get News(1)"})]),
        (r"[m.f(q='a\'Get News(', r=2)]", [("m.f", {"q": "a'Get News(", "r": 2})]),
        ('[m.f(q="say from=2")]', [("m.f", {"q": "say from=2"})]),
    ],
)
def test_calls_with_odd_names(reply, calls):
    assert read_calls(reply, NAMES) == tuple(calls)


@pytest.mark.parametrize(
    "reply",
    [
        '[Get Other News(q="x")]',
        "[Old Get News(q=1)]",
        "[xGet News()]",
        "[Get News]",
        "[Get News by(q=1)]",
        "[get news()]",
    ],
)
def test_other_names_are_not_read(reply):
    assert read_calls(reply, NAMES) is None


def test_without_odd_names_a_reply_is_left_alone():
    reply = '[f(a="Get News(")]'
    assert with_stand_ins(reply, ["f", "m.f"]) == (reply, {})
    assert read_calls("[Get News()]") is None
    # An argument without a name, as a careless schema has it, stands nowhere.
    assert read_calls("[f(a =1)]", ["", " "]) == (("f", {"a": 1}),)


@given(st.text(alphabet="abGet News()'\"=,[]\\ ", max_size=30))
def test_what_is_read_without_names_is_read_alike_with_them(reply):
    """Odd names add what can be read, and change nothing else."""
    plain = read_calls(reply)
    if plain is not None:
        assert read_calls(reply, NAMES) == plain


@given(st.dictionaries(st.sampled_from(["q", "from", "sort-by"]), st.text(max_size=12) | st.integers(), max_size=3))
def test_any_call_comes_back(arguments):
    for name in NAMES:
        reply = f"[{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})]"
        assert read_calls(reply, NAMES) == ((name, arguments),)
