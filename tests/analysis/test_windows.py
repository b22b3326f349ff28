"""Prompts as texts of a bounded number of tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_tokenizer

from loki.analysis.windows import cut, encode_windows
from loki.errors import InputError
from loki.prompts.prompt import Prompt

START = 99


def lists(windows):
    return [window.tolist() for window in windows]


def test_windows_by_hand():
    assert lists(cut(torch.arange(4), 4, None)) == [[0, 1, 2, 3]]
    assert lists(cut(torch.arange(5), 4, None)) == [[0, 1, 2], [3, 4]]
    assert lists(cut(torch.arange(9), 4, None)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_the_start_token_is_in_front_of_every_window():
    ids_T = torch.tensor([START, 0, 1, 2, 3, 4])
    assert lists(cut(ids_T, 4, START)) == [[START, 0, 1, 2], [START, 3, 4]]
    assert lists(cut(ids_T, 6, START)) == [ids_T.tolist()]
    assert lists(cut(ids_T, 4, 98)) == [[START, 0, 1], [2, 3, 4]]
    assert lists(cut(torch.tensor([0, START, 1]), 2, START)) == [[0, START], [1]]


@given(st.integers(1, 60), st.integers(2, 20), st.booleans())
def test_windows_hold_every_token_once_and_are_as_few_and_as_equal_as_can_be(num_tokens, most, has_start):
    body = torch.arange(num_tokens)
    ids_T = torch.cat([torch.tensor([START]), body]) if has_start else body
    windows = cut(ids_T, most, START)
    inner = [window[1:] if has_start else window for window in windows]
    assert torch.cat(inner).tolist() == body.tolist()
    lengths = [len(window) for window in windows]
    assert max(lengths) <= most
    assert max(lengths) - min(lengths) <= 1
    assert len(windows) == -(-num_tokens // (most - has_start))


def decoded(encoded):
    return [make_tokenizer().decode(tokens.ids_T) for tokens in encoded]


def test_texts_keep_their_last_word_and_messages_have_no_answer():
    message = {"role": "user", "content": "two?"}
    prompts = [
        Prompt("a", text="one two", answer="three"),
        Prompt("b", text="one\n", answer="two"),
        Prompt("c", messages=(message,), answer="2"),
        Prompt("d", text="one"),
    ]
    names, encoded = encode_windows(make_tokenizer(), prompts, 512)
    assert names == list("abcd")
    assert decoded(encoded) == ["one two three", "one\ntwo", "<|user|>two?<|end|><|assistant|>", "one"]
    plain = encode_windows(make_tokenizer(), prompts[2:3], 512, chat_template=False)[1]
    assert decoded(plain) == ["two?"]
    assert all(tokens.answer_id is None for tokens in encoded)


def test_windows_are_numbered_from_1():
    names, encoded = encode_windows(make_tokenizer(), [Prompt("a", text="abcdefgh"), Prompt("b", text="ab")], 3)
    assert names == ["a#1", "a#2", "a#3", "b"]
    assert decoded(encoded) == ["abc", "def", "gh", "ab"]


def test_a_window_of_another_prompts_name_is_refused():
    with pytest.raises(InputError, match="two texts or their windows are called 'a#2': give prompts other ids"):
        encode_windows(make_tokenizer(), [Prompt("a", text="abcd"), Prompt("a#2", text="ab")], 3)
