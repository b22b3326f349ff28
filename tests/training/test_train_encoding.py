"""Tokens and labels of examples, against TRL's own and against text."""

import pytest
from tiny import make_tokenizer
from trl import SFTConfig, SFTTrainer

from loki.errors import InputError
from loki.training.encoding import IGNORED, encode_examples
from loki.training.examples import load_examples

MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""As Qwen3's: thoughts are kept in the last message only."""
STRICT = "{% for m in messages %}{{ raise_exception('Roles must alternate') }}{% endfor %}"


def message(role, content):
    return {"role": role, "content": content}


PAIR = {"prompt": [message("system", "s"), message("user", "one")], "completion": [message("assistant", "1 é")]}
TALK = {
    "prompt": [message("user", "one"), message("assistant", "1"), message("user", "two")],
    "completion": [message("assistant", "2")],
    "conversation": True,
}
EXAMPLES = [PAIR, TALK]


def learned(tokenizer, encoded, index=0):
    """Text of each run of labelled tokens."""
    runs, run = [], []
    for token, label in zip(encoded.input_ids[index].tolist(), encoded.labels[index].tolist(), strict=True):
        if label != IGNORED:
            assert label == token
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return [*runs, *([tokenizer.decode(run)] if run else [])]


@pytest.mark.parametrize(
    "example", [PAIR, {**TALK, "conversation": False}, {**PAIR, "completion": [message("user", "1")]}]
)
def test_a_completion_is_labelled_as_trl_does(tokenizer, model, tmp_path, example):
    from datasets import Dataset

    columns = {name: example[name] for name in ("prompt", "completion")}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path), max_length=None, use_cpu=True, report_to="none", bf16=False),
        train_dataset=Dataset.from_list([columns]),
        processing_class=tokenizer,
    )
    encoded = encode_examples(tokenizer, [example])
    assert trainer.train_dataset[0]["input_ids"] == encoded.input_ids[0].tolist()
    assert trainer.train_dataset[0]["labels"] == encoded.labels[0].tolist()


def test_all_turns_are_labelled_as_trl_does_where_the_template_marks_them(tokenizer, model, tmp_path):
    from datasets import Dataset

    tokenizer.chat_template = MARKED
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            str(tmp_path), max_length=None, use_cpu=True, report_to="none", bf16=False, assistant_only_loss=True
        ),
        train_dataset=Dataset.from_list([{"messages": [*TALK["prompt"], *TALK["completion"]]}]),
        processing_class=tokenizer,
    )
    encoded = encode_examples(make_tokenizer(), [TALK], answers="all")
    assert trainer.train_dataset[0]["input_ids"] == encoded.input_ids[0].tolist()
    assert trainer.train_dataset[0]["labels"] == encoded.labels[0].tolist()


@pytest.mark.parametrize(
    ("answers", "expected", "chosen"),
    [
        ("auto", ["1<|end|>", "2<|end|>"], "all"),
        ("all", ["1<|end|>", "2<|end|>"], "all"),
        ("last", ["2<|end|>"], "last"),
    ],
)
def test_which_turns_are_learned(tokenizer, answers, expected, chosen):
    encoded = encode_examples(tokenizer, [TALK], answers=answers)
    assert learned(tokenizer, encoded) == expected
    assert encoded.answers == chosen


def test_a_prompt_is_never_learned(tokenizer):
    encoded = encode_examples(tokenizer, [{**TALK, "conversation": False}], answers="all")
    assert learned(tokenizer, encoded) == ["2<|end|>"]


def test_a_completion_of_several_messages_has_its_answers_learned(tokenizer):
    example = {"prompt": TALK["prompt"][:1], "completion": [*TALK["prompt"][1:], *TALK["completion"]]}
    assert learned(tokenizer, encode_examples(tokenizer, [example])) == ["1<|end|>", "2<|end|>"]
    assert learned(tokenizer, encode_examples(tokenizer, [example], answers="last")) == ["2<|end|>"]
    # A message by another role at the end is no answer.
    example["completion"] = [*example["completion"], message("user", "thanks")]
    assert learned(tokenizer, encode_examples(tokenizer, [example], answers="last")) == ["2<|end|>"]


def test_a_template_that_drops_earlier_thoughts_leaves_the_last_answer(tokenizer, caplog):
    tokenizer.chat_template = FORGETFUL
    talk = {**TALK, "prompt": [TALK["prompt"][0], message("assistant", "hm</think>1"), TALK["prompt"][2]]}
    with caplog.at_level("INFO", logger="loki"):
        encoded = encode_examples(tokenizer, [PAIR, talk])
    assert encoded.answers == "last"
    assert "does not tell earlier answers apart" in caplog.text
    assert learned(tokenizer, encoded, 1) == ["2<|end|>"]
    with pytest.raises(InputError, match=r"^example 2 has earlier answers .* \(answers: last\)$"):
        encode_examples(tokenizer, [PAIR, talk], answers="all")
    # Without thoughts this template does render the beginning alike.
    assert encode_examples(tokenizer, [TALK]).answers == "all"


def test_without_a_template_the_answer_ends_with_the_end_token(tokenizer):
    tokenizer.chat_template = None
    encoded = encode_examples(tokenizer, EXAMPLES)
    assert tokenizer.decode(encoded.input_ids[0]) == "s\n\none\n1 é<|end|>"
    assert learned(tokenizer, encoded) == ["1 é<|end|>"]
    assert encoded.answers == "last"
    assert encode_examples(tokenizer, [PAIR]).answers == "all"


def test_cut_and_empty_examples_are_counted(tokenizer, caplog):
    short, long = (
        {"prompt": [message("user", "a" * length)], "completion": [message("assistant", "b" * 9)]} for length in (2, 20)
    )
    encoded = encode_examples(tokenizer, [short, long, short], max_length=8)
    assert (encoded.num_cut, encoded.num_left_out) == (3, 1)
    assert [len(ids) for ids in encoded.input_ids] == [8, 8]
    # <|user|> a a <|end|> <|assistant|> are five tokens.
    assert (encoded.labels[0] != IGNORED).tolist() == [False] * 5 + [True] * 3
    assert "1 of 3 examples are left out: nothing of their answers lies within 8 tokens" in caplog.text
    with pytest.raises(InputError, match="no example has an answer within 8 tokens: raise the max length"):
        encode_examples(tokenizer, [long], max_length=8)


def test_messages_that_the_template_refuses_are_named(tokenizer):
    tokenizer.chat_template = STRICT
    with pytest.raises(InputError, match=r"^example 1 does not fit the model's chat template \(Roles must alternate\)"):
        encode_examples(tokenizer, EXAMPLES)


def test_the_built_in_task_has_one_answer_each(tokenizer):
    examples = load_examples("function-calls", count=5, seed=0)
    encoded = encode_examples(tokenizer, examples)
    for index, example in enumerate(examples):
        expected = [example["completion"][0]["content"] + "<|end|>"]
        assert learned(tokenizer, encoded, index) == expected
