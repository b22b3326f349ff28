"""Tokens of prompts and of their answers, with the tiny tokenizer and with a trained byte-pair encoding."""

import pytest
import torch
from tiny import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from loki.errors import InputError
from loki.prompts.encoding import encode_prompt
from loki.prompts.prompt import Prompt, question_prompt
from loki.prompts.questions import load_probe
from loki.prompts.render import encode_chat

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORD_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}reply"
"""Ends in the middle of a word, without any special token."""
STRICT_TEMPLATE = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No\nsystem role') }}{% endif %}x"


def make_bpe(*, template=None, around="<s> $A"):
    """A byte-level byte-pair encoding like GPT-2's, trained on the probe; it adds a start token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|user|>", "<|system|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{question.question} {' '.join(question.choices)}" for question in load_probe()]
    tokenizer.train_from_iterator([*texts, *["A B C D", "replying replying"] * 200], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        around, special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def chat(*contents, answer=None):
    return Prompt("x", messages=tuple({"role": "user", "content": content} for content in contents), answer=answer)


def token_after(tokenizer, text, answer, *, special):
    """Oracle: the first token that begins where the answer does, by the offsets of the tokenizer itself."""
    encoding = tokenizer.backend_tokenizer.encode(text + answer, add_special_tokens=special)
    return next(
        token
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        if start == len(text) and end > start
    )


def test_a_conversation_goes_through_the_template_and_the_answer_follows_at_once():
    tokenizer = make_bpe(template=TEMPLATE)
    found = encode_prompt(tokenizer, chat("What is blue?", answer="The sky"))
    assert tokenizer.decode(found.ids_T) == "<|user|>What is blue?\n<|assistant|>"
    assert found.ids_T.dtype == torch.int64
    assert found.ids_T.ndim == 1
    assert found.ids_T[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert tokenizer.bos_token_id not in found.ids_T
    assert found.answer_id == tokenizer.backend_tokenizer.encode("The sky", add_special_tokens=False).ids[0]
    assert not tokenizer.decode([found.answer_id]).startswith(" ")


@pytest.mark.parametrize("chat_template", [None, True])
def test_a_question_of_the_probe_is_encoded_as_before(tokenizer, chat_template):
    """Parity with `encode_chat`, and letters without a space."""
    for question in load_probe("analysis")[:8]:
        prompt = question_prompt(question)
        found = encode_prompt(tokenizer, prompt, chat_template=chat_template)
        assert torch.equal(found.ids_T, encode_chat(tokenizer, prompt.messages))
        assert tokenizer.decode([found.answer_id]) == "ABCD"[question.answer]


def test_without_a_template_contents_are_joined_and_the_answer_follows_a_space():
    for tokenizer, chat_template in ((make_bpe(), None), (make_bpe(), False), (make_bpe(template=TEMPLATE), False)):
        found = encode_prompt(tokenizer, chat("Be brief.", "Answer:", answer="B"), chat_template=chat_template)
        assert found.ids_T[0] == tokenizer.bos_token_id
        assert tokenizer.decode(found.ids_T[1:]) == "Be brief.\n\nAnswer:"
        assert found.answer_id == token_after(tokenizer, "Be brief.\n\nAnswer:", " B", special=True)
        assert tokenizer.decode([found.answer_id]) == " B"


@pytest.mark.parametrize("chat_template", [None, True, False])
def test_a_text_never_goes_through_the_template(chat_template):
    tokenizer = make_bpe(template=TEMPLATE)
    found = encode_prompt(tokenizer, Prompt("x", text="Which of the", answer="following"), chat_template=chat_template)
    assert tokenizer.decode(found.ids_T) == "<s>Which of the"
    assert found.answer_id == token_after(tokenizer, "Which of the", " following", special=True)
    assert tokenizer.decode([found.answer_id]).startswith(" ")


@pytest.mark.parametrize(("text", "answer"), [("A:\n", "Yes"), ("A:\t", "Yes"), ("A:", "\nYes"), ("A:", " Yes")])
def test_no_second_space_where_there_is_white_space_already(text, answer):
    tokenizer = make_tokenizer()
    found = encode_prompt(tokenizer, Prompt("x", text=text, answer=answer))
    assert tokenizer.decode(found.ids_T) == text
    assert tokenizer.decode([found.answer_id]) == answer[0]


def test_one_token_a_byte():
    tokenizer = make_tokenizer()
    found = encode_prompt(tokenizer, Prompt("x", text="naïve", answer="é"))
    assert len(found.ids_T) == 6
    assert tokenizer.decode([found.answer_id]) == " "
    inside = encode_prompt(tokenizer, chat("naïve", answer="é"))
    # "Ã" stands for byte C3, the first of "é".
    assert tokenizer.convert_ids_to_tokens(inside.answer_id) == "Ã"


def test_every_word_of_the_probe_follows_as_the_offsets_say():
    tokenizer = make_bpe()
    for question in load_probe("analysis")[:30]:
        before, word = question.question.rsplit(maxsplit=1)
        found = encode_prompt(tokenizer, Prompt("x", text=before, answer=word))
        assert found.answer_id == token_after(tokenizer, before, f" {word}", special=True)
        assert found.ids_T.tolist() == tokenizer(before).input_ids


def test_where_tokens_join_prompt_and_answer_the_answer_is_tokenised_alone():
    tokenizer = make_bpe(template=WORD_TEMPLATE)
    joined = tokenizer.backend_tokenizer.encode("Go on. replying", add_special_tokens=False).tokens
    # The first token that differs from the prompt's is this one, which is not the answer's.
    assert joined == [*tokenizer.backend_tokenizer.encode("Go on.", add_special_tokens=False).tokens, "Ġreplying"]
    for answer in ("ing", "ing A B C D A B C D"):
        found = encode_prompt(tokenizer, chat("Go on.", answer=answer))
        assert tokenizer.decode(found.ids_T) == "Go on. reply"
        assert tokenizer.decode([found.answer_id]) == "ing"


def test_an_answer_that_follows_at_once_is_not_the_start_of_a_word():
    """A tokenizer of SentencePiece's kind puts a space before what stands alone, which the answer here does not."""
    tokens = ["<unk>", "<s>", "<|user|>", "<|assistant|>", "▁", ":", "B", "▁B", "▁Q"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("▁", "B")], unk_token="<unk>"))
    backend.add_special_tokens(["<s>", "<|user|>", "<|assistant|>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.tokenize("B") == ["▁B"]
    assert tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, chat("B", answer="B")).answer_id) == "B"
    plain = encode_prompt(tokenizer, chat("B:", answer="B"), chat_template=False)
    assert tokenizer.convert_ids_to_tokens(plain.ids_T) == ["<s>", "▁B", ":"]
    assert tokenizer.convert_ids_to_tokens(plain.answer_id) == "▁B"


@pytest.mark.parametrize("around", ["<s> $A </s>", "$A </s>", "$A </s> </s>"])
def test_the_last_position_is_the_texts_own(around):
    tokenizer = make_bpe(around=around)
    found = encode_prompt(tokenizer, Prompt("x", text="Which of the", answer="following"))
    assert tokenizer.decode(found.ids_T) == ("<s>" if around.startswith("<s>") else "") + "Which of the"
    assert found.answer_id == token_after(tokenizer, "Which of the", " following", special=True)


def test_an_end_mark_that_the_user_wrote_stays():
    tokenizer = make_bpe()
    assert encode_prompt(tokenizer, Prompt("x", text="end</s>")).ids_T[-1] == tokenizer.eos_token_id


def test_without_an_answer_there_is_no_token_of_it():
    assert encode_prompt(make_tokenizer(), chat("a")).answer_id is None


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "chat_template", "message"),
    [
        (
            make_bpe(),
            chat("a"),
            True,
            "the model's tokenizer has no chat template: leave out --chat-template to join messages as plain text",
        ),
        (
            make_bpe(template=STRICT_TEMPLATE),
            Prompt("x", messages=({"role": "system", "content": "a"},)),
            None,
            "prompt 'x' does not fit the model's chat template (No system role): "
            "change its messages, or join them as plain text with --no-chat-template",
        ),
        (make_tokenizer(), Prompt("x", text=""), None, "prompt 'x' has no tokens: write some text"),
        (
            make_tokenizer(),
            chat("a", answer=""),
            None,
            "prompt 'x' has an answer without tokens, '': write some text",
        ),
    ],
)
def test_what_cannot_be_encoded(tokenizer, prompt, chat_template, message):
    with pytest.raises(InputError) as raised:
        encode_prompt(tokenizer, prompt, chat_template=chat_template)
    assert str(raised.value) == message
