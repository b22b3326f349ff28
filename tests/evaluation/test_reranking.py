"""Reranking: the measures by hand and against a plain form, and scores that do not depend on batches or padding."""

import itertools
import math

import pytest
import torch
from tiny import make_model as make_chat_model
from tiny import make_tokenizer as make_chat_tokenizer

from loki.embedded import EMBEDDED_NAME
from loki.errors import InputError
from loki.evaluation.reranking import (
    Ranking,
    average_precision,
    first_ids,
    last_logits,
    ndcg,
    precision,
    rank_passages,
    recall,
    score_rankings,
)
from loki.models import load_model, load_tokenizer
from loki.prompts.render import render_chat
from loki.prompts.reranking import SCALES, RankedQuery, load_queries, relevance_messages

Y, N = True, False
GAIN_2, GAIN_3 = 1 / math.log2(3), 1 / 2
"""Gains of the second and third place."""


@pytest.mark.parametrize(
    ("relevant", "total", "expected"),
    [
        # map@1, recall@1, ndcg@1, p@1, ndcg@10
        ([Y, N, N], 1, (1, 1, 1, 1, 1)),
        ([N, Y, N], 1, (0, 0, 0, 0, GAIN_2)),
        ([N, N, Y], 1, (0, 0, 0, 0, GAIN_3)),
        ([N, N, N], 1, (0, 0, 0, 0, 0)),
        ([Y, N, Y], 2, (1 / 2, 1 / 2, 1, 1, (1 + GAIN_3) / (1 + GAIN_2))),
        # Two of four are not among the candidates: they count all the same.
        ([Y, Y, N], 4, (1 / 4, 1 / 4, 1, 1, (1 + GAIN_2) / (1 + GAIN_2 + GAIN_3 + 1 / math.log2(5)))),
        # The eleventh place is outside of ten, and an ideal list of twelve has ten places.
        ([N] * 10 + [Y], 1, (0, 0, 0, 0, 0)),
        ([Y] * 12, 12, (1 / 12, 1 / 12, 1, 1, 1)),
    ],
)
def test_measures_by_hand(relevant, total, expected):
    found = (
        average_precision(relevant, total, 1),
        recall(relevant, total, 1),
        ndcg(relevant, total, 1),
        precision(relevant, 1),
        ndcg(relevant, total, 10),
    )
    assert found == pytest.approx(expected)


def test_average_precision_of_more_places_by_hand():
    # Found at places 1, 3 and 4: (1/1 + 2/3 + 3/4) / 5; of two places only the first.
    assert average_precision([Y, N, Y, Y], 5, 10) == pytest.approx((1 + 2 / 3 + 3 / 4) / 5)
    assert average_precision([Y, N, Y, Y], 5, 2) == pytest.approx(1 / 5)
    assert precision([Y, N, Y, Y], 3) == pytest.approx(2 / 3)
    assert recall([Y, N, Y, Y], 5, 3) == pytest.approx(2 / 5)


def test_no_order_beats_relevant_ones_first():
    for relevant in itertools.product([Y, N], repeat=5):
        if any(relevant):
            best = sorted(relevant, reverse=True)
            assert ndcg(relevant, sum(relevant), 10) <= ndcg(best, sum(relevant), 10) == pytest.approx(1)


QUERY = RankedQuery("q", "Do bees dance?", ("c", "x"), ("a", "b", "c", "d"))


def test_candidates_by_score_and_equal_ones_as_they_stood():
    assert Ranking(QUERY, (1.0, 3.0, 3.0, 2.0)).ranked == ("b", "c", "d", "a")
    assert Ranking(QUERY, (2.0, 2.0, 2.0, 2.0)).ranked == QUERY.candidates


def test_scores_of_queries_are_tasks_by_measure():
    other = RankedQuery("r", "Do ants?", ("b",), ("a", "b"))
    scores = score_rankings([Ranking(QUERY, (1, 2, 9, 3)), Ranking(other, (5, 1))])
    assert {name: group.scores for name, group in scores.items()} == {
        "scifact_map@1": (1 / 2, 0),
        "scifact_recall@1": (1 / 2, 0),
        "scifact_ndcg@1": (1, 0),
        "scifact_p@1": (1, 0),
        "scifact_ndcg@10": (pytest.approx(1 / (1 + GAIN_2)), pytest.approx(GAIN_2)),
    }
    assert all(group.ids == ("q", "r") and group.task == f"scifact_{group.metric}" for group in scores.values())
    assert scores["scifact_map@1"].mean.value == 25
    with pytest.raises(InputError, match="no rankings are there to score: rank the passages of at least one query"):
        score_rankings([])


PASSAGES = {"a": "Bees dance in the dark.", "b": "Ants.", "c": "Bees dance for food, and more so in June.", "d": "D"}


def plain_scores(model, tokenizer, scale, limit):
    """Each passage alone, all logits, the answers' tokens by hand: one byte is one token."""
    scores = []
    for passage_id in QUERY.candidates:
        messages = relevance_messages(QUERY.query, PASSAGES[passage_id][:limit], scale)
        ids = tokenizer(render_chat(tokenizer, messages), return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1].double()
        chosen = torch.stack([logits[tokenizer.convert_tokens_to_ids(answer[0])] for answer in SCALES[scale].answers])
        weights = (chosen - chosen.max()).exp()
        scores.append(sum(w * v for w, v in zip(weights.tolist(), SCALES[scale].values, strict=True)) / weights.sum())
    return [float(score) for score in scores]


@pytest.mark.parametrize("scale", ["relevance", "yes-no"])
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_scores_are_the_expected_answer_of_each_passage_alone(scale, batch_size):
    model, tokenizer = make_chat_model(), make_chat_tokenizer()
    (ranking,) = rank_passages(
        model, tokenizer, [QUERY], PASSAGES, scale=scale, passage_tokens=12, batch_size=batch_size
    )
    expected = plain_scores(model, tokenizer, scale, 12)
    # Float32 rounding of the tiny model's logits.
    assert list(ranking.scores) == pytest.approx(expected, abs=1e-5)
    # The first two of 12 letters differ from each other by much more.
    assert max(expected) - min(expected) > 1e-3


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 8}])
def test_logits_after_prompts_that_share_a_beginning_are_those_of_each_alone(changes):
    if changes:
        from transformers import MistralConfig, MistralForCausalLM

        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=260,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            **changes,
        )
        model = MistralForCausalLM(config).eval()
    else:
        model = make_chat_model()
    prompts = [[*range(40, 60), 7, 8, 9], [*range(40, 60), 7], [*range(40, 60)], [*range(40, 60), 9, 9]]
    found = last_logits(model, prompts, pad_id=0)
    for prompt, logits in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_shared_beginning_is_read_once(monkeypatch):
    model, seen = make_chat_model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: seen.append(inputs["input_ids"].shape) or forward(**inputs))
    last_logits(model, [[5, 6, 7, 8, 9], [5, 6, 7, 9], [5, 6, 7, 7]], pad_id=0)
    assert seen == [(1, 3), (3, 2)]


def test_answers_begin_with_the_token_that_training_sees(tokenizer):
    chat = make_chat_tokenizer()
    expected = [chat.convert_tokens_to_ids(answer) for answer in "1234567"]
    assert first_ids(chat, "x<|assistant|>", SCALES["relevance"].answers) == expected
    plain = [tokenizer.convert_tokens_to_ids(answer) for answer in "ny"]
    assert first_ids(tokenizer, "x\n", SCALES["yes-no"].answers) == plain


def test_answers_that_begin_alike_are_refused():
    with pytest.raises(
        InputError,
        match="tokenizer does not tell the answers no, nay apart by their first token: choose the other scale",
    ):
        first_ids(make_chat_tokenizer(), "x", ["no", "nay"])
    with pytest.raises(InputError, match="does not tell the answers"):
        first_ids(make_chat_tokenizer(), "x", ["", "no"])


def test_a_missing_passage_is_named():
    with pytest.raises(InputError, match="passage 'd' of query 'q' is not among the 3 passages: give the corpus"):
        rank_passages(
            make_chat_model(), make_chat_tokenizer(), [QUERY], {key: PASSAGES[key] for key in "abc"}, passage_tokens=4
        )


@pytest.mark.data
def test_bm25_and_the_best_order_of_its_candidates(data_dir):
    """As the data's description has it: a relevant passage for 84 % of the queries among the candidates."""
    queries = load_queries(data_dir / "rerank/scifact_test.jsonl")
    as_found = score_rankings([Ranking(query, (0.0,) * len(query.candidates)) for query in queries])
    best = score_rankings(
        [Ranking(query, tuple(float(id_ in query.positives) for id_ in query.candidates)) for query in queries]
    )
    assert best["scifact_p@1"].mean.value == pytest.approx(83.75)
    assert as_found["scifact_p@1"].mean.value == pytest.approx(50.4, abs=0.05)
    assert as_found["scifact_ndcg@10"].mean.value == pytest.approx(63.1, abs=0.05)


@pytest.mark.real
@pytest.mark.parametrize("scale", ["relevance", "yes-no"])
def test_the_real_model_scores_passages_as_one_by_one(scale):
    model, tokenizer = load_model(EMBEDDED_NAME, dtype="float32"), load_tokenizer(EMBEDDED_NAME)
    together, alone = (
        rank_passages(model, tokenizer, [QUERY], PASSAGES, scale=scale, batch_size=size)[0].scores for size in (20, 1)
    )
    # Float32 rounding through 30 layers; the scores themselves lie much further apart.
    assert together == pytest.approx(alone, abs=1e-4)
    assert max(together) - min(together) > 1e-2
