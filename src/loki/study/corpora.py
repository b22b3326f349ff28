"""The prompts that are attributed: never an item that is scored, in the same study or by `loki evaluate --tasks mmlu`.

Of MMLU they are the development and validation questions, of texts the half that `loki.prompts.parts` calls
analysis; scored are MMLU's test questions and the other half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from loki.evaluation.text import load_texts
from loki.prompts.json_lines import read_rows, text_field
from loki.prompts.mmlu import load_mmlu
from loki.prompts.parts import part_of
from loki.prompts.prompt import Prompt, question_prompt
from loki.prompts.questions import load_probe
from loki.prompts.sampling import apportion, draw, largest_total
from loki.study.settings import AnalysisSection, CorpusName

LAMBADA = "forgetting/lambada_openai.jsonl.gz"
WORDS = 100
"""Words of running text in one prompt, the last of which is the answer."""
FEWEST_WORDS = 20
"""Less text in front of a word says little about it."""


def load_corpora(analysis: AnalysisSection, data_dir: Path, *, seed: int = 0) -> list[Prompt]:
    """The prompts of an analysis: all of its corpora, or `num_prompts`, alike many from each.

    Raises:
        InputError: a file that cannot be read, or a corpus with nothing in it.
    """
    corpora = [list(_prompts(name, data_dir)) for name in analysis.corpora]
    if analysis.num_prompts is None:
        return [prompt for corpus in corpora for prompt in corpus]
    sizes, shares = [len(corpus) for corpus in corpora], [1.0] * len(corpora)
    counts = apportion(min(analysis.num_prompts, largest_total(sizes, shares)), shares)
    drawn = zip(analysis.corpora, corpora, counts, strict=True)
    return [prompt for name, corpus, count in drawn for prompt in draw(corpus, count, f"{seed} {name}")]


def _prompts(name: CorpusName, data_dir: Path) -> Iterator[Prompt]:
    if name == "probe":
        yield from map(question_prompt, load_probe("analysis"))
    elif name == "mmlu":
        for split in ("dev", "validation"):
            yield from map(question_prompt, load_mmlu(split, data_dir=data_dir))
    elif name == "lambada":
        for where, _, row in read_rows(data_dir / LAMBADA):
            if part_of(item_id := text_field(row, "id", where)) == "analysis":
                context, target = text_field(row, "context", where), text_field(row, "target", where)
                yield Prompt(item_id, text=context, answer=target)
    else:
        for text in load_texts(name, data_dir, part="analysis"):
            yield from _running_text(text.id, text.text.split())


def _running_text(text_id: str, words: Sequence[str]) -> Iterator[Prompt]:
    for number, start in enumerate(range(0, len(words), WORDS)):
        part = words[start : start + WORDS]
        if len(part) >= FEWEST_WORDS:
            yield Prompt(f"{text_id}/{number}", text=" ".join(part[:-1]), answer=part[-1])
