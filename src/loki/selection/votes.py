"""Votes for rows: in how many prompts is a row among the k lowest (or highest) of its scope?

One pass over the log, a few prompts in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Scope = Literal["layer", "model"]
Direction = Literal["lowest", "highest"]


@dataclass(frozen=True)
class Ballot:
    """What each prompt votes for: the `count` lowest or highest scores of a layer, or of the whole model."""

    scope: Scope
    direction: Direction
    count: int


@dataclass(frozen=True)
class Votes:
    """Votes over all prompts of a log."""

    counts_LD: np.ndarray  # noqa: N815
    """Votes for each row (L, D), int64."""
    mean_scores_LD: np.ndarray  # noqa: N815
    """Mean attribution of each row (L, D), float64; it breaks ties."""
    num_prompts: int
    num_abstentions: int
    """Prompt-scopes whose scores are all equal: they vote for nothing."""


def count_votes(chunks: Iterable[np.ndarray], ballots: Sequence[Ballot]) -> list[Votes]:
    """Count several ballots in one pass over score chunks (n, L, D).

    Ties go to the lower index for `lowest` and, mirrored, to the higher index for `highest`; indices of scope
    `model` run over layers and rows, layer by layer.
    """
    totals_LD: np.ndarray | None = None
    counts: list[np.ndarray] = []
    abstentions = [0] * len(ballots)
    num_prompts = 0
    for scores_NLD in chunks:
        num_layers, num_rows = scores_NLD.shape[1:]
        if totals_LD is None:
            totals_LD = np.zeros((num_layers, num_rows))
            counts = [np.zeros((num_layers, num_rows), dtype=np.int64) for _ in ballots]
        totals_LD += scores_NLD.sum(axis=0, dtype=np.float64)
        num_prompts += len(scores_NLD)
        for scores_LD in scores_NLD:
            for index, ballot in enumerate(ballots):
                groups = scores_LD if ballot.scope == "layer" else scores_LD.reshape(1, -1)
                counts_view = counts[index].reshape(groups.shape)
                for group, group_counts in zip(groups, counts_view, strict=True):
                    if group.min() == group.max():
                        abstentions[index] += 1
                    else:
                        group_counts[chosen(group, ballot)] += 1
    assert totals_LD is not None, "a log has at least one prompt"
    return [
        Votes(count_LD, totals_LD / num_prompts, num_prompts, abstained)
        for count_LD, abstained in zip(counts, abstentions, strict=True)
    ]


def chosen(scores: np.ndarray, ballot: Ballot) -> np.ndarray:
    """Indices of one prompt's votes in a group of scores (n,)."""
    if ballot.direction == "lowest":
        return np.argsort(scores, kind="stable")[: ballot.count]
    # The reverse of a stable ascending order: among equals the higher index comes first.
    return np.argsort(scores, kind="stable")[::-1][: ballot.count]
