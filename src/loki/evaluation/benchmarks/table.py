"""The benchmarks by name: file in the data folder, what a row must hold, and what is scored.

`yaml/<name>.yaml` says how lm-eval puts the question. What guessing would get is not written down here: it is counted
on the file, because options differ in number and answers in frequency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import yaml

from loki.errors import InputError

Kind = Literal["loglikelihood", "generation"]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark."""

    name: str
    path: str
    """In the data folder, as `.jsonl` or `.jsonl.gz`."""
    fields: tuple[str, ...]
    """What a row must hold besides `id`."""
    metric: str
    """lm-eval's name for the score of an item."""
    kind: Kind = "loglikelihood"
    num_choices: int | None = None
    """Where the prompt names every option: how many a question must have."""
    examples_path: str | None = None
    """Solved problems that can stand in front of a question."""
    examples_by: str | None = None
    """Field in which a question and the problems in front of it agree."""
    note: str = ""
    """Split, and where the prompt is not the one of lm-eval."""

    def config(self) -> dict[str, Any]:
        """The task definition for lm-eval, all but its data."""
        text = (files(__package__) / "yaml" / f"{self.name}.yaml").read_text(encoding="utf-8")
        config: dict[str, Any] = yaml.safe_load(text)
        return config


_CHOICE = ("question", "choices", "answer")
_SCHEMA = ("prefixes", "suffix", "answer")

BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("hellaswag", "forgetting/hellaswag.jsonl", _CHOICE, "acc_norm", note="validation"),
        Benchmark("winogrande", "forgetting/winogrande.jsonl", _SCHEMA, "acc", note="validation (XL)"),
        Benchmark("winograd_wsc273", "forgetting/winograd_wsc273.jsonl", _SCHEMA, "acc", note="all"),
        Benchmark("arc_easy", "forgetting/arc_easy.jsonl", _CHOICE, "acc_norm", note="test"),
        Benchmark("arc_challenge", "forgetting/arc_challenge.jsonl", _CHOICE, "acc_norm", note="test"),
        Benchmark("piqa", "forgetting/piqa.jsonl", _CHOICE, "acc_norm", note="validation"),
        Benchmark("openbookqa", "forgetting/openbookqa.jsonl", _CHOICE, "acc_norm", note="test"),
        Benchmark("boolq", "forgetting/boolq.jsonl", ("passage", *_CHOICE), "acc", note="validation"),
        Benchmark("sciq", "forgetting/sciq.jsonl", _CHOICE, "acc_norm", note="test; the passage is left out"),
        Benchmark("commonsense_qa", "forgetting/commonsense_qa.jsonl", _CHOICE, "acc", num_choices=5, note="dev"),
        Benchmark(
            "copa", "forgetting/copa.jsonl", _CHOICE, "acc", note="validation; one space before an option, not two"
        ),
        Benchmark(
            "lambada_openai", "forgetting/lambada_openai.jsonl", ("context", "target"), "acc", note="test (OpenAI's)"
        ),
        Benchmark(
            "mmlu",
            "mmlu/mmlu_test.jsonl",
            ("subject", *_CHOICE),
            "acc",
            num_choices=4,
            examples_path="mmlu/mmlu_dev.jsonl",
            examples_by="subject",
            note="test; as many examples as are asked for, none by themselves",
        ),
        Benchmark(
            "triviaqa",
            "generation/triviaqa_sub.jsonl",
            ("question", "aliases"),
            "exact_match",
            "generation",
            note="subset",
        ),
        Benchmark(
            "gsm8k",
            "generation/gsm8k_test.jsonl",
            ("question", "answer"),
            "exact_match",
            "generation",
            examples_path="generation/gsm8k_train.jsonl",
            note="test; the first training problems as examples, not some at random",
        ),
        Benchmark(
            "humaneval",
            "generation/humaneval.jsonl",
            ("prompt", "entry_point", "test"),
            "pass@1",
            "generation",
            note="all",
        ),
        Benchmark(
            "ifeval",
            "generation/ifeval.jsonl",
            ("prompt", "instruction_id_list", "kwargs"),
            "prompt_level_strict_acc",
            "generation",
            note="all",
        ),
    )
}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "loki-paper": ("triviaqa", "gsm8k", "hellaswag", "winogrande", "humaneval", "ifeval"),
    "likelihood": tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.kind == "loglikelihood"),
}
"""Several benchmarks by one name: those of the paper's tables, and all that need no generating."""


def expand(names: Sequence[str]) -> list[str]:
    """Names with groups replaced by their members, each once, in the order in which they came.

    Raises:
        InputError: none are named.
    """
    found = [member for name in names for member in GROUPS.get(name, (name,))]
    if not found:
        raise InputError(f"no task is named: give one or more of {known_names()}")
    return list(dict.fromkeys(found))


def find(name: str) -> Benchmark:
    """A benchmark by name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in BENCHMARKS:
        raise InputError(f"task {name!r} is unknown: choose from {known_names()}")
    return BENCHMARKS[name]


def require_known(names: Sequence[str], *, others: Sequence[str]) -> None:
    """Make sure that every name is one of a benchmark; `others` are names that could be given too.

    Raises:
        InputError: one is not.
    """
    for name in names:
        if name not in BENCHMARKS:
            raise InputError(f"task {name!r} is unknown: choose from {', '.join([known_names(), *others])}")


def known_names() -> str:
    """All names, for messages."""
    return ", ".join([*BENCHMARKS, *GROUPS])
