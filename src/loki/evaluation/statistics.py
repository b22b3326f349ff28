"""Means with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loki.results import Measure, Unit


def mean(values: Sequence[float], unit: Unit = "") -> Measure:
    """Mean and its standard error s/√n (s with n−1); no error for a single value.

    Raises:
        ValueError: no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("the mean of no values is undefined")
    average = math.fsum(values) / n
    if n == 1:
        return Measure(average, None, 1, unit)
    variance = math.fsum((value - average) ** 2 for value in values) / (n - 1)
    return Measure(average, math.sqrt(variance / n), n, unit)


def share(outcomes: Sequence[bool]) -> Measure:
    """Share of true outcomes in percent, with standard error."""
    return mean([100.0 * outcome for outcome in outcomes], "%")


def paired_change(before: Sequence[float], after: Sequence[float], unit: Unit = "") -> Measure:
    """Mean of after − before over the same items, with the standard error of the paired differences."""
    return mean([b - a for a, b in zip(before, after, strict=True)], unit)
