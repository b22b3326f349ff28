"""Reranking: a query and a passage, and how related they are; SciFact's queries with their BM25 candidates.

The prompt is that of LB-Reranker (huggingface.co/lightblue/lb-reranker-0.5B-v1.0), which answers a number from 1 to 7.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loki.errors import InputError
from loki.prompts.json_lines import read_rows, shown, text_field, user_path, whole_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ScaleName = Literal["relevance", "yes-no"]
PASSAGE_TOKENS = 256


@dataclass(frozen=True)
class Scale:
    """What may be answered, and what each answer is worth."""

    instruction: str
    """System message."""
    answers: tuple[str, ...]
    """From the least related to the most."""
    values: tuple[float, ...]
    """One for each answer: a passage's score is their expectation."""


SCALES: Mapping[ScaleName, Scale] = {
    "relevance": Scale(
        "Given a query and a piece of text, output a score of 1-7 based on how related the query is to the text. "
        "1 means least related and 7 is most related.",
        ("1", "2", "3", "4", "5", "6", "7"),
        (1, 2, 3, 4, 5, 6, 7),
    ),
    "yes-no": Scale(
        "Given a query and a piece of text, answer yes if the text is related to the query, and no if it is not.",
        ("no", "yes"),
        (0, 1),
    ),
}


@dataclass(frozen=True)
class RankedQuery:
    """A query with the passages that a first search found."""

    id: str
    query: str
    positives: tuple[str, ...]
    """Ids of all relevant passages, whether the first search found them or not."""
    candidates: tuple[str, ...]
    """Ids of the passages to rank, best first as the first search (BM25) has them."""


@dataclass(frozen=True)
class RelevanceExample:
    """A query with one passage, and the right answer."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    """System and user message."""
    answer: str

    def as_prompt_completion(self) -> dict[str, Any]:
        """The form that `loki train` and TRL take."""
        return {"prompt": list(self.messages), "completion": [{"role": "assistant", "content": self.answer}]}


def load_passages(path: str | Path) -> dict[str, str]:
    """Passages by id, title before text; rows have `id`, `title` (which may be blank) and `text`.

    Raises:
        InputError: the file cannot be read, is empty, repeats an id, or a row has another form.
    """
    passages: dict[str, str] = {}
    for where, _, row in read_rows(user_path(path)):
        passage_id, text, title = text_field(row, "id", where), text_field(row, "text", where), row.get("title") or ""
        if not isinstance(title, str):
            raise InputError(f"{where}: 'title' must be a text, not {shown(title)}")
        if passage_id in passages:
            raise InputError(f"{where} has the id {passage_id!r} again: give each passage an id of its own")
        passages[passage_id] = whole_text(f"{title} {text}".strip(), where)
    if not passages:
        raise InputError(f"{path} has no passages: name a file that has some")
    return passages


def load_queries(path: str | Path, *, count: int | None = None, seed: int = 0) -> list[RankedQuery]:
    """The first `count` queries (None: all) in an order drawn from `seed`; fewer are a part of more.

    Rows have `id`, `query`, and lists of passage ids: `positives` and `bm25_top20`.

    Raises:
        InputError: the file cannot be read, has fewer queries, or a row has another form.
    """
    if count is not None and count < 1:
        raise InputError(f"{count} queries are not possible: ask for 1 or more")
    queries = [
        RankedQuery(
            id=text_field(row, "id", where),
            query=text_field(row, "query", where),
            positives=_ids_field(row, "positives", where),
            candidates=_ids_field(row, "bm25_top20", where),
        )
        for where, _, row in read_rows(user_path(path))
    ]
    if len(queries) < (count or 1):
        raise InputError(f"{count or 1} queries are more than the {len(queries)} in {path}: ask for fewer")
    random.Random(seed).shuffle(queries)
    return queries[:count]


def make_relevance_examples(
    queries: Sequence[RankedQuery],
    passages: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    scale: ScaleName = "relevance",
    negatives_per_positive: int = 1,
    passage_tokens: int = PASSAGE_TOKENS,
    count: int | None = None,
    seed: int = 0,
) -> list[RelevanceExample]:
    """Training examples: every relevant passage gets the scale's highest answer, others its lowest.

    For each relevant passage `negatives_per_positive` candidates that are not relevant are drawn, without
    replacement; a query has them all where it has fewer. Of the examples, in an order drawn from `seed`, the first
    `count` are made (None: all). Passages are cut to `passage_tokens`.

    Raises:
        InputError: a number below its least, a passage that is not there, or fewer examples than `count`.
    """
    if negatives_per_positive < 0:
        raise InputError(f"{negatives_per_positive} negatives per positive are not possible: give 0 or more")
    if count is not None and count < 1:
        raise InputError(f"{count} examples are not possible: ask for 1 or more")
    lowest, highest = SCALES[scale].answers[0], SCALES[scale].answers[-1]
    chosen: list[tuple[RankedQuery, str, str]] = []
    for query in queries:
        others = [passage_id for passage_id in query.candidates if passage_id not in query.positives]
        # Each query has its own generator: adding a query changes the draw of no other.
        random.Random(f"{seed} {query.id}").shuffle(others)
        chosen += [(query, passage_id, highest) for passage_id in query.positives]
        chosen += [
            (query, passage_id, lowest) for passage_id in others[: negatives_per_positive * len(query.positives)]
        ]
    if count is not None and len(chosen) < count:
        raise InputError(
            f"{count} examples are more than the {len(chosen)} there are: ask for fewer, or for more negatives"
        )
    random.Random(seed).shuffle(chosen)
    return [
        RelevanceExample(
            id=f"{query.id}-{passage_id}",
            messages=relevance_messages(
                query.query, cut_passage(tokenizer, find_passage(passages, passage_id, query), passage_tokens), scale
            ),
            answer=answer,
        )
        for query, passage_id, answer in chosen[:count]
    ]


def relevance_messages(query: str, passage: str, scale: ScaleName) -> tuple[Mapping[str, str], ...]:
    """System and user message that ask how related the two are."""
    return (
        {"role": "system", "content": SCALES[scale].instruction},
        {"role": "user", "content": f"<<<Query>>>\n{query}\n\n<<<Context>>>\n{passage}"},
    )


def find_passage(passages: Mapping[str, str], passage_id: str, query: RankedQuery) -> str:
    """A query's passage.

    Raises:
        InputError: it is not there.
    """
    if passage_id not in passages:
        raise InputError(
            f"passage {passage_id!r} of query {query.id!r} is not among the {len(passages)} passages: "
            "give the corpus that the queries belong to"
        )
    return passages[passage_id]


def cut_passage(tokenizer: PreTrainedTokenizerBase, passage: str, max_tokens: int) -> str:
    """The beginning of a passage, of `max_tokens` tokens at most.

    Raises:
        InputError: `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise InputError(f"{max_tokens} tokens of a passage are not possible: give 1 or more")
    ids = tokenizer(passage, add_special_tokens=False).input_ids
    if len(ids) <= max_tokens:
        return passage
    text: str = tokenizer.decode(ids[:max_tokens], clean_up_tokenization_spaces=False)
    # A cut inside a character leaves a replacement mark.
    return text.rstrip("\ufffd")


def _ids_field(row: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    ids = row.get(name)
    if not isinstance(ids, list) or not ids or not all(isinstance(value, str) and value for value in ids):
        raise InputError(f"{where}: {name!r} must be a list of one or more passage ids, not {shown(ids)}")
    if len(set(ids)) < len(ids):
        twice = next(value for value in ids if ids.count(value) > 1)
        raise InputError(f"{where}: {name!r} has {twice!r} more than once: name each passage once")
    return tuple(ids)
