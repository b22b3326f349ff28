"""Which runs a study is made of, and which of them can be done next.

First the base; then for every method, in the order of the settings, the runs that choose its learning rate and the
whole run of its first seed; and last the other seeds, so that an early look has something of every method.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from loki.study.settings import StudySettings

Phase = Literal["base", "screen", "whole", "suppress"]


@dataclass(frozen=True)
class Run:
    """One training with its evaluation, or an evaluation without training."""

    method: str
    """Name of a method, or `base`."""
    phase: Phase
    learning_rate: float | None = None
    seed: int = 0

    @property
    def id(self) -> str:
        """The name of its file."""
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        return (
            self.method if self.phase in ("base", "suppress") else f"{self.method}{rate}-seed{self.seed}-{self.phase}"
        )


BASE = Run("base", "base")
Losses = Mapping[Run, float]
"""Held-out loss of every finished run."""


def runs_to_come(settings: StudySettings, losses: Losses) -> Iterator[Run]:
    """All runs that are known so far, finished ones too; whole runs once their learning rate is chosen."""
    yield BASE
    for name in settings.methods:
        yield from _first_runs(settings, name, losses)
    for name, method in settings.methods.items():
        rate = chosen_rate(settings, name, losses)
        if method.kind != "suppress" and rate is not None:
            yield from (Run(name, "whole", rate, seed) for seed in method.seeds[1:])


def num_runs(settings: StudySettings, only: Collection[str] = ()) -> int:
    """How many runs there will be in all, or of some methods, with the base."""
    names = [name for name in settings.methods if not only or name in only]
    return 1 + sum(count for name in names for count in runs_by_phase(settings, name).values())


def runs_by_phase(settings: StudySettings, name: str) -> dict[Phase, int]:
    """How many runs of each phase a method has in all."""
    method = settings.methods[name]
    if method.kind == "suppress":
        return {"suppress": 1}
    return {"screen": len(screens(settings, name)), "whole": len(method.seeds)}


def screens(settings: StudySettings, name: str) -> list[Run]:
    """The short runs of a method, one for each learning rate; a single rate needs none."""
    method = settings.methods[name]
    rates = method.learning_rates if len(method.learning_rates) > 1 else ()
    return [Run(name, "screen", rate, method.seeds[0]) for rate in rates]


def chosen_rate(settings: StudySettings, name: str, losses: Losses) -> float | None:
    """The learning rate of least held-out loss after the short runs, or None while some of them are missing."""
    rates = settings.methods[name].learning_rates
    if len(rates) == 1:
        return rates[0]
    found = {run.learning_rate: losses.get(run) for run in screens(settings, name)}
    if not found or None in found.values():
        return None
    # A loss that is not a number is that of a training that came apart.
    known = {rate: loss if loss is not None and math.isfinite(loss) else math.inf for rate, loss in found.items()}
    return min(known, key=lambda rate: known[rate])


def _first_runs(settings: StudySettings, name: str, losses: Losses) -> Iterator[Run]:
    method = settings.methods[name]
    if method.kind == "suppress":
        yield Run(name, "suppress")
        return
    yield from screens(settings, name)
    rate = chosen_rate(settings, name, losses)
    if rate is not None:
        yield Run(name, "whole", rate, method.seeds[0])
