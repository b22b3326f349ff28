"""Reranking: how far a model moves the relevant passages of each query to the top of the BM25 candidates.

Measures are those of trec_eval with binary relevance. All relevant passages of a query count, those too that are not
among its candidates: a query whose relevant passages were not found scores 0, and the best score that reranking can
reach is below 100 %. With one place, MAP@1 is Recall@1, and NDCG@1 is P@1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache, DynamicLayer

from loki.errors import InputError
from loki.evaluation.scores import ItemScores
from loki.progress import Track, silent
from loki.prompts.render import render_chat
from loki.prompts.reranking import (
    PASSAGE_TOKENS,
    SCALES,
    RankedQuery,
    ScaleName,
    cut_passage,
    find_passage,
    relevance_messages,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASK = "scifact"


@dataclass(frozen=True)
class Ranking:
    """A query's candidates in a new order."""

    query: RankedQuery
    scores: tuple[float, ...]
    """One for each candidate, in the query's order."""

    @property
    def ranked(self) -> tuple[str, ...]:
        """Candidates, highest score first; equal ones stay in the query's order."""
        order = sorted(range(len(self.scores)), key=lambda index: self.scores[index], reverse=True)
        return tuple(self.query.candidates[index] for index in order)


def rank_passages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[RankedQuery],
    passages: Mapping[str, str],
    *,
    scale: ScaleName = "relevance",
    passage_tokens: int = PASSAGE_TOKENS,
    batch_size: int = 20,
    track: Track = silent,
) -> list[Ranking]:
    """Score every candidate of every query by the expected value of its answer.

    The expectation is over the scale's answers alone, their probabilities made to sum to 1. LB-Reranker leaves them
    as they are, which is the same for a model that answers nothing else.

    Raises:
        InputError: a passage that is not there, or a tokenizer that begins two answers alike.
    """
    rankings = []
    answer_ids = None
    values_A = torch.tensor(SCALES[scale].values, dtype=torch.float64)
    for query in track(queries, "ranking"):
        texts = [
            render_chat(
                tokenizer,
                relevance_messages(
                    query.query,
                    cut_passage(tokenizer, find_passage(passages, passage_id, query), passage_tokens),
                    scale,
                ),
            )
            for passage_id in query.candidates
        ]
        prompts = tokenizer(texts, add_special_tokens=tokenizer.chat_template is None).input_ids
        answer_ids = answer_ids or first_ids(tokenizer, texts[0], SCALES[scale].answers)
        scores: list[float] = []
        for start in range(0, len(prompts), batch_size):
            logits_NA = last_logits(model, prompts[start : start + batch_size], tokenizer.pad_token_id)[:, answer_ids]
            scores += (logits_NA.double().softmax(-1).cpu() @ values_A).tolist()
        rankings.append(Ranking(query, tuple(scores)))
    return rankings


def score_rankings(rankings: Sequence[Ranking]) -> dict[str, ItemScores]:
    """MAP@1, Recall@1, NDCG@1, P@1 and NDCG@10 of each query, as tasks `scifact_map@1` and so on.

    Raises:
        InputError: no rankings.
    """
    if not rankings:
        raise InputError("no rankings are there to score: rank the passages of at least one query")
    flags = [[passage_id in ranking.query.positives for passage_id in ranking.ranked] for ranking in rankings]
    totals = [len(ranking.query.positives) for ranking in rankings]
    found = list(zip(flags, totals, strict=True))
    measures = {
        "map@1": [average_precision(relevant, total, 1) for relevant, total in found],
        "recall@1": [recall(relevant, total, 1) for relevant, total in found],
        "ndcg@1": [ndcg(relevant, total, 1) for relevant, total in found],
        "p@1": [precision(relevant, 1) for relevant, _ in found],
        "ndcg@10": [ndcg(relevant, total, 10) for relevant, total in found],
    }
    ids = tuple(ranking.query.id for ranking in rankings)
    return {
        f"{TASK}_{metric}": ItemScores(task=f"{TASK}_{metric}", metric=metric, ids=ids, scores=tuple(scores))
        for metric, scores in measures.items()
    }


def precision(relevant: Sequence[bool], places: int) -> float:
    """Share of the first places that relevant passages take; `relevant` goes through the ranking from its top."""
    return sum(relevant[:places]) / places


def recall(relevant: Sequence[bool], total: int, places: int) -> float:
    """Share of all `total` relevant passages that stand on the first places."""
    return sum(relevant[:places]) / total


def average_precision(relevant: Sequence[bool], total: int, places: int) -> float:
    """Precision at each relevant passage on the first places, summed, over all `total` relevant passages."""
    return sum(precision(relevant, place) for place in range(1, places + 1) if any(relevant[place - 1 : place])) / total


def ndcg(relevant: Sequence[bool], total: int, places: int) -> float:
    """Gain of the first places, each discounted by log2(place + 1), relative to `total` relevant passages on top."""
    gain = sum(1 / math.log2(place + 2) for place, is_relevant in enumerate(relevant[:places]) if is_relevant)
    return gain / sum(1 / math.log2(place + 2) for place in range(min(total, places)))


def first_ids(tokenizer: PreTrainedTokenizerBase, text: str, answers: Sequence[str]) -> list[int]:
    """The token with which each answer begins after the text, as training reads them.

    Raises:
        InputError: two answers begin alike, or one has no tokens.
    """
    if tokenizer.chat_template is None:
        ids = [tokenizer(answer, add_special_tokens=False).input_ids[:1] for answer in answers]
    else:
        before = tokenizer(text, add_special_tokens=False).input_ids
        ids = [tokenizer(text + answer, add_special_tokens=False).input_ids[len(before) :][:1] for answer in answers]
    first = [found for beginning in ids for found in beginning]
    if len(set(first)) < len(answers):
        raise InputError(
            f"the model's tokenizer does not tell the answers {', '.join(answers)} apart by their first token: "
            "choose the other scale"
        )
    return first


@torch.no_grad()
def last_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """Logits (N, vocabulary) of the token after each prompt, computing what all begin with only once."""
    num_shared, cache = _read_shared(model, prompts)
    rest_NT = pad_sequence(
        [torch.tensor(ids[num_shared:]) for ids in prompts], batch_first=True, padding_value=pad_id
    ).to(model.device)
    lengths_N = torch.tensor([len(ids) for ids in prompts], device=model.device)
    # Padding on the right leaves positions as they are, and no prompt sees it.
    mask_NT = torch.arange(num_shared + rest_NT.shape[1], device=model.device) < lengths_N[:, None]
    last = [len(ids) - 1 - num_shared for ids in prompts]
    kept = sorted(set(last))
    logits_NKV: torch.Tensor = model(
        input_ids=rest_NT,
        attention_mask=mask_NT.long(),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=torch.tensor(kept, device=model.device),
    ).logits
    return logits_NKV[range(len(prompts)), [kept.index(place) for place in last]]


def _read_shared(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> tuple[int, DynamicCache | None]:
    """How many tokens all prompts begin with, and their keys and values for each prompt.

    0 and None where the prompts share nothing, or the model keeps more than the keys and values of plain attention.
    """
    at_most = min(map(len, prompts)) - 1
    num_shared = next((t for t in range(at_most) if len({ids[t] for ids in prompts}) > 1), at_most)
    if len(prompts) == 1 or num_shared == 0:
        return 0, None
    shared_1T = torch.tensor([prompts[0][:num_shared]], device=model.device)
    cache = model(input_ids=shared_1T, use_cache=True, logits_to_keep=1).past_key_values
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return 0, None
    cache.batch_repeat_interleave(len(prompts))
    return num_shared, cache
