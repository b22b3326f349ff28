"""Strategies: from votes to the selected rows (LoKI section 3.2, its controls, and what goes beyond them)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType
from typing import Literal, cast, get_args

import numpy as np

from loki.choices import StrategyName
from loki.errors import InputError
from loki.log.reader import AttributionLog
from loki.rows import RowSelection
from loki.selection.quota import format_quota, parse_quota, rows_for_quota
from loki.selection.shares import adaptive_counts
from loki.selection.threads import read_ahead
from loki.selection.votes import Ballot, Direction, Scope, Score, VoteCounter, Votes

MOST_SHARE = 2
"""Times the balanced number of rows that `capped` takes from a layer at most."""


@dataclass(frozen=True)
class Strategy:
    """A strategy in terms of where rows compete, which end of which score wins, and how layers share the rows."""

    scope: Scope
    direction: Direction | Literal["random"]
    score: Score = "signed"
    """As in the paper, or its magnitude: the lowest signed scores argue against the answer, the lowest magnitudes
    do nothing to it."""
    layers: Literal["equal", "adaptive", "capped"] = "equal"
    """The same number from each, or as many as `adaptive_counts` or `capped_counts` tells; the latter takes rows by
    their mean score alone."""

    @property
    def votes_decide(self) -> bool:
        """Whether prompts elect the rows."""
        return self.direction != "random" and self.layers != "capped"


STRATEGIES: Mapping[StrategyName, Strategy] = MappingProxyType(
    {
        "layer_balanced": Strategy("layer", "lowest"),
        "layer_balanced_magnitude": Strategy("layer", "lowest", "magnitude"),
        "adaptive": Strategy("layer", "lowest", "magnitude", "adaptive"),
        "capped": Strategy("layer", "lowest", layers="capped"),
        "layer_highest": Strategy("layer", "highest"),
        "layer_highest_magnitude": Strategy("layer", "highest", "magnitude"),
        "global_lowest": Strategy("model", "lowest"),
        "global_highest": Strategy("model", "highest"),
        "random": Strategy("layer", "random"),
    }
)


def parse_strategy(text: str) -> StrategyName:
    """A strategy by its name.

    Raises:
        InputError: unknown.
    """
    for name in get_args(StrategyName):
        if text == name:
            return cast(StrategyName, name)
    raise InputError(f"strategy {text!r} is unknown: choose one of {', '.join(get_args(StrategyName))}")


@dataclass(frozen=True)
class Election:
    """One selection to be made: a strategy, a quota in exact arithmetic, and who stands."""

    strategy: StrategyName
    quota: Fraction
    candidates_LD: np.ndarray  # noqa: N815
    """(L, D) bool."""
    count: int
    """Rows for each layer with candidates, or for the whole model."""
    seed: int = 0
    """Of the random strategy."""

    @classmethod
    def of(
        cls, strategy: StrategyName, quota: str | float | Fraction, candidates_LD: np.ndarray, *, seed: int = 0
    ) -> Election:
        """`quota` is in percent of the rows of each layer with candidates (or of all of them together).

        Raises:
            InputError: unknown strategy, a quota outside (0, 100] or too small for one row, or fewer candidates
                than the quota takes.
        """
        strategy, exact = parse_strategy(strategy), parse_quota(quota)
        num_rows = candidates_LD.shape[1]
        standing_L = candidates_LD.sum(axis=1)
        layers = np.flatnonzero(standing_L)
        if STRATEGIES[strategy].scope == "layer":
            count = rows_for_quota(exact, num_rows)
            least = int(layers[np.argmin(standing_L[layers])])
            places = [(f"layer {least}", int(standing_L[least]))]
        else:
            count = rows_for_quota(exact, len(layers) * num_rows)
            places = [("the model", int(standing_L.sum()))]
        for place, left in places:
            if count > left:
                raise InputError(
                    f"quota {format_quota(exact)} takes {count} rows, but {place} has {left} left to select from: "
                    "lower the quota, or exclude fewer rows"
                )
        return cls(strategy, exact, candidates_LD, count, seed)

    @property
    def ballot(self) -> Ballot | None:
        """What each prompt votes for; None where rows are drawn at random."""
        strategy = STRATEGIES[self.strategy]
        if strategy.direction == "random":
            return None
        return Ballot(strategy.scope, strategy.direction, self.count, strategy.score)

    def winners(self, votes: Votes | None) -> RowSelection:
        """The selected rows, given the votes of `ballot`; random rows take none."""
        ballot = self.ballot
        if ballot is None:
            return RowSelection.from_lists(self._drawn())
        assert votes is not None, "rows that are elected need votes"
        counts_L: Sequence[int] | None = None
        if STRATEGIES[self.strategy].layers == "adaptive":
            counts_L = adaptive_counts(votes.mean_scores_LD, self.candidates_LD, self.count)
        elif STRATEGIES[self.strategy].layers == "capped":
            counts_L = capped_counts(votes.mean_scores_LD, self.candidates_LD, self.count)
            # Votes tell ranks only; without any the means decide.
            votes = replace(votes, counts_LD=np.zeros_like(votes.counts_LD))
        return RowSelection.from_lists(winners(votes, ballot, self.candidates_LD, counts_L))

    def _drawn(self) -> list[list[int]]:
        generator = np.random.default_rng(self.seed)
        return [
            generator.choice(np.flatnonzero(standing_D), self.count, replace=False).tolist() if standing_D.any() else []
            for standing_D in self.candidates_LD
        ]


@dataclass(frozen=True)
class Selection:
    """Selected rows and the votes that chose them."""

    election: Election
    rows: RowSelection
    votes: Votes | None
    """None where rows were drawn at random."""


def select(
    log: AttributionLog,
    quota: str | float | Fraction,
    strategy: StrategyName = "layer_balanced",
    *,
    candidates_LD: np.ndarray | None = None,
    seed: int = 0,
) -> Selection:
    """Select rows by votes over all prompts of a log.

    Raises:
        InputError: as `Election.of`.
        ArtefactError: the log holds NaN or infinity, or is damaged.
    """
    if candidates_LD is None:
        candidates_LD = np.ones((log.num_layers, log.num_rows), dtype=bool)
    return select_all(log, [Election.of(strategy, quota, candidates_LD, seed=seed)])[0]


def select_all(log: AttributionLog | None, elections: Sequence[Election]) -> list[Selection]:
    """Hold several elections among the same candidates in one pass over the log; random ones need none.

    Raises:
        InputError: no log for a strategy that needs one.
        ArtefactError: the log holds NaN or infinity, or is damaged.
    """
    ballots = list(dict.fromkeys(ballot for election in elections if (ballot := election.ballot) is not None))
    votes: dict[Ballot | None, Votes | None] = {None: None}
    if ballots:
        if log is None:
            needing = next(election.strategy for election in elections if election.ballot is not None)
            raise InputError(f"strategy {needing!r} needs an attribution log: make one with `loki analyse`")
        counter = VoteCounter(ballots, elections[0].candidates_LD)
        for scores_NLD in read_ahead(log.stored_chunks()):
            counter.add(scores_NLD)
        votes |= zip(ballots, counter.result(), strict=True)
    return [
        Selection(election, election.winners(votes[election.ballot]), votes[election.ballot]) for election in elections
    ]


def capped_counts(mean_scores_LD: np.ndarray, candidates_LD: np.ndarray, count: int) -> list[int]:
    """Rows for each layer, `count` a layer with candidates on average: those of the lowest mean over the whole model.

    No layer gives more than `MOST_SHARE` times `count`; what it would give beyond goes to the rows with the next
    lowest means elsewhere. Equal means go to the lower layer, then to the lower row. For scores whose size means the
    same in every layer, such as damage. Every layer with candidates must have `count` of them.
    """
    counts = [0] * len(candidates_LD)
    left = count * int(candidates_LD.any(axis=1).sum())
    for place in np.argsort(mean_scores_LD, axis=None, kind="stable"):
        layer, row = divmod(int(place), candidates_LD.shape[1])
        if left and candidates_LD[layer, row] and counts[layer] < MOST_SHARE * count:
            counts[layer] += 1
            left -= 1
    return counts


def winners(
    votes: Votes, ballot: Ballot, candidates_LD: np.ndarray | None = None, counts_L: Sequence[int] | None = None
) -> list[list[int]]:
    """Rows with most votes; ties go to the lower mean attribution, then to the lower index.

    For `highest` the tie rule is mirrored: higher mean, then higher index. `counts_L` gives each layer a number of
    its own instead of the ballot's.
    """
    num_layers, num_rows = votes.counts_LD.shape
    groups = (num_layers, num_rows) if ballot.scope == "layer" else (1, num_layers * num_rows)
    standing_GC = np.ones(groups, dtype=bool) if candidates_LD is None else candidates_LD.reshape(groups)
    sign = 1 if ballot.direction == "lowest" else -1
    rows: list[list[int]] = [[] for _ in range(num_layers)]
    for group, (counts, means, standing_C) in enumerate(
        zip(votes.counts_LD.reshape(groups), votes.mean_scores_LD.reshape(groups), standing_GC, strict=True)
    ):
        order = np.lexsort((sign * np.arange(counts.size), sign * means, -counts))
        order = order[standing_C[order]]
        for winner in order[: ballot.count if counts_L is None else counts_L[group]]:
            layer, row = (group, int(winner)) if ballot.scope == "layer" else divmod(int(winner), num_rows)
            rows[layer].append(row)
    return [sorted(layer_rows) for layer_rows in rows]
