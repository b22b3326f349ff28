"""What is learned: training examples, held-out examples, and the test that scores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loki.errors import InputError
from loki.evaluation.bfcl import answer_bfcl, score_bfcl
from loki.evaluation.reranking import rank_passages, score_rankings
from loki.evaluation.scores import ItemScores
from loki.progress import Track
from loki.prompts.bfcl import BfclRequest, load_requests
from loki.prompts.reranking import load_passages, load_queries, make_relevance_examples
from loki.study.settings import TaskName, TaskSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Score = Callable[["PreTrainedModel", "PreTrainedTokenizerBase", Track], list[ItemScores]]


@dataclass(frozen=True)
class Task:
    """A task made ready for a tokenizer."""

    examples: Sequence[Mapping[str, Any]]
    """In the form of `loki.training.examples.load_examples`."""
    held_out: Sequence[Mapping[str, Any]]
    score: Score
    """Scores a model on the test file; the first of the scores is the task's own."""
    score_alone: Score
    """The task's own score alone, in less time."""


def load_task(
    section: TaskSection, data_dir: Path, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 16
) -> Task:
    """Read a task from a data folder; `batch_size` requests are answered together.

    Raises:
        InputError: a file that cannot be read, or with fewer examples than are asked for.
    """
    return _TASKS[section.name](section, data_dir, tokenizer, batch_size)


def _function_calling(
    section: TaskSection, data_dir: Path, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Task:
    wanted = section.examples + section.held_out
    path = data_dir / "toolcall/bfcl_train.jsonl.gz"
    found = load_requests(path, count=wanted, seed=0, tokenizer=tokenizer, max_tokens=section.max_tokens)
    if len(found) < wanted:
        raise InputError(
            f"{path} has {len(found)} examples of up to {section.max_tokens} tokens, {wanted} are asked for: "
            "ask for fewer, or for longer ones"
        )
    examples = [request.as_prompt_completion() for request in found]
    test = load_requests(
        data_dir / "toolcall/bfcl_test.jsonl.gz",
        count=section.requests,
        seed=0,
        tokenizer=tokenizer,
        max_tokens=section.max_tokens,
    )

    def answer(
        requests: Sequence[BfclRequest], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, track: Track
    ) -> list[ItemScores]:
        replies = answer_bfcl(
            model,
            tokenizer,
            requests,
            batch_size=batch_size,
            max_new_tokens=section.max_new_tokens,
            track=track,
        )
        scores = score_bfcl(replies)
        # Refusing everything is right where no function fits: what is learned shows in the calls.
        return [scores.pop("bfcl_calls"), *scores.values()]

    def score_alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, track: Track) -> list[ItemScores]:
        return answer([request for request in test if request.ground_truth], model, tokenizer, track)[:1]

    return Task(examples[: section.examples], examples[section.examples :], partial(answer, test), score_alone)


def _reranking(section: TaskSection, data_dir: Path, tokenizer: PreTrainedTokenizerBase, _batch_size: int) -> Task:
    passages = load_passages(data_dir / "rerank/scifact_corpus.jsonl.gz")
    cut = section.passage_tokens
    found = make_relevance_examples(
        load_queries(data_dir / "rerank/scifact_train.jsonl"),
        passages,
        tokenizer,
        passage_tokens=cut,
        count=section.examples + section.held_out,
    )
    examples = [example.as_prompt_completion() for example in found]
    test = load_queries(data_dir / "rerank/scifact_test.jsonl", count=section.requests)

    def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, track: Track) -> list[ItemScores]:
        scores = score_rankings(rank_passages(model, tokenizer, test, passages, passage_tokens=cut, track=track))
        return [scores.pop("scifact_ndcg@10"), *scores.values()]

    def score_alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, track: Track) -> list[ItemScores]:
        return score(model, tokenizer, track)[:1]

    return Task(examples[: section.examples], examples[section.examples :], score, score_alone)


_TASKS: Mapping[TaskName, Callable[[TaskSection, Path, PreTrainedTokenizerBase, int], Task]] = {
    "function-calling": _function_calling,
    "reranking": _reranking,
}
