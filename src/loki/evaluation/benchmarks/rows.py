"""Rows of a benchmark's file, checked, and the sample of them that is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loki.errors import InputError
from loki.evaluation.benchmarks.table import BENCHMARKS, Benchmark
from loki.prompts.json_lines import answer_field, choices_field, read_rows, shown, text_field, user_path


def find_file(task: str, name: str, data_dir: str | Path) -> Path:
    """A task's file, at `name` in the data folder or right in it, plain or gzipped.

    Raises:
        InputError: no such folder or file.
    """
    data_dir = user_path(data_dir)
    if not data_dir.is_dir():
        raise InputError(f"data folder {str(data_dir)!r} does not exist: name the folder that holds {name}")
    for place in (data_dir / name, data_dir / Path(name).name):
        for path in (place, place.with_name(f"{place.name}.gz")):
            if path.is_file():
                return path
    raise InputError(
        f"{data_dir} has no data for task {task!r}: it is expected in {name} or {name}.gz, there or without the folder"
    )


def load_rows(benchmark: Benchmark, data_dir: str | Path) -> list[dict[str, Any]]:
    """All rows of a benchmark, with `id` and the benchmark's fields; a letter for an answer becomes its index.

    Raises:
        InputError: no such file, or a row that cannot be used.
    """
    path = find_file(benchmark.name, benchmark.path, data_dir)
    rows = []
    places: dict[str, str] = {}
    for where, _, row in read_rows(path):
        row_id = text_field(row, "id", where)
        if row_id in places:
            raise InputError(f"{where} has the id {row_id!r} of {places[row_id]}: ids must be unique")
        places[row_id] = where
        rows.append({"id": row_id, **_fields(benchmark, row, where)})
    if not rows:
        raise InputError(f"{path} has no rows: task {benchmark.name!r} needs at least one")
    return rows


def load_examples(
    benchmark: Benchmark, data_dir: str | Path, rows: Sequence[Mapping[str, Any]], number: int
) -> dict[str, list[dict[str, Any]]]:
    """The first `number` solved problems for each group of `rows` that has its own (`group_of`).

    Raises:
        InputError: a benchmark without any, no such file, too few of them, or a row that cannot be used.
    """
    examples: dict[str, list[dict[str, Any]]] = {group_of(benchmark, row): [] for row in rows}
    if number == 0:
        return examples
    if benchmark.examples_path is None:
        having = ", ".join(name for name, other in BENCHMARKS.items() if other.examples_path is not None)
        raise InputError(
            f"task {benchmark.name!r} has no solved problems to show in a data folder, and --num-fewshot is {number}: "
            f"leave it out, or name tasks that have ({having})"
        )
    path = find_file(benchmark.name, benchmark.examples_path, data_dir)
    for where, _, row in read_rows(path):
        problem = _fields(benchmark, row, where)
        group = examples.get(group_of(benchmark, problem), [])
        if len(group) < number:
            group.append(problem)
    for name, group in examples.items():
        if len(group) < number:
            of_group = f" of {benchmark.examples_by} {name!r}" if name else ""
            raise InputError(
                f"{path} has {len(group)} solved problems{of_group}: task {benchmark.name!r} is to show {number} "
                "(--num-fewshot)"
            )
    return examples


def group_of(benchmark: Benchmark, row: Mapping[str, Any]) -> str:
    """What a question shares with the solved problems in front of it; empty where all have the same."""
    return "" if benchmark.examples_by is None else str(row[benchmark.examples_by])


def sample(task: str, ids: Sequence[str], limit: int | None, seed: int) -> list[str]:
    """`limit` of a task's ids (all where it is None or there are fewer), in the order in which they stood.

    The draw depends on seed, task and each id only: a smaller sample is part of a larger one, and more rows in the
    file put out none but those that the new ones displace.

    Raises:
        InputError: `limit` is below 1.
    """
    if limit is None:
        return list(ids)
    if limit < 1:
        raise InputError(f"a limit of {limit} items is not possible: give 1 or more")
    marks = {id_: hashlib.sha256(f"{seed} {task} {id_}".encode()).digest() for id_ in ids}
    chosen = set(sorted(ids, key=marks.__getitem__)[:limit])
    return [id_ for id_ in ids if id_ in chosen]


def _fields(benchmark: Benchmark, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in benchmark.fields:
        if name == "choices":
            number = benchmark.num_choices
            bounds = {} if number is None else {"fewest": number, "most": number}
            fields[name] = list(choices_field(row, where, **bounds))
        elif name == "answer" and ("choices" in fields or "prefixes" in fields):
            fields[name] = answer_field(row, len(fields.get("choices") or fields["prefixes"]), where)
        elif name in ("prefixes", "aliases", "instruction_id_list"):
            fields[name] = _texts(row, name, where)
        elif name == "kwargs":
            fields[name] = _settings(row, len(fields["instruction_id_list"]), where)
        else:
            fields[name] = text_field(row, name, where)
    return fields


def _texts(row: Mapping[str, Any], name: str, where: str) -> list[str]:
    values = row.get(name)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) and value for value in values):
        raise InputError(f"{where}: {name!r} must be a list of texts, not {shown(values)}")
    if name == "prefixes" and len(values) != 2:
        raise InputError(f"{where}: 'prefixes' must be 2 texts, not {len(values)}")
    return values


def _settings(row: Mapping[str, Any], number: int, where: str) -> list[dict[str, Any]]:
    values = row.get("kwargs")
    if not isinstance(values, list) or len(values) != number or not all(isinstance(value, dict) for value in values):
        raise InputError(f"{where}: 'kwargs' must be {number} objects, one for each instruction, not {shown(values)}")
    return values
