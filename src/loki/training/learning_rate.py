"""The learning rate for a quota: more rows take smaller steps (LoKI, hyper-parameters of its experiments)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

from loki.rows import RowSelection

REFERENCE_QUOTA = 10
EXPONENT = 0.83
"""The paper gives two points only: a quota of 30 % takes 0.4 times the rate of 10 %, and 3^-0.83 = 0.402."""


def selected_quota(selections: Iterable[RowSelection], num_rows: int) -> Fraction:
    """The quota in percent that selects as many rows: the shortest decimal number with ⌊quota·D/100⌋ = K.

    There is a selection for each projection whose rows are trained.

    K of D rows are ⌊quota·D/100⌋ for a whole range of quotas (57 of 576 for 9.9 % and for 10 %); the shortest number
    is the one that a user wrote. Where layers differ in their number of rows, K and D are counted over all layers.
    """
    counts = [len(rows) for selection in selections for rows in selection.rows]
    if len(set(counts)) == 1:
        num_selected, out_of = counts[0], num_rows
    else:
        num_selected, out_of = sum(counts), len(counts) * num_rows
    least, above = Fraction(100 * num_selected, out_of), Fraction(100 * (num_selected + 1), out_of)
    step = Fraction(10)
    while (quota := math.ceil(least / step) * step) >= above:
        step /= 10
    return quota


def learning_rate_at(quota: Fraction, reference: float) -> float:
    """`reference · (10 / quota)^0.83`: the rate for a quota in percent, from the one for 10 %.

    Between the paper's two points, and beyond them, this power law is a rule of thumb, not a result of the paper.
    """
    return reference * math.pow(REFERENCE_QUOTA / quota, EXPONENT)
