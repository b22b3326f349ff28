"""Figures by stage, and provenance, as nested lists of names and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loki.reporting.comparison import measure_cell
from loki.reporting.numbers import format_number
from loki.results import Measure


@dataclass(frozen=True)
class Entry:
    """A name with a value, or with entries of its own."""

    name: str
    text: str = ""
    entries: tuple[Entry, ...] = ()


def stage_entries(figures: Mapping[str, Any]) -> list[Entry]:
    """Numbers by stage; those that stand outside a stage come first."""
    loose = entries_of({name: value for name, value in figures.items() if not isinstance(value, Mapping)})
    stages = [
        Entry(_words(name), entries=entries_of(value)) for name, value in figures.items() if isinstance(value, Mapping)
    ]
    return [stage for stage in [Entry("", entries=loose), *stages] if stage.entries]


def entries_of(values: Mapping[str, Any], *, exact: bool = False) -> tuple[Entry, ...]:
    """JSON values by name; `exact` keeps numbers as they were given, to be typed again."""
    entries = []
    for name, value in values.items():
        if isinstance(value, Mapping) and not _is_measure(value):
            inner = entries_of(value, exact=exact)
            entries += [Entry(_words(name), entries=inner)] if inner else []
        else:
            entries.append(Entry(_words(name), _value(value, exact=exact)))
    return tuple(entries)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _is_measure(value: Mapping[str, Any]) -> bool:
    return value.keys() == asdict(Measure(0.0)).keys()


def _value(value: Any, *, exact: bool) -> str:
    if isinstance(value, Mapping):
        cell = measure_cell(Measure(**value))
        return " ".join(filter(None, (cell.value, cell.error, cell.unit))) if cell else ""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and not exact:
        return format_number(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_value(item, exact=exact) for item in value) or "none"
    return str(value)
