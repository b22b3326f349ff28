"""Result: one typed form for every number that is reported (what ran, settings, versions, seed, figures)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from loki.errors import ArtefactError
from loki.provenance import read_json, versions, write_json

SCHEMA_VERSION = 1
Unit = Literal["", "%", "points", "nats", "nats per token"]


@dataclass(frozen=True)
class Measure:
    """A number, its standard error where it is an estimate, and over how many items."""

    value: float
    standard_error: float | None = None
    count: int | None = None
    unit: Unit = ""

    def __str__(self) -> str:
        digits = 1 if self.unit in ("%", "points") else 3
        suffix = "%" if self.unit == "%" else ""
        error = f" ± {self.standard_error:.{digits}f}" if self.standard_error is not None else ""
        return f"{self.value:.{digits}f}{error}{suffix and ' ' + suffix}"


@dataclass(frozen=True)
class Comparison:
    """One row of a before/after table."""

    name: str
    before: Measure | None
    after: Measure | None
    change: Measure | None
    higher_is_better: bool = True
    note: str = ""


@dataclass(frozen=True)
class Result:
    """What one command or stage found out."""

    kind: str
    """The command: `analyse`, `select`, `compare`, `train`, `merge`, `evaluate`, `info`, `summary`."""
    settings: Mapping[str, Any]
    """Every setting that could change a figure."""
    figures: Mapping[str, Any]
    """Numbers by name, JSON values only."""
    comparisons: tuple[Comparison, ...] = ()
    """The before/after table, where there is one."""
    seed: int | None = None
    model: str | None = None
    """Name of the model for people, with its quantisation where it has one."""
    versions: Mapping[str, str] = field(default_factory=versions)
    schema_version: int = SCHEMA_VERSION

    def save(self, path: Path) -> None:
        """Write the result as JSON.

        Raises:
            OutputError: the folder cannot be written.
        """
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a result.

        Raises:
            ArtefactError: missing, not JSON, or of another schema.
        """
        values = read_json(path, what="result")
        if not isinstance(values, dict) or "schema_version" not in values:
            raise ArtefactError(f"{path} is not a result of loki: name a file such as study.json or evaluate.json")
        if values["schema_version"] != SCHEMA_VERSION:
            raise ArtefactError(f"result {path} has another schema: this version reads {SCHEMA_VERSION}; run again")
        try:
            comparisons = tuple(_comparison(row) for row in values.pop("comparisons"))
            return cls(comparisons=comparisons, **values)
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"result {path} is not a result of this version: run again") from error


def finite(value: Any) -> Any:
    """A JSON value in which null stands for every number that is not finite, because JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


def _comparison(row: Mapping[str, Any]) -> Comparison:
    measures = {key: None if row[key] is None else Measure(**row[key]) for key in ("before", "after", "change")}
    return Comparison(name=row["name"], higher_is_better=row["higher_is_better"], note=row["note"], **measures)
