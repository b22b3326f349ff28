"""What a report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loki.reporting.survey import LogSurvey
from loki.results import Result
from loki.rows import RowSelection
from loki.selection.stability import Stability


@dataclass(frozen=True)
class NamedSelection:
    """Selected rows and the name under which the report speaks of them."""

    name: str
    rows: RowSelection
    how: str = ""
    """Strategy and quota, where they are known: `layer_balanced, 10 %`."""


@dataclass(frozen=True)
class ReportData:
    """What a report shows; parts that are None or empty are left out."""

    title: str
    model_label: str
    """The model as readers know it, such as `SmolLM2-135M-Instruct (Q4_1, dequantised)`."""
    summary: Result | None = None
    """Of a run: its comparisons are the before/after table, its figures the numbers by stage."""
    survey: LogSurvey | None = None
    """What the attribution log says."""
    selections: Sequence[NamedSelection] = ()
    """The first is drawn over the maps; the others are compared with it."""
    stability: Stability | None = None
    """Of the first selection."""
    training_log: Sequence[Mapping[str, float]] = ()
    """The trainer's log history: rows such as `{"step": 5, "loss": 1.2, "learning_rate": 0.001}`."""
    provenance: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings by the artefact that they made, beside those of the summary."""

    @property
    def shown(self) -> RowSelection | None:
        """The selection over the maps."""
        return self.selections[0].rows if self.selections else None
