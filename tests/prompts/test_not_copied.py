"""The built-in probe against benchmarks in a folder of JSON Lines (`make test-data DATA_DIR=…`): nothing is copied."""

import gzip
import json
import re
from pathlib import Path

import pytest

from loki.prompts.questions import load_probe

BENCHMARKS = (
    *("mmlu/mmlu_test.jsonl.gz", "mmlu/mmlu_val.jsonl", "mmlu/mmlu_dev.jsonl"),
    *("forgetting/arc_easy.jsonl", "forgetting/arc_challenge.jsonl", "forgetting/openbookqa.jsonl"),
    *("forgetting/sciq.jsonl", "forgetting/commonsense_qa.jsonl"),
)
RUN_LENGTH = 8
"""So many words in a row are chance in a set phrase at most; a copied question has more."""


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


def runs(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {found[i : i + RUN_LENGTH] for i in range(len(found) - RUN_LENGTH + 1)}


@pytest.mark.data
@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_question_shares_a_long_run_of_words_or_its_words_with_a_benchmark(data_dir: Path, name: str):
    opened = gzip.open if name.endswith(".gz") else open
    with opened(data_dir / name, "rt", encoding="utf-8") as file:
        benchmark = [json.loads(line)["question"] for line in file]
    assert len(benchmark) > 100
    their_runs = set().union(*map(runs, benchmark))
    their_words = [(frozenset(words(question)), question) for question in benchmark]
    for question in load_probe():
        assert not runs(question.question) & their_runs, question.id
        ours = frozenset(words(question.question))
        for theirs, text in their_words:
            assert len(ours & theirs) / len(ours | theirs) < 0.75, (question.id, question.question, text)
