"""Tasks that are learned, scored by this package: function calls and reranking.

What a model gets here is shown before and after, and is no part of what was forgotten.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loki.errors import InputError
from loki.evaluation.benchmarks.rows import find_file, sample
from loki.evaluation.bfcl import MAX_NEW_TOKENS, BfclReply, answer_bfcl, is_right, score_bfcl
from loki.evaluation.reranking import TASK as RERANKING
from loki.evaluation.reranking import Ranking, rank_passages, score_rankings
from loki.evaluation.scores import ItemScores
from loki.evaluation.stored import Store, answer_all
from loki.progress import Track, silent
from loki.prompts.bfcl import BfclRequest, read_requests
from loki.prompts.render import render_chat
from loki.prompts.reranking import PASSAGE_TOKENS, RankedQuery, load_passages, load_queries
from loki.provenance import digest, fingerprint_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALLS: Mapping[str, str] = {
    "bfcl": "toolcall/bfcl_test.jsonl",
    "acebench": "toolcall/acebench_normal_en.jsonl",
    "toolace": "toolcall/toolace_first100_reconstructed.jsonl",
}
"""Function-calling tasks, and their files in the data folder."""
QUERIES, CORPUS = "rerank/scifact_test.jsonl", "rerank/scifact_corpus.jsonl"
DOWNSTREAM = (*CALLS, RERANKING)
"""All by name."""
REQUESTS_AT_ONCE, QUERIES_AT_ONCE = 32, 2
"""After so many items what is done is written down."""
Speaker = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]
Item = TypeVar("Item", BfclRequest, RankedQuery)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Task:
    """A task made ready: which items are asked, and how."""

    ids: tuple[str, ...]
    contents: str
    """Digest of the items and of how they are put."""
    at_once: int
    read_one: Callable[[Any], Any]
    """An answer from its JSON form."""
    answer: Callable[[Sequence[str]], Sequence[Any]]
    """What the model makes of some of the items."""
    score: Callable[[Mapping[str, Any]], list[ItemScores]]
    """Scores of the answers to all of them."""


def evaluate_downstream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    data_dir: str | Path,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    folder: Path | None = None,
    track: Track = silent,
) -> list[ItemScores]:
    """Score a model on tasks of `DOWNSTREAM`, in the order in which they are named; each has several scores.

    `limit` draws items of each task, the same for every model. With `folder` answers are written there as they come,
    and the same call goes on where it stopped.

    Raises:
        InputError: an unknown task, data that cannot be used, or a number that is not possible.
        ArtefactError: `folder` holds answers of another model, of other items or with other settings.
    """
    for name in names:
        if name not in DOWNSTREAM:
            raise InputError(f"task {name!r} is none that is learned: choose from {', '.join(DOWNSTREAM)}")
    for what, number in (("batch size", batch_size), ("limit", limit), ("max_new_tokens", max_new_tokens)):
        if number is not None and number < 1:
            raise InputError(f"{what} {number} is not possible: give 1 or more")
    draw = partial(sample, limit=limit, seed=seed)
    tasks = {
        name: _calls(name, (model, tokenizer), data_dir, draw, batch_size, max_new_tokens)
        if name in CALLS
        else _reranking(name, (model, tokenizer), data_dir, draw, batch_size)
        for name in names
    }
    fingerprint = None if folder is None else fingerprint_model(model).as_dict()
    found: list[ItemScores] = []
    for name, task in tasks.items():
        store = None
        if folder is not None:
            identity = {"task": name, "items": task.contents, "model": fingerprint}
            store = Store(folder / f"{name}.json", identity, task.read_one)
        answers = answer_all(name, task.ids, task.answer, store, at_once=task.at_once, track=track)
        found += task.score(answers)
    return found


Draw = Callable[[str, Sequence[str]], list[str]]
"""Which of a task's items are asked."""


def _calls(
    name: str, speaker: Speaker, data_dir: str | Path, draw: Draw, batch_size: int, max_new_tokens: int | None
) -> _Task:
    path = find_file(name, CALLS[name], data_dir)
    most = MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    requests = _that_fit(speaker, _by_id(path, read_requests(path)), most, name)
    ids = draw(name, list(requests))

    def answer(ids: Sequence[str]) -> list[str]:
        chosen = [requests[id_] for id_ in ids]
        replies = answer_bfcl(*speaker, chosen, batch_size=batch_size, max_new_tokens=most)
        return [reply.text for reply in replies]

    def score(texts: Mapping[str, str]) -> list[ItemScores]:
        replies = [BfclReply(requests[id_], texts[id_], is_right(texts[id_], requests[id_])) for id_ in ids]
        return list(score_bfcl(replies, name).values())

    contents = digest([_as_json(requests[id_]) for id_ in ids] + [most])
    return _Task(tuple(ids), contents, REQUESTS_AT_ONCE, _text, answer, score)


def _that_fit(speaker: Speaker, requests: dict[str, BfclRequest], most: int, name: str) -> dict[str, BfclRequest]:
    """Those that the model has positions for, a reply of `most` tokens included."""
    model, tokenizer = speaker
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return requests
    texts = [render_chat(tokenizer, request.messages) for request in requests.values()]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=tokenizer.chat_template is None).input_ids]
    fitting = {
        id_: request
        for (id_, request), length in zip(requests.items(), lengths, strict=True)
        if length + most <= positions
    }
    if len(fitting) < len(requests):
        logger.warning(
            "%s: %d of %d requests are left out because they and a reply of %d tokens are longer than the model's "
            "%d positions",
            name,
            len(requests) - len(fitting),
            len(requests),
            most,
            positions,
        )
    if not fitting:
        raise InputError(f"task {name!r} has no request that fits the model's {positions} positions: leave it out")
    return fitting


def _by_id(path: Path, items: Sequence[Item]) -> dict[str, Item]:
    found: dict[str, Item] = {}
    for item in items:
        if item.id in found:
            raise InputError(f"{path} has the id {item.id!r} more than once: ids must be unique")
        found[item.id] = item
    if not found:
        raise InputError(f"{path} has no rows: a task needs at least one")
    return found


def _as_json(request: BfclRequest) -> list[Any]:
    truth = [[call.name, call.arguments] for call in request.ground_truth]
    return [request.id, request.functions, request.messages, truth]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no reply")
    return value


def _reranking(name: str, speaker: Speaker, data_dir: str | Path, draw: Draw, batch_size: int) -> _Task:
    path = find_file(name, QUERIES, data_dir)
    queries = _by_id(path, load_queries(path))
    passages = load_passages(find_file(name, CORPUS, data_dir))
    # A seed shuffles them as they are read; the draw is one of its own.
    ids = draw(name, sorted(queries))

    def answer(ids: Sequence[str]) -> list[tuple[float, ...]]:
        chosen = [queries[id_] for id_ in ids]
        found = [ranking.scores for ranking in rank_passages(*speaker, chosen, passages, batch_size=batch_size)]
        if not all(math.isfinite(score) for scores in found for score in scores):
            raise InputError(f"task {name!r}: the model's probabilities are not numbers, as after a diverged training")
        return found

    def score(answers: Mapping[str, tuple[float, ...]]) -> list[ItemScores]:
        return list(score_rankings([Ranking(queries[id_], answers[id_]) for id_ in ids]).values())

    contents = digest([_as_read(queries[id_], passages) for id_ in ids] + [PASSAGE_TOKENS])
    return _Task(tuple(ids), contents, QUERIES_AT_ONCE, _numbers, answer, score)


def _as_read(query: RankedQuery, passages: Mapping[str, str]) -> list[Any]:
    texts = [passages.get(candidate) for candidate in query.candidates]
    return [query.id, query.query, query.positives, query.candidates, texts]


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value))
