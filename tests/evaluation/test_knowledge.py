import math
from types import SimpleNamespace

import pytest
import torch

from loki.evaluation.knowledge import score_questions
from loki.prompts.questions import Question
from loki.prompts.render import open_prompt

QUESTIONS = [
    Question(
        "a-1", "a", "evaluation", "Which gas do plants take in?", ("carbon dioxide", "neon", "helium", "argon"), 0
    ),
    Question("a-2", "a", "evaluation", "How many sides has a square?", ("two", "four", "a hundred", "six"), 1),
    Question("a-3", "a", "evaluation", "What is the capital of France?", ("Rome", "Oslo", "Paris", "Bern"), 2),
    Question("a-4", "a", "evaluation", "Is it?", ("yes", "no", "nearly always", "it depends on the day"), 3),
]


class ConstantModel:
    """Predicts the same distribution everywhere: token 0 is `odds` times as likely as each other token."""

    device = torch.device("cpu")

    def __init__(self, vocabulary_size, odds):
        self.logits_V = torch.zeros(vocabulary_size)
        self.logits_V[0] = math.log(odds)

    def __call__(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.logits_V.expand(*input_ids.shape, -1))


def plainly(model, tokenizer, question, option):
    """Log-probabilities (T, V) in float64 of a question with one option, alone and unpadded, and the option's start."""
    prompt = tokenizer(open_prompt(question)).input_ids
    ids = [*prompt, *tokenizer(f" {option}", add_special_tokens=False).input_ids]
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0]
    return ids, len(prompt), logits_TV.double().log_softmax(-1)


def plain_option_score(model, tokenizer, question, option):
    ids, start, log_probabilities_TV = plainly(model, tokenizer, question, option)
    return sum(float(log_probabilities_TV[position - 1, ids[position]]) for position in range(start, len(ids)))


def plain_divergence(reference, model, tokenizer, question):
    *_, p_TV = plainly(reference, tokenizer, question, question.choices[question.answer])
    *_, q_TV = plainly(model, tokenizer, question, question.choices[question.answer])
    return float((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean())


# Float32 keeps 7 digits; two tiny layers and a sum over at most 25 tokens lose one or two of them.
FLOAT32 = {"rel": 1e-4, "abs": 1e-5}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_parity_with_an_unbatched_computation(make_model, tokenizer, seed):
    model = make_model(seed)
    scores, divergences = score_questions(model, tokenizer, QUESTIONS)
    assert divergences == []
    for score, question in zip(scores, QUESTIONS, strict=True):
        options = [plain_option_score(model, tokenizer, question, option) for option in question.choices]
        assert score.log_probability == pytest.approx(options[question.answer], **FLOAT32)
        per_byte = [value / len(option.encode()) for value, option in zip(options, question.choices, strict=True)]
        assert score.right is (per_byte.index(max(per_byte)) == question.answer)


def test_the_models_of_the_parity_test_are_right_sometimes(make_model, tokenizer):
    found = {score.right for seed in (0, 1, 2) for score in score_questions(make_model(seed), tokenizer, QUESTIONS)[0]}
    assert found == {True, False}


def test_divergence_has_parity_with_an_unbatched_computation(make_model, tokenizer):
    model, reference = make_model(0), make_model(1)
    _, divergences = score_questions(model, tokenizer, QUESTIONS, reference=reference)
    expected = [plain_divergence(reference, model, tokenizer, question) for question in QUESTIONS]
    assert divergences == [pytest.approx(value, **FLOAT32) for value in expected]
    other_way = [plain_divergence(model, reference, tokenizer, question) for question in QUESTIONS]
    assert all(abs(a - b) > 0.01 for a, b in zip(expected, other_way, strict=True)), "the direction can be told"


def test_a_model_does_not_diverge_from_itself(make_model, tokenizer):
    model = make_model(0)
    _, divergences = score_questions(model, tokenizer, QUESTIONS, reference=model)
    assert divergences == [0.0] * len(QUESTIONS)


def test_the_reference_changes_no_score(make_model, tokenizer):
    model = make_model(0)
    alone, _ = score_questions(model, tokenizer, QUESTIONS)
    beside, _ = score_questions(model, tokenizer, QUESTIONS, reference=make_model(1))
    assert alone == beside


def test_padding_changes_nothing(make_model, tokenizer):
    """A distractor of 60 characters pads the right option; neither its likelihood nor the divergence moves."""
    model, reference = make_model(0), make_model(1)
    short = Question("a-1", "a", "evaluation", "Which gas?", ("neon", "iron", "gold", "zinc"), 1)
    long = Question("a-1", "a", "evaluation", "Which gas?", ("n" * 60, "iron", "gold", "zinc"), 1)
    ((found,), (divergence,)) = score_questions(model, tokenizer, [short], reference=reference)
    ((padded,), (padded_divergence,)) = score_questions(model, tokenizer, [long], reference=reference)
    assert padded.log_probability == pytest.approx(found.log_probability, **FLOAT32)
    assert padded_divergence == pytest.approx(divergence, **FLOAT32)


def test_likelihood_by_hand(tokenizer):
    """A uniform model gives each of the 5 tokens of " iron" 1/V."""
    question = Question("a-1", "a", "evaluation", "Which metal?", ("iron", "wood", "sand", "milk"), 0)
    ((score,), _) = score_questions(ConstantModel(len(tokenizer), odds=1), tokenizer, [question])
    # Float32 keeps 7 digits of each of five equal terms.
    assert score.log_probability == pytest.approx(-5 * math.log(len(tokenizer)), rel=1e-6)


@pytest.mark.parametrize("answer", [0, 1, 2, 3])
def test_options_are_compared_per_byte_and_not_per_character(tokenizer, answer):
    """Five tokens of a uniform model cost the same, but are spread over 8 bytes in the third option."""
    question = Question("a-1", "a", "evaluation", "Which?", ("iron", "wood", "éèêë", "milk"), answer)
    ((score,), _) = score_questions(ConstantModel(len(tokenizer), odds=1), tokenizer, [question])
    assert score.right is (answer == 2)


@pytest.mark.parametrize("answer", [0, 1])
def test_length_is_no_disadvantage(tokenizer, answer):
    """In a uniform model the longer option has fewer tokens per byte: (n+1)/n, for the space before it."""
    question = Question("a-1", "a", "evaluation", "Which?", ("iron", "a very long option", "wood", "milk"), answer)
    ((score,), _) = score_questions(ConstantModel(len(tokenizer), odds=1), tokenizer, [question])
    assert score.right is (answer == 1)


def test_divergence_by_hand(tokenizer):
    """KL(uniform ‖ q) with q₀ = 5/(V+4), else 1/(V+4), is ln((V+4)/V) − ln(5)/V at every token."""
    size = len(tokenizer)
    uniform, skewed = ConstantModel(size, odds=1), ConstantModel(size, odds=5)
    _, divergences = score_questions(skewed, tokenizer, QUESTIONS, reference=uniform)
    expected = math.log((size + 4) / size) - math.log(5) / size
    # Float32 log-probabilities of size 4.6 are 2e-7 off, and so is their difference's mean.
    assert divergences == [pytest.approx(expected, abs=1e-6)] * len(QUESTIONS)
    assert expected > 0.02


def test_one_score_a_question_in_order(make_model, tokenizer):
    model = make_model(0)
    one_by_one = [score_questions(model, tokenizer, [question])[0][0] for question in QUESTIONS]
    assert score_questions(model, tokenizer, QUESTIONS)[0] == one_by_one


def test_questions_pass_through_the_tracker(make_model, tokenizer):
    seen = []

    def track(items, what):
        seen.append((len(items), what))
        return items

    score_questions(make_model(0), tokenizer, QUESTIONS, track=track)
    assert seen == [(len(QUESTIONS), "asking")]


def test_the_model_is_left_without_gradients(make_model, tokenizer):
    model = make_model(0)
    score_questions(model, tokenizer, QUESTIONS[:1], reference=model)
    assert all(parameter.grad is None for parameter in model.parameters())
