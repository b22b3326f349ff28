"""The shipped probe is data that decides numbers: its form is tested like code."""

import re
from collections import Counter, defaultdict
from itertools import combinations

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loki.prompts.questions import Question, load_probe
from loki.prompts.render import encode_chat, open_prompt, render_chat, single_choice_prompt

MMLU_SUBJECTS = re.findall(
    r"\w+",
    """
abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
college_computer_science college_mathematics college_medicine college_physics computer_security
conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts
high_school_biology high_school_chemistry high_school_computer_science high_school_european_history
high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics
high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence
logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes
moral_scenarios nutrition philosophy prehistory professional_accounting professional_law professional_medicine
professional_psychology public_relations security_studies sociology us_foreign_policy virology world_religions
""",
)

QUESTION = Question(
    id="high_school_biology-1",
    subject="high_school_biology",
    split="analysis",
    question="Which part of a cell holds its genes?",
    choices=("nucleus", "wall", "membrane", "vacuole"),
    answer=0,
)
SPLITS = ("analysis", "evaluation")
CHATML = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def by_subject(questions):
    groups = defaultdict(list)
    for question in questions:
        groups[question.subject].append(question)
    return groups


def words(text):
    return set(re.findall(r"\w+", text.casefold()))


def overlap(a, b):
    """Share of the words of two texts that both have."""
    return len(words(a) & words(b)) / len(words(a) | words(b))


def right_option(question):
    return question.choices[question.answer]


def test_the_probe_has_every_mmlu_subject_and_no_other():
    assert len(MMLU_SUBJECTS) == 57
    assert {question.subject for question in load_probe()} == set(MMLU_SUBJECTS)


def test_the_probe_has_four_questions_for_each_subject_two_in_each_split():
    probe = load_probe()
    assert len(probe) == 228
    for subject, questions in by_subject(probe).items():
        assert [question.id for question in questions] == [f"{subject}-{number}" for number in (1, 2, 3, 4)]
        assert [question.split for question in questions] == ["analysis", "analysis", "evaluation", "evaluation"]


def test_each_subject_has_one_right_answer_at_each_letter():
    for subject, questions in by_subject(load_probe()).items():
        assert sorted(question.answer for question in questions) == [0, 1, 2, 3], subject


@pytest.mark.parametrize("split", SPLITS)
def test_letters_are_even_in_each_split(split):
    counts = Counter(question.answer for question in load_probe(split))
    # 114 questions do not divide by 4; 3 of them are 2.6 points of accuracy for a model that knows one letter only.
    assert counts.keys() == {0, 1, 2, 3}
    assert max(counts.values()) - min(counts.values()) <= 3


def test_options_are_four_distinct_clean_texts():
    for question in load_probe():
        assert len({choice.casefold() for choice in question.choices}) == len(question.choices) == 4, question.id
        assert all(choice and choice == choice.strip() for choice in question.choices), question.id
        assert question.question.endswith("?"), question.id
        assert question.question == question.question.strip(), question.id


def test_the_splits_are_the_two_halves_of_the_probe():
    analysis, evaluation = load_probe("analysis"), load_probe("evaluation")
    assert {question.split for question in analysis} == {"analysis"}
    assert len(analysis) == len(evaluation) == 114
    assert sorted(q.id for q in [*analysis, *evaluation]) == sorted(q.id for q in load_probe())


def test_no_question_is_asked_twice():
    """Near copies, in which 6 of 10 words are the same, count as the same question."""
    pairs = [(a.id, b.id) for a, b in combinations(load_probe(), 2) if overlap(a.question, b.question) >= 0.6]
    assert pairs == []


def test_no_fact_is_both_analysed_and_evaluated():
    """Two questions with the same right option and two telling words in common ask for one fact."""
    pairs = []
    for a in load_probe("analysis"):
        for b in load_probe("evaluation"):
            if right_option(a).casefold() == right_option(b).casefold():
                telling = {word for word in words(a.question) & words(b.question) if len(word) >= 5} - {"which"}
                pairs += [(a.id, b.id, telling)] if len(telling) >= 2 else []
    assert pairs == []


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("longest", [True, False], ids=["longest", "shortest"])
def test_the_length_of_an_option_does_not_tell_the_right_one(split, longest):
    """Who always picks the longest (or shortest) option, guessing among equals, is right no more often than chance."""
    pick, questions = max if longest else min, load_probe(split)
    right = 0.0
    for question in questions:
        lengths = [len(choice) for choice in question.choices]
        extreme = pick(lengths)
        right += (lengths[question.answer] == extreme) / lengths.count(extreme)
    # Chance is 0.25; its standard error over 114 questions is 0.041, and two of them are allowed.
    assert right / len(questions) <= 0.25 + 2 * (0.25 * 0.75 / len(questions)) ** 0.5


def test_single_choice_prompt_word_by_word():
    assert single_choice_prompt(QUESTION) == (
        "There is a single choice question about high school biology. "
        "Answer the question by replying A, B, C or D.\n"
        "Question: Which part of a cell holds its genes?\n"
        "Choices:\n"
        "A. nucleus\n"
        "B. wall\n"
        "C. membrane\n"
        "D. vacuole\n"
        "Answer:"
    )


def test_open_prompt_word_by_word():
    assert open_prompt(QUESTION) == "Question: Which part of a cell holds its genes?\nAnswer:"


def character_tokenizer(chat_template=None):
    """One token a character, after a start token that the tokenizer itself adds."""
    specials = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    vocabulary = {token: index for index, token in enumerate([*specials.values(), *map(chr, range(32, 127)), "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)
    fast.chat_template = chat_template
    return fast


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def test_messages_are_rendered_by_the_template_ready_for_a_reply():
    tokenizer = character_tokenizer(CHATML)
    assert render_chat(tokenizer, MESSAGES) == "<system>Be brief.</s><user>Hello</s><assistant>"


def test_messages_without_a_template_are_paragraphs():
    assert render_chat(character_tokenizer(), MESSAGES) == "Be brief.\n\nHello\n"


def test_special_tokens_come_from_the_template_only():
    tokenizer = character_tokenizer("<s>" + CHATML)
    ids = encode_chat(tokenizer, MESSAGES)
    assert ids.dtype == torch.int64
    assert ids.shape == (len("<system>Be brief.") + len("<user>Hello") + len("<assistant>") + 3,)
    assert (ids == tokenizer.bos_token_id).nonzero().tolist() == [[0]]
    assert tokenizer.decode(ids) == "<s>" + render_chat(character_tokenizer(CHATML), MESSAGES)


def test_without_a_template_the_tokenizer_adds_its_start_token():
    tokenizer = character_tokenizer()
    ids = encode_chat(tokenizer, MESSAGES)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "Be brief.\n\nHello\n"
