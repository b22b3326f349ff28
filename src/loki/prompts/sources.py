"""Which prompts are analysed: one source or several, in proportions, whole or drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path

from loki.errors import InputError
from loki.prompts.files import load_prompts, stem
from loki.prompts.json_lines import user_path
from loki.prompts.mmlu import load_mmlu
from loki.prompts.prompt import Prompt, question_prompt
from loki.prompts.questions import MmluSplit, load_probe
from loki.prompts.sampling import apportion, draw, largest_total, sample_per_subject

BUILT_IN = ("probe", "mmlu")


@dataclass(frozen=True)
class DatasetSpec:
    """One source of prompts."""

    name_or_path: str
    """`probe`, `mmlu`, or a JSON Lines file."""
    share: float | None = None
    """Weight relative to the other sources, above 0; None: all of it is taken."""


def parse_dataset(spec: str) -> DatasetSpec:
    """`probe`, `mmlu` or a path, perhaps with a share: `mmlu=0.7`, `own.jsonl=30%`.

    What exists as a file as it stands is a path, whatever it holds after `=`.

    Raises:
        InputError: no name, or a share that is not a number above 0.
    """
    name, equals, share = spec.rpartition("=")
    if not equals or _exists(spec):
        name, share = spec, ""
    elif not share:
        raise InputError(f"dataset {spec!r} has no share after '=': write it as {name or 'probe'}=0.7 or =70%")
    if not name:
        raise InputError(f"dataset {spec!r} has no name: choose probe, mmlu or a JSON Lines file")
    return DatasetSpec(name, _share(share, spec) if share else None)


def load_datasets(
    specs: Sequence[DatasetSpec],
    *,
    data_dir: str | Path | None = None,
    split: MmluSplit = "test",
    subjects: Sequence[str] | None = None,
    samples_per_subject: int | None = None,
    num_prompts: int | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """The prompts of all sources, in the order given, inside a source in its own order.

    `data_dir`, `split` and `subjects` (None: all 57) are those of `load_mmlu`; of the probe only the half for
    analysis is taken. First, each source keeps at most `samples_per_subject` prompts of each of its subjects.
    Then, without shares, all is taken, or `num_prompts` of all together; with shares, each source gives its part of
    `num_prompts`, or of the largest total that the sources allow. Draws are seeded and without replacement.
    An id that several sources have is prefixed with its source in each.

    Raises:
        InputError: no source, one named twice, shares for some only, too few prompts, or a source not readable.
    """
    labels = _labels(specs)
    if num_prompts is not None and num_prompts < 1:
        raise InputError(f"{num_prompts} prompts are not possible: ask for 1 or more")
    sources: dict[str, list[Prompt]] = {}
    for label, spec in zip(labels, specs, strict=True):
        prompts = _load(spec.name_or_path, data_dir, split, subjects)
        sources[label] = (
            prompts if samples_per_subject is None else sample_per_subject(prompts, samples_per_subject, seed)
        )
    sources = _with_unique_ids(sources)
    shares = [spec.share for spec in specs if spec.share is not None]
    if shares:
        counts = _counts({label: len(prompts) for label, prompts in sources.items()}, shares, num_prompts)
        parts = [draw(sources[label], count, f"{seed} {label}") for label, count in zip(labels, counts, strict=True)]
        return [prompt for part in parts for prompt in part]
    together = [prompt for prompts in sources.values() for prompt in prompts]
    if num_prompts is None:
        return together
    if num_prompts > len(together):
        raise InputError(f"{num_prompts} prompts are more than the {len(together)} there are: ask for fewer")
    return draw(together, num_prompts, f"{seed}")


def describe_datasets(
    specs: Sequence[DatasetSpec],
    *,
    split: MmluSplit = "test",
    subjects: Sequence[str] | None = None,
    samples_per_subject: int | None = None,
    num_prompts: int | None = None,
    seed: int = 0,
) -> str:
    """The choice of prompts in a few words, the same wherever the files are: `mmlu:test(50 per subject, seed 0)`."""
    names = []
    for spec in specs:
        name = f"mmlu:{split}" if spec.name_or_path == "mmlu" else Path(spec.name_or_path).name
        names.append(name if spec.share is None else f"{name}={spec.share}")
    notes = []
    if subjects is not None and any(spec.name_or_path == "mmlu" for spec in specs):
        notes.append(f"{len(set(subjects))} subjects")
    if samples_per_subject is not None:
        notes.append(f"{samples_per_subject} per subject")
    if num_prompts is not None:
        notes.append(f"{num_prompts} prompts")
    if samples_per_subject is not None or num_prompts is not None or any(spec.share is not None for spec in specs):
        notes.append(f"seed {seed}")
    return "+".join(names) + (f"({', '.join(notes)})" if notes else "")


def _exists(name: str) -> bool:
    try:
        return user_path(name).exists()
    except OSError:
        return False


def _share(text: str, spec: str) -> float:
    percent = text.endswith("%")
    try:
        share = float(Decimal(text.removesuffix("%")) / (100 if percent else 1))
    except (InvalidOperation, OverflowError):
        share = float("nan")
    if not 0 < share < float("inf"):
        raise InputError(
            f"dataset {spec!r} is no file, and {text!r} is no share: write a number above 0, such as =0.7 or =70%"
        )
    return share


def _labels(specs: Sequence[DatasetSpec]) -> list[str]:
    """A short name for each source, all distinct."""
    if not specs:
        raise InputError("no dataset is given: choose probe, mmlu or a JSON Lines file")
    for spec in specs:
        if spec.share is None and any(other.share is not None for other in specs):
            raise InputError(
                f"dataset {spec.name_or_path!r} has no share while another has: give every dataset one "
                f"(such as {spec.name_or_path}=0.5), or none"
            )
    names = [spec.name_or_path for spec in specs]
    places = [name if name in BUILT_IN else user_path(name).resolve() for name in names]
    for place, number in Counter(places).items():
        if number > 1:
            raise InputError(f"dataset {names[places.index(place)]!r} is given twice: name each dataset once")
    short = [name if name in BUILT_IN else stem(Path(name)) for name in names]
    return [
        label if label == name or short.count(label) == 1 else name for label, name in zip(short, names, strict=True)
    ]


def _load(name: str, data_dir: str | Path | None, split: MmluSplit, subjects: Sequence[str] | None) -> list[Prompt]:
    if name == "probe":
        return [question_prompt(question) for question in load_probe("analysis")]
    if name == "mmlu":
        return [question_prompt(question) for question in load_mmlu(split, data_dir=data_dir, subjects=subjects)]
    if not _exists(name):
        raise InputError(f"dataset {name!r} is unknown: choose probe, mmlu or a JSON Lines file that exists")
    return load_prompts(name)


def _with_unique_ids(sources: Mapping[str, Sequence[Prompt]]) -> dict[str, list[Prompt]]:
    counts = Counter(prompt.id for prompts in sources.values() for prompt in prompts)
    unique = {
        label: [prompt if counts[prompt.id] == 1 else replace(prompt, id=f"{label}:{prompt.id}") for prompt in prompts]
        for label, prompts in sources.items()
    }
    for prompt_id, number in Counter(prompt.id for prompts in unique.values() for prompt in prompts).items():
        if number > 1:
            raise InputError(f"several datasets have a prompt of the id {prompt_id!r}: give them other ids")
    return unique


def _counts(available: Mapping[str, int], shares: Sequence[float], num_prompts: int | None) -> list[int]:
    most = largest_total(list(available.values()), shares)
    counts = apportion(most if num_prompts is None else num_prompts, shares)
    for (label, number), count in zip(available.items(), counts, strict=True):
        if count > number:
            raise InputError(
                f"{num_prompts} prompts in these shares need {count} of {label}, which has {number}: "
                f"ask for at most {most}"
            )
    return counts
