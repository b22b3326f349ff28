"""MMLU: 14,042 test, 1,531 validation and 285 development questions of 57 subjects, from a folder or from the Hub."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from loki.errors import InputError
from loki.prompts.json_lines import answer_field, choices_field, read_rows, shown, text_field, user_path
from loki.prompts.questions import MmluSplit, Question

SUBJECTS = (
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "business_ethics",
    "clinical_knowledge",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_medicine",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "econometrics",
    "electrical_engineering",
    "elementary_mathematics",
    "formal_logic",
    "global_facts",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_european_history",
    "high_school_geography",
    "high_school_government_and_politics",
    "high_school_macroeconomics",
    "high_school_mathematics",
    "high_school_microeconomics",
    "high_school_physics",
    "high_school_psychology",
    "high_school_statistics",
    "high_school_us_history",
    "high_school_world_history",
    "human_aging",
    "human_sexuality",
    "international_law",
    "jurisprudence",
    "logical_fallacies",
    "machine_learning",
    "management",
    "marketing",
    "medical_genetics",
    "miscellaneous",
    "moral_disputes",
    "moral_scenarios",
    "nutrition",
    "philosophy",
    "prehistory",
    "professional_accounting",
    "professional_law",
    "professional_medicine",
    "professional_psychology",
    "public_relations",
    "security_studies",
    "sociology",
    "us_foreign_policy",
    "virology",
    "world_religions",
)
PUBLIC_SUBJECTS = tuple(subject for subject in SUBJECTS if subject != "high_school_mathematics")
"""The 56 that the public implementation analyses."""
NUM_CHOICES = 4
HUB_NAME = "cais/mmlu"
SHORT_NAMES: Mapping[MmluSplit, str] = {"dev": "dev", "validation": "val", "test": "test"}
"""How the original release names each split."""

Rows = Iterable[tuple[str, Mapping[str, Any]]]
"""Rows with `question`, `choices`, `answer` and `subject`, perhaps `id`, each after the place where it stands."""


def load_mmlu(
    split: MmluSplit, *, data_dir: str | Path | None = None, subjects: Sequence[str] | None = None
) -> list[Question]:
    """The questions of a split, by subject, inside a subject as they stand in the file.

    `data_dir` holds (itself or in `mmlu/`) JSON Lines `mmlu_dev`, `mmlu_val` or `mmlu_validation`, `mmlu_test`
    with `.jsonl` or `.jsonl.gz`, or (itself, in `mmlu/` or `data/`) the original release, `test/<subject>_test.csv`
    and so on. Without it they come from the Hub or its cache. A row without `id` is named by its split, subject and
    place in the subject, from 0.

    Raises:
        InputError: an unknown split or subject, no data there, a subject without questions, a row of another form.
    """
    if split not in get_args(MmluSplit):
        raise InputError(f"MMLU split {split!r} is unknown: choose {', '.join(get_args(MmluSplit))}")
    chosen = _known(SUBJECTS if subjects is None else subjects)
    source, rows = _from_hub(split) if data_dir is None else _from_folder(user_path(data_dir), split, chosen)
    questions = [question for question in _questions(rows, split) if question.subject in chosen]
    missing = chosen - {question.subject for question in questions}
    if missing:
        raise InputError(
            f"{source} has no {split} questions of {_some(sorted(missing))}: complete it, or name only subjects it has"
        )
    return sorted(questions, key=lambda question: question.subject)


def _known(subjects: Sequence[str]) -> frozenset[str]:
    if not subjects:
        raise InputError("no MMLU subject is chosen: name at least one")
    for subject in subjects:
        if subject not in SUBJECTS:
            near = get_close_matches(subject, SUBJECTS, n=1)
            hint = f"do you mean {near[0]!r}?" if near else f"subjects are {SUBJECTS[0]!r} to {SUBJECTS[-1]!r}"
            raise InputError(f"MMLU has no subject {subject!r}: {hint}")
    return frozenset(subjects)


def _questions(rows: Rows, split: MmluSplit) -> Iterator[Question]:
    counts: Counter[str] = Counter()
    places: dict[str, str] = {}
    for where, row in rows:
        subject = text_field(row, "subject", where)
        if subject not in SUBJECTS:
            raise InputError(f"{where}: {shown(subject)} is none of MMLU's {len(SUBJECTS)} subjects")
        number = counts[subject]
        counts[subject] += 1
        question_id = text_field(row, "id", where) if "id" in row else f"mmlu_{split}_{subject}_{number}"
        if question_id in places:
            raise InputError(f"{where} has the id {question_id!r} of {places[question_id]}: ids must be unique")
        places[question_id] = where
        choices = choices_field(row, where, fewest=NUM_CHOICES, most=NUM_CHOICES)
        answer = answer_field(row, NUM_CHOICES, where)
        yield Question(question_id, subject, split, text_field(row, "question", where), choices, answer)


def _from_folder(folder: Path, split: MmluSplit, subjects: frozenset[str]) -> tuple[str, Rows]:
    if not folder.is_dir():
        raise InputError(f"data folder {folder} does not exist: name the folder that holds MMLU")
    names = dict.fromkeys((SHORT_NAMES[split], split))
    for root in (folder, folder / "mmlu"):
        for name in names:
            for ending in ("jsonl", "jsonl.gz"):
                path = root / f"mmlu_{name}.{ending}"
                if path.is_file():
                    return str(path), ((where, row) for where, _, row in read_rows(path))
    short = SHORT_NAMES[split]
    for root in (folder, folder / "mmlu", folder / "data", folder / "mmlu" / "data"):
        paths = {subject: root / short / f"{subject}_{short}.csv" for subject in sorted(subjects)}
        if any(path.is_file() for path in paths.values()):
            return str(root / short), _csv_rows({name: path for name, path in paths.items() if path.is_file()})
    raise InputError(
        f"{folder} holds no MMLU {split} questions: they are expected in mmlu_{short}.jsonl, mmlu_{short}.jsonl.gz "
        f"or {short}/<subject>_{short}.csv, there or in its folder mmlu"
    )


def _csv_rows(paths: Mapping[str, Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for subject, path in paths.items():
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file)
                for cells in filter(None, reader):
                    where = f"{path}, line {reader.line_num}"
                    if len(cells) != NUM_CHOICES + 2:
                        raise InputError(
                            f"{where} has {len(cells)} columns: question, {NUM_CHOICES} options and letter are expected"
                        )
                    question, *choices, answer = cells
                    yield where, {"subject": subject, "question": question, "choices": choices, "answer": answer}
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): make it readable") from error
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no CSV file in UTF-8 ({error}): take it from the release again") from error


def _from_hub(split: MmluSplit) -> tuple[str, Rows]:
    remedy = "give --data-dir with a folder that holds MMLU as JSON Lines or as the original CSV files"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(f"MMLU from the Hub needs the package datasets: pip install datasets, or {remedy}") from error
    try:
        rows = load_dataset(HUB_NAME, "all", split=split)
    except Exception as error:
        # Four libraries between here and the network raise what they like; --debug shows which did.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"MMLU cannot be had from the Hub ({reason}): {remedy}") from error
    return HUB_NAME, ((f"{HUB_NAME}, {split} row {number}", row) for number, row in enumerate(rows))


def _some(names: Sequence[str]) -> str:
    most = 3
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
