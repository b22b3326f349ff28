"""The forgetting score: how much of its benchmark scores a model lost (LoKI section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loki.errors import InputError


@dataclass(frozen=True)
class Forgetting:
    """Relative losses in percent; higher is worse, negative is a gain."""

    score: float
    """100/N · Σ (before − after)/before over N benchmarks: the paper's score, in which gains hide losses."""
    losses_only: float
    """The same with gains counted as zero."""
    by_benchmark: Mapping[str, float]


def forgetting(before: Mapping[str, float], after: Mapping[str, float]) -> Forgetting:
    """Forgetting over benchmarks that were scored before and after training.

    Raises:
        InputError: no benchmarks, not the same ones, or a score before training that is not positive.
    """
    if not before or before.keys() != after.keys():
        raise InputError(
            f"forgetting needs the same benchmarks before and after: got {sorted(before)} and {sorted(after)}"
        )
    for name, score in before.items():
        if not math.isfinite(after[name]):
            raise InputError(f"benchmark {name!r} scored {after[name]} after training: a score must be a number")
        if not score > 0:
            raise InputError(f"benchmark {name!r} scored {score} before training: a relative loss needs more than 0")
    losses = {name: 100 * (before[name] - after[name]) / before[name] for name in before}
    count = len(losses)
    return Forgetting(
        score=sum(losses.values()) / count,
        losses_only=sum(max(0.0, loss) for loss in losses.values()) / count,
        by_benchmark=losses,
    )
