"""What a report shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loki.reporting.content import Section
from loki.reporting.survey import LogSurvey
from loki.reporting.wording import KVA, Wording
from loki.results import Result
from loki.rows import RowSelection
from loki.selection.stability import Stability


@dataclass(frozen=True)
class NamedSelection:
    """Selected rows and the name under which the report speaks of them."""

    name: str
    rows: RowSelection
    how: str = ""
    """Strategy and quota, and the score if it is not attribution, where known: `layer_balanced, 10 %, by damage`."""


@dataclass(frozen=True)
class Forgetting:
    """What a forgetting budget measured during a training; see `loki.training.budget`."""

    history: Sequence[Mapping[str, float]]
    """Rows of `step`, `loss_rise`, `kl` (nats per token) and, where they were asked for, `probe_accuracy` and
    `probe_standard_error` (percent); NaN is what was not finite."""
    max_loss_rise: float | None = None
    max_kl: float | None = None
    action: str = "stop"
    """What was done above a limit: `stop`, or `lower` the learning rate."""

    @classmethod
    def of_record(cls, budget: Mapping[str, Any]) -> Forgetting:
        """As a training's record has it."""
        history = [
            {name: math.nan if value is None else value for name, value in row.items()} for row in budget["history"]
        ]
        return cls(history, budget["max_loss_rise"], budget["max_kl"], budget["action"])

    @property
    def limits(self) -> dict[str, float]:
        """The limits that were set, by the measure's name."""
        limits = {"loss_rise": self.max_loss_rise, "kl": self.max_kl}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def exceeded(self, row: Mapping[str, float]) -> list[str]:
        """The measures that are above their limits in a row; what is not finite is."""
        return [name for name, limit in self.limits.items() if not row[name] <= limit]


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
    forgetting: Forgetting | None = None
    """What the training was watched by, if it was."""
    sections: Sequence[Section] = ()
    """Sections made elsewhere, after all others."""
    provenance: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings by the artefact that they made, beside those of the summary."""

    @property
    def shown(self) -> RowSelection | None:
        """The selection over the maps."""
        return self.selections[0].rows if self.selections else None

    @property
    def wording(self) -> Wording:
        """What its log's scores are called; attribution where there is no log."""
        return self.survey.wording if self.survey is not None else KVA
