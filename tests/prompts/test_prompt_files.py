"""A user's own file of prompts: what each kind of row becomes, and what is said of a row that is none."""

import gzip
import json

import pytest

from loki.errors import InputError
from loki.prompts.files import load_prompts
from loki.prompts.prompt import Prompt


@pytest.fixture
def write(tmp_path):
    """Write rows (or raw bytes) to a file and return its path."""

    def write_rows(*rows, name="own.jsonl"):
        path = tmp_path / name
        text = b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return path

    return write_rows


def only(path):
    (prompt,) = load_prompts(path)
    return prompt


def user(content):
    return ({"role": "user", "content": content},)


def test_a_question_is_asked_as_the_paper_asks_it(write):
    row = {
        "id": "q",
        "subject": "high_school_biology",
        "question": "Which?",
        "choices": ["ant", "bee", "cat", "dog"],
        "answer": 2,
    }
    message = (
        "There is a single choice question about high school biology. "
        "Answer the question by replying A, B, C or D.\n"
        "Question: Which?\nChoices:\nA. ant\nB. bee\nC. cat\nD. dog\nAnswer:"
    )
    assert only(write(row)) == Prompt("q", messages=user(message), answer="C", subject="high_school_biology")


def test_a_question_without_subject_names_none_and_has_as_many_letters_as_choices(write):
    message = (
        "There is a single choice question. Answer the question by replying A or B.\n"
        "Question: Is it?\nChoices:\nA. yes\nB. no\nAnswer:"
    )
    assert only(write({"question": "Is it?", "choices": ["yes", "no"]})) == Prompt("own:1", messages=user(message))


@pytest.mark.parametrize(("answer", "letter"), [(0, "A"), (25, "Z"), ("A", "A"), ("z", "Z"), ("c", "C")])
def test_26_choices_and_an_answer_as_index_or_letter(write, answer, letter):
    prompt = only(write({"question": "Which?", "choices": [f"option {i}" for i in range(26)], "answer": answer}))
    assert prompt.answer == letter
    assert prompt.messages[0]["content"].endswith("\nY. option 24\nZ. option 25\nAnswer:")
    assert "replying A, B, C, D, E, F, G," in prompt.messages[0]["content"]
    assert "X, Y or Z.\n" in prompt.messages[0]["content"]


def test_a_prompt_is_one_user_message(write):
    assert only(write({"prompt": " Say hi.\n", "answer": "Hi!"})) == Prompt(
        "own:1", messages=user(" Say hi.\n"), answer="Hi!"
    )
    assert only(write({"prompt": "Say hi."})).answer is None


@pytest.mark.parametrize(
    ("text", "before", "word"),
    [
        ("The capital of France is Paris", "The capital of France is", "Paris"),
        ("one two", "one", "two"),
        ("  led by space  wide   gap \n", "  led by space  wide", "gap"),
        ("Q: 1+1?\nA:\n2\n\n", "Q: 1+1?\nA:\n", "2"),
        ("a\tb", "a\t", "b"),
        ("fin.\u00a0Ende", "fin.\u00a0", "Ende"),
        ("Il était une fée…", "Il était une", "fée…"),
    ],
)
def test_the_last_word_of_a_text_is_its_answer(write, text, before, word):
    """A line break or tab before the word stays with the text; spaces belong to the word."""
    assert only(write({"text": text})) == Prompt("own:1", text=before, answer=word)


def test_the_last_message_of_the_assistant_is_the_answer_and_leaves_the_prompt(write):
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "1+1?", "name": "me"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4, I think"},
    ]
    shorter = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    assert only(write({"messages": messages})) == Prompt("own:1", messages=shorter[:4], answer="4, I think")
    assert only(write({"messages": messages[:4]})) == Prompt("own:1", messages=shorter[:4])
    assert only(write({"messages": messages[:4], "answer": "4"})).answer == "4"


def test_kinds_may_mix_and_lines_without_a_row_count_but_are_skipped(write):
    path = write(
        b"\xef\xbb\xbf" + json.dumps({"text": "a b"}).encode() + b"\r",
        b"  ",
        {"id": "named", "prompt": "c", "text": None, "answer": None, "subject": "letters", "source": "elsewhere"},
        b"",
        {"id": 7, "messages": [{"role": "user", "content": "d"}]},
        # U+2028 is no end of line in JSON Lines.
        '{"question": "e\u2028f", "choices": ["g", "h"]}'.encode(),
        b"",
    )
    prompts = load_prompts(path)
    assert [prompt.id for prompt in prompts] == ["own:1", "named", "7", "own:6"]
    assert [prompt.subject for prompt in prompts] == [None, "letters", None, None]
    assert (prompts[0].text, prompts[0].answer) == ("a", "b")
    assert prompts[1].messages == user("c")
    assert "e\u2028f" in prompts[3].messages[0]["content"]


@pytest.mark.parametrize("name", ["own.jsonl.gz", "zipped-without-ending.jsonl"])
def test_gzipped_files_are_read_whatever_their_name(write, name):
    plain = write({"text": "a b"}, {"text": "c d"})
    path = plain.with_name(name)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    found = load_prompts(str(path))
    assert [prompt.text for prompt in found] == ["a", "c"]
    assert found[1].id == ("own:2" if name == "own.jsonl.gz" else "zipped-without-ending:2")


def test_a_huge_line_is_read(write):
    words = "word " * 2_000_000
    prompt = only(write({"text": words + "last"}))
    assert len(prompt.text) == len(words) - 1
    assert prompt.answer == "last"


def test_home_folder(write, monkeypatch):
    path = write({"prompt": "a"})
    monkeypatch.setenv("HOME", str(path.parent))
    assert load_prompts("~/own.jsonl")[0].messages == user("a")


QUESTION = {"question": "Which?", "choices": ["a", "b", "c"]}
CHAT = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{", "is not JSON (Expecting property name enclosed in double quotes): write one JSON object a line"),
        (b"[" * 100_000, "is not JSON (maximum recursion depth exceeded"),
        (b'{"id": ' + b"1" * 5000 + b"}", "is not JSON (Exceeds the limit (4300 digits)"),
        (b'{"prompt": "caf\xe9"}', "is not UTF-8 text: save the file as UTF-8"),
        (["a", "b"], "is ['a', 'b']: write one JSON object a line"),
        ({"id": "x"}, "is no prompt: it needs 'question' and 'choices', or 'prompt', 'text' or 'messages'"),
        ({"prompt": "a", "text": "b c"}, "has 'prompt' and 'text': a row is one prompt, keep one of them"),
        ({"question": "a", "answer": "b"}, ": 'choices' must be a list of 2 to 26 texts, not nothing"),
        ({**QUESTION, "choices": ["a"]}, ": 'choices' must be a list of 2 to 26 texts, not 1 of them"),
        ({**QUESTION, "choices": ["a"] * 27}, ": 'choices' must be a list of 2 to 26 texts, not 27 of them"),
        ({**QUESTION, "choices": "ab"}, ": 'choices' must be a list of 2 to 26 texts, not 'ab'"),
        ({**QUESTION, "choices": ["a", 1, "c"]}, ": choice B must be a text that is not blank, not 1"),
        ({**QUESTION, "choices": ["a", "b", " "]}, ": choice C must be a text that is not blank, not ' '"),
        ({**QUESTION, "question": ""}, ": 'question' must be a text that is not blank, not ''"),
        ({**QUESTION, "answer": 3}, ": 'answer' must be an index from 0 to 2 or a letter from A to C, not 3"),
        ({**QUESTION, "answer": -1}, ": 'answer' must be an index from 0 to 2 or a letter from A to C, not -1"),
        ({**QUESTION, "answer": "D"}, ": 'answer' must be an index from 0 to 2 or a letter from A to C, not 'D'"),
        ({**QUESTION, "answer": True}, ": 'answer' must be an index from 0 to 2 or a letter from A to C, not True"),
        ({**QUESTION, "answer": ""}, ": 'answer' must be an index from 0 to 2 or a letter from A to C, not ''"),
        ({**QUESTION, "answer": "AB"}, ": 'answer' must be an index from 0 to 2 or a letter from A to C, not 'AB'"),
        ({**QUESTION, "subject": 5}, ": 'subject' must be a text that is not blank, not 5"),
        ({"prompt": " \n"}, r": 'prompt' must be a text that is not blank, not ' \n'"),
        ({"prompt": "a", "answer": 4}, ": 'answer' must be a text that is not blank, not 4"),
        ({"prompt": "a\ud83d"}, r": 'prompt' has \ud83d, half of a character: write the whole character"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, r": message 1: 'content' has \udc00, half of a"),
        ({"text": ""}, ": 'text' must be a text that is not blank, not ''"),
        ({"text": " Paris\n"}, ": 'text' is one word, ' Paris', with nothing before it: write two words or more, or"),
        ({"messages": []}, ": 'messages' must be a list of messages, not []"),
        ({"messages": "hi"}, ": 'messages' must be a list of messages, not 'hi'"),
        ({"messages": ["hi"]}, ": message 1 must be an object with the texts 'role' and 'content', not 'hi'"),
        ({"messages": [*CHAT, {"role": "user"}]}, ": message 2 must be an object with the texts 'role' and 'content',"),
        ({"messages": [{"content": "a"}]}, ": message 1: 'role' must be a text that is not blank, not nothing"),
        ({"messages": [{"role": "user", "content": None}]}, ": message 1 must be an object with the texts"),
        ({"messages": [{"role": "user", "content": " "}]}, ": 'messages' have nothing to answer: give a user message"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, ": 'messages' have nothing to answer: give a user"),
        (
            {"messages": [*CHAT, {"role": "assistant", "content": ""}]},
            ": the assistant's last message must be a text that is not blank, not ''",
        ),
        (
            {"messages": [*CHAT, {"role": "assistant", "content": "b"}], "answer": "b"},
            "ends with the assistant's message and has an 'answer' too: keep one of them",
        ),
        ({"id": 1.5, "prompt": "a"}, ": 'id' must be a text that is not blank, not 1.5"),
        ({"id": True, "prompt": "a"}, ": 'id' must be a text that is not blank, not True"),
        ({"id": "first", "prompt": "a"}, "has the id 'first' of line 1: ids must be unique"),
        ({"prompt": ["x" * 500]}, f": 'prompt' must be a text that is not blank, not ['{'x' * 58}…"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(write, row, message):
    path = write({"id": "first", "prompt": "good"}, b"", row)
    with pytest.raises(InputError) as raised:
        load_prompts(path)
    text = str(raised.value)
    assert text.startswith(f"{path}, line 3{message}" if message.startswith(":") else f"{path}, line 3 {message}")
    assert "\n" not in text


def test_an_id_may_not_be_the_one_that_a_row_without_id_gets(write):
    path = write({"prompt": "a"}, {"id": "own:1", "prompt": "b"})
    with pytest.raises(InputError, match="line 2 has the id 'own:1' of line 1: ids must be unique"):
        load_prompts(path)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_without_rows(write, content):
    path = write(content)
    with pytest.raises(InputError) as raised:
        load_prompts(path)
    assert str(raised.value) == f"{path} has no rows: give at least one prompt"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda whole: whole[:-12], "Compressed file ended before the end-of-stream marker was reached"),
        (lambda whole: whole[:-8] + b"12345678", "CRC check failed"),
        (lambda whole: whole + b"more", "Not a gzipped file"),
        (lambda whole: whole[:10] + b"\xff" * 30, "invalid block type"),
        (lambda whole: b'{"prompt": "not zipped"}', "Not a gzipped file"),
    ],
    ids=["cut off", "wrong sum", "more after it", "bits", "plain"],
)
def test_a_damaged_gzip_file(write, damage, reason):
    path = write({"prompt": "a"}, name="own.jsonl.gz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError) as raised:
        load_prompts(path)
    text = str(raised.value)
    assert text.startswith(f"{path} is not a whole gzip file (")
    assert reason in text
    assert text.endswith("): compress it again")


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(InputError) as raised:
        load_prompts(tmp_path)
    assert str(raised.value) == f"{str(tmp_path)!r} cannot be read (Is a directory): name a JSON Lines file"
    with pytest.raises(InputError, match=r"cannot be read \(No such file or directory\)"):
        load_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match=r"'a\\x00b' cannot be read \(embedded null byte\)"):
        load_prompts("a\0b")
    with pytest.raises(InputError, match=r"no-such-user/own.jsonl' cannot be read"):
        load_prompts("~no-such-user/own.jsonl")


def test_a_prompt_is_messages_or_a_text():
    for both in ({}, {"messages": (), "text": ""}):
        with pytest.raises(InputError, match="prompt 'x' needs either messages or a text: give one of them"):
            Prompt("x", **both)
