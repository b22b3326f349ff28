"""Training data: built in, or JSON Lines of one's own."""

import gzip
import json

import pytest

from loki.errors import InputError
from loki.training.examples import load_examples

ROWS = [
    {"prompt": "say one", "completion": "one"},
    {"prompt": [{"role": "user", "content": "say two"}], "completion": [{"role": "assistant", "content": "two"}]},
    {"messages": [{"role": "user", "content": "say three"}, {"role": "assistant", "content": "three"}], "id": 3},
]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def test_all_forms_become_prompt_and_completion(tmp_path):
    examples = load_examples(write(tmp_path / "data.jsonl", ROWS), count=None, seed=0)
    assert examples == [
        {
            "prompt": [{"role": "user", "content": f"say {word}"}],
            "completion": [{"role": "assistant", "content": word}],
        }
        for word in ("one", "two", "three")
    ]


def test_count_takes_the_first(tmp_path):
    assert len(load_examples(write(tmp_path / "data.jsonl", ROWS), count=2, seed=0)) == 2


def test_built_in_task_is_made_from_the_seed():
    first, again, other = (load_examples("function-calls", count=5, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    with pytest.raises(InputError, match="--examples"):
        load_examples("function-calls", count=None, seed=0)


def test_only_a_line_feed_ends_a_row(tmp_path):
    """JSON may hold other line separators as they are: U+2028, U+0085, a form feed in an escape."""
    row = {"prompt": "a\u2028b\u0085c", "completion": "d\u2029e\x0cf"}
    (tmp_path / "data.jsonl").write_bytes(json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    (example,) = load_examples(str(tmp_path / "data.jsonl"), count=None, seed=0)
    assert example["prompt"][0]["content"] == row["prompt"]
    assert example["completion"][0]["content"] == row["completion"]


def test_a_gzipped_file_is_read(tmp_path):
    path = write(tmp_path / "data.jsonl", ROWS)
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "data.jsonl").read_bytes()))
    assert load_examples(str(packed), count=None, seed=0) == load_examples(path, count=None, seed=0)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "add", "output": "3"}, [user("add"), assistant("3")]),
        ({"instruction": "add", "input": "1 2", "output": "3"}, [user("add\n1 2"), assistant("3")]),
        ({"instruction": "add", "input": "", "output": "3", "system": None}, [user("add"), assistant("3")]),
        (
            {"instruction": "add", "output": "3", "system": "be brief", "history": [["hi", "yes"]]},
            [{"role": "system", "content": "be brief"}, user("hi"), assistant("yes"), user("add"), assistant("3")],
        ),
    ],
)
def test_the_alpaca_form(tmp_path, row, messages):
    (example,) = load_examples(write(tmp_path / "data.jsonl", [row]), count=None, seed=0)
    assert [*example["prompt"], *example["completion"]] == messages
    assert example["completion"] == messages[-1:]
    assert example.get("conversation", False) == ("history" in row)


def test_earlier_answers_of_messages_are_answers_and_those_of_a_prompt_are_not(tmp_path):
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    rows = [{"messages": messages}, {"prompt": messages[:3], "completion": messages[3:]}]
    first, second = load_examples(write(tmp_path / "data.jsonl", rows), count=None, seed=0)
    assert first == {"prompt": messages[:3], "completion": messages[3:], "conversation": True}
    assert second == {"prompt": messages[:3], "completion": messages[3:]}


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_examples_that_is_none(tmp_path, count):
    with pytest.raises(InputError, match=f"^{count} examples are not possible: give 1 or more$"):
        load_examples(write(tmp_path / "data.jsonl", ROWS), count=count, seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "line 1 is not UTF-8"),
        (b"{", "line 1 is not JSON"),
        (b'{"text": "x"}', "line 1 has neither 'prompt' and 'completion' nor 'messages'"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "line 1 has neither"),
        (b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}', "needs 'role' and 'content'"),
        (b'{"messages": ["x", "y"]}', "needs 'role' and 'content', not 'x'"),
        (b'{"prompt": 3, "completion": "x"}', "messages must be a list of objects with 'role' and 'content', not 3"),
        (b'{"prompt": [], "completion": "x"}', "messages must be a list of objects"),
        (b'{"prompt": "x", "completion": [{"role": "assistant", "content": null}]}', "both texts, not nothing"),
        (b'{"prompt": "\\ud83d", "completion": "x"}', "half of a character"),
        (b"[1]", "line 1 is \\[1\\]: write one JSON object a line"),
        (b'{"instruction": "x"}', "line 1 has neither"),
        (b'{"instruction": "x", "output": 3}', "'output': a message needs"),
        (
            b'{"instruction": "x", "output": "y", "history": [["a"]]}',
            r"'history' must be a list of \[instruction, answer",
        ),
        (b'{"tools": [{"name": "f"}], "messages": []}', "has 'tools', which are not rendered here"),
        (
            b'{"prompt": "x", "completion": [{"role": "assistant", "content": "", "tool_calls": [1]}]}',
            "a message has 'tool_calls', which are not rendered here",
        ),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_examples(str(tmp_path / "data.jsonl"), count=None, seed=0)


def test_a_missing_file_is_named():
    with pytest.raises(
        InputError, match=r"'nowhere.jsonl' cannot be read \(No such file or directory\).*function-calls"
    ):
        load_examples("nowhere.jsonl", count=None, seed=0)
