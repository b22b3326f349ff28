"""Training data: built in, or JSON Lines of one's own."""

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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"{", "line 1 is not JSON"),
        (b'{"text": "x"}', "line 1 has neither 'prompt' and 'completion' nor 'messages'"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "line 1 has neither"),
        (b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}', "needs 'role' and 'content'"),
        (b'{"messages": ["x", "y"]}', "needs 'role' and 'content'"),
        (b'{"prompt": 3, "completion": "x"}', "needs 'role' and 'content'"),
        (b"[1]", "line 1 has neither"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_examples(str(tmp_path / "data.jsonl"), count=None, seed=0)


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"'nowhere.jsonl' cannot be read \(No such file or directory\)"):
        load_examples("nowhere.jsonl", count=None, seed=0)
