import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loki.evaluation.function_calls import answer_requests, parse_calls, same_calls
from loki.prompts.function_calls import Call, make_examples
from loki.prompts.render import render_chat


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[]", ()),
        ("[f()]", (Call("f", {}),)),
        ('[f(a="x", b=3), g()]', (Call("f", {"a": "x", "b": 3}), Call("g", {}))),
        (" \n[f(a='x')]\n", (Call("f", {"a": "x"}),)),
        ("[f(a=-2.5, b=True)]", (Call("f", {"a": -2.5, "b": True}),)),
        ('[f(a="b=[1], c")]', (Call("f", {"a": "b=[1], c"}),)),
    ],
)
def test_calls_by_hand(text, calls):
    assert parse_calls(text) == calls


DEPTH = 100_000
HOSTILE = {
    "code": '__import__("os").system("x")',
    "code-in-list": '[__import__("os").system("x")]',
    "code-as-value": '[f(a=__import__("os").system("x"))]',
    "statement": "import os",
    "two-expressions": "[f()]; [g()]",
    "prose": "Sure! [f(a=1)]",
    "empty": "",
    "call-without-list": "f(a=1)",
    "tuple": "(f(a=1),)",
    "name-only": "[f]",
    "number": "[1]",
    "comprehension": "[f() for _ in (1,)]",
    "starred-list": "[*f()]",
    "positional": "[f(1)]",
    "positional-and-named": "[f(1, b=2)]",
    "starred-arguments": "[f(*(1,))]",
    "double-star-empty": "[f(**{})]",
    "double-star": '[f(**{"a": 1})]',
    "duplicate-keyword": "[f(a=1, a=1)]",
    "one-bad-call-of-two": "[f(a=1), g(2)]",
    "name-as-value": "[f(a=b)]",
    "none": "[f(a=None)]",
    "list-value": "[f(a=[1])]",
    "dict-value": "[f(a={1: 2})]",
    "unhashable": "[f(a={[]: 1})]",
    "bytes": '[f(a=b"x")]',
    "complex": "[f(a=1+2j)]",
    "sum": "[f(a=1+2)]",
    "f-string": '[f(a=f"{1}")]',
    "null-byte": "[f(a='\0')]",
    "lone-surrogate": "[f(a='\ud800')]",
    "integer-of-5000-digits": f"[f(a={'1' * 5000})]",
    "open-brackets": "[" * DEPTH,
    "closed-brackets": "[" * DEPTH + "]" * DEPTH,
    "nested-value": f"[f(a={'[' * 150}{']' * 150})]",
    "parentheses": f"[f(a={'(' * DEPTH}1{')' * DEPTH})]",
    "signs": f"[f(a={'-' * DEPTH}1)]",
    "long-sum": f"[f(a={'1+' * DEPTH}1)]",
    "calls-of-calls": f"[f{'()' * DEPTH}]",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_anything_else_is_no_answer(text):
    assert parse_calls(text) is None


@pytest.mark.parametrize("depth", [500, DEPTH])
@pytest.mark.parametrize("tail", [".a", "()", "[0]"])
def test_a_long_chain_as_name_never_raises(tail, depth):
    parse_calls(f"[f{tail * depth}()]")


@pytest.mark.parametrize(
    "text", ["[f()()]", "[(lambda: 0)()]", '["f"()]', "[f[0]()]", '[__import__("os").system(c="x")]']
)
def test_a_function_is_called_by_its_name(text):
    assert parse_calls(text) is None


def test_nothing_is_executed(tmp_path):
    mark = tmp_path / "mark"
    for text in (
        f'[open({str(mark)!r}, "w")]',
        f"[open(file={str(mark)!r}, mode='w')]",
        f"[f(a=open({str(mark)!r}, 'w'))]",
    ):
        parse_calls(text)
    assert not mark.exists()


def test_replies_that_python_warns_about_are_read_without_a_warning():
    """What a model writes is no source of ours: the reading depends on no warning filter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = parse_calls(r'[f(a="\d")]')
    assert found == (Call("f", {"a": r"\d"}),)
    assert caught == []


@settings(deadline=None)
@given(st.text())
def test_no_text_raises(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parse_calls(text)
        parse_calls(f"[f(a={text})]")


names = st.from_regex(r"[a-z]{1,6}_[a-z]{1,6}", fullmatch=True)
arguments = st.dictionaries(
    names, st.text() | st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False)
)


@settings(deadline=None)
@given(st.lists(st.builds(Call, names, arguments), max_size=3))
def test_every_call_parses_back(calls):
    found = parse_calls(f"[{', '.join(map(str, calls))}]")
    assert same_calls(found, calls)
    assert [list(call.arguments) for call in found] == [list(call.arguments) for call in calls]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (3, 3, True),
        (3, 3.0, True),
        (3.0, 3, True),
        ("3", "3", True),
        (True, True, True),
        (3, "3", False),
        (3.0, "3.0", False),
        (1, True, False),
        (True, 1.0, False),
        (0, False, False),
        (True, "True", False),
        (True, False, False),
        (3, 4, False),
        ("Oslo", "oslo", True),
        (2**53 + 1, float(2**53), False),
    ],
)
def test_values_that_are_the_same(a, b, same):
    assert same_calls([Call("f", {"x": a})], [Call("f", {"x": b})]) is same
    assert same_calls([Call("f", {"x": b})], [Call("f", {"x": a})]) is same


def test_order_of_arguments_does_not_matter_and_order_of_calls_does():
    f, g = Call("f", {"a": 1, "b": 2}), Call("g", {})
    assert same_calls([Call("f", {"b": 2, "a": 1}), g], [f, g])
    assert not same_calls([g, f], [f, g])


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        [Call("g", {"a": 1})],
        [Call("f", {})],
        [Call("f", {"b": 1})],
        [Call("f", {"a": 1, "b": 2})],
        [Call("f", {"a": 1}), Call("f", {"a": 1})],
    ],
)
def test_other_calls_are_not_the_same(found):
    assert not same_calls(found, [Call("f", {"a": 1})])


def test_no_call_is_right_where_none_is_expected():
    assert same_calls((), ())
    assert not same_calls(None, ())


def greedy_reply(model, tokenizer, example, max_new_tokens):
    """One token after the other, the whole text read again each time."""
    ids = tokenizer(render_chat(tokenizer, example.messages), return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_replies_are_greedy_in_order_and_independent_of_batches(make_model, tokenizer, monkeypatch, batch_size):
    monkeypatch.setattr("loki.evaluation.function_calls.MAX_NEW_TOKENS", 6)
    model, examples = make_model(1), make_examples("test", 5, 0)
    replies = answer_requests(model, tokenizer, examples, batch_size=batch_size)
    assert [reply.example for reply in replies] == examples
    expected = [greedy_reply(model, tokenizer, example, 6) for example in examples]
    assert [reply.text for reply in replies] == expected
    assert len(set(expected)) > 1, "the replies can tell the requests apart"


def scripted_model(tokenizer, examples, replies):
    """Answers each request with its given reply, in batches padded on both sides."""
    texts = [render_chat(tokenizer, example.messages) for example in examples]
    script = {
        tuple(tokenizer(text).input_ids): tokenizer(reply, add_special_tokens=False).input_ids
        for text, reply in zip(texts, replies, strict=True)
    }

    def generate(input_ids, attention_mask, **_):
        said = [script[tuple(ids[mask.bool()].tolist())] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        length = max(map(len, said))
        padded = [[*ids, *[tokenizer.pad_token_id] * (length - len(ids))] for ids in said]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    return SimpleNamespace(device=torch.device("cpu"), generate=generate)


def test_a_reply_is_right_when_its_calls_are(tokenizer):
    examples = [example for example in make_examples("test", 20, 1) if example.answer.isascii()]

    def right(replies):
        model = scripted_model(tokenizer, examples, replies)
        return [reply.right for reply in answer_requests(model, tokenizer, examples, batch_size=3)]

    assert {example.kind for example in examples} == {"seen", "unseen", "none"}
    assert all(right([example.answer for example in examples]))
    assert not any(right([f"Sure: {example.answer}" for example in examples]))
    assert right(["[]"] * len(examples)) == [example.kind == "none" for example in examples]
