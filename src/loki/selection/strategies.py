"""Strategies: from votes to the selected rows (LoKI section 3.2 and its controls)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import get_args

import numpy as np

from loki.choices import StrategyName
from loki.errors import InputError
from loki.log.reader import AttributionLog
from loki.rows import RowSelection
from loki.selection.quota import parse_quota, rows_for_quota
from loki.selection.votes import Ballot, Direction, Scope, Votes, count_votes


@dataclass(frozen=True)
class Strategy:
    """A strategy in terms of where rows compete and which end of the scores wins."""

    scope: Scope
    direction: Direction


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "layer_balanced": Strategy("layer", "lowest"),
        "layer_highest": Strategy("layer", "highest"),
        "global_lowest": Strategy("model", "lowest"),
        "global_highest": Strategy("model", "highest"),
    }
)


@dataclass(frozen=True)
class Selection:
    """Selected rows and the votes that chose them."""

    rows: RowSelection
    votes: Votes
    ballot: Ballot


def select(log: AttributionLog, quota: str | float | Fraction, strategy: StrategyName = "layer_balanced") -> Selection:
    """Select rows by votes over all prompts of a log.

    `quota` is in percent of the rows of each layer (or of the model, for the global strategies).

    Raises:
        InputError: unknown strategy, or a quota outside (0, 100] or too small for one row.
        ArtefactError: the log holds NaN or infinity, or is damaged.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy {strategy!r} is unknown: choose one of {', '.join(get_args(StrategyName))}")
    exact = parse_quota(quota)
    scope, direction = STRATEGIES[strategy].scope, STRATEGIES[strategy].direction
    competitors = log.num_rows if scope == "layer" else log.num_layers * log.num_rows
    ballot = Ballot(scope, direction, rows_for_quota(exact, competitors))
    (votes,) = count_votes(log.chunks(), [ballot])
    return Selection(RowSelection.from_lists(winners(votes, ballot)), votes, ballot)


def winners(votes: Votes, ballot: Ballot) -> list[list[int]]:
    """Rows with most votes; ties go to the lower mean attribution, then to the lower index.

    For `highest` the tie rule is mirrored: higher mean, then higher index.
    """
    num_layers, num_rows = votes.counts_LD.shape
    groups = (num_layers, num_rows) if ballot.scope == "layer" else (1, num_layers * num_rows)
    sign = 1 if ballot.direction == "lowest" else -1
    rows: list[list[int]] = [[] for _ in range(num_layers)]
    for group, (counts, means) in enumerate(
        zip(votes.counts_LD.reshape(groups), votes.mean_scores_LD.reshape(groups), strict=True)
    ):
        order = np.lexsort((sign * np.arange(counts.size), sign * means, -counts))
        for winner in order[: ballot.count]:
            layer, row = (group, int(winner)) if ballot.scope == "layer" else divmod(int(winner), num_rows)
            rows[layer].append(row)
    return [sorted(layer_rows) for layer_rows in rows]
