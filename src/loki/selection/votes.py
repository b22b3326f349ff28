"""Votes for rows: in how many prompts is a row among the k lowest (or highest) of its scope?

One pass over the log serves any number of ballots; memory does not grow with the number of prompts.
Shapes: n prompts of a piece, L layers, D rows, C candidates of a scope.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from loki.log.reader import as_float32
from loki.selection.threads import in_threads, read_ahead

Scope = Literal["layer", "model"]
Direction = Literal["lowest", "highest"]
Score = Literal["signed", "magnitude"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

BLOCK_SCORES = 2**19
"""Scores that a thread ranks at a time, so that they stay in its cache."""
MODEL_PROMPTS = 32
"""Prompts of one task of a thread where rows compete over the whole model; each task has counts of its own."""
MOST_PROMPTS = 255
"""Prompts of any task, so that bytes can count their votes."""


@dataclass(frozen=True)
class Ballot:
    """What each prompt votes for: the `count` lowest or highest scores of a layer, or of the whole model."""

    scope: Scope
    direction: Direction
    count: int
    score: Score = "signed"


@dataclass(frozen=True)
class Votes:
    """Votes over all prompts of a log."""

    counts_LD: np.ndarray  # noqa: N815
    """Votes for each row (L, D), int64."""
    mean_scores_LD: np.ndarray  # noqa: N815
    """Mean attribution of each row (L, D), or of its magnitude if the ballot ranks by that; float64; it breaks ties."""
    num_prompts: int
    num_abstentions: int
    """Prompt-scopes whose scores are all equal: they vote for nothing."""


class VoteCounter:
    """Counts several ballots while a log goes by, piece by piece."""

    def __init__(self, ballots: Sequence[Ballot], candidates_LD: np.ndarray | None = None) -> None:
        """`candidates_LD` (L, D) bool names the rows that stand for election; None: all.

        Rows that do not stand get no vote, and prompts vote as if they were not there.
        """
        self.ballots = tuple(ballots)
        self.candidates_LD = candidates_LD
        self._of_scope = {
            scope: {index: ballot for index, ballot in enumerate(ballots) if ballot.scope == scope} for scope in SCOPES
        }
        self._counts: list[np.ndarray] = []
        self._totals: dict[Score, np.ndarray] = {}
        self._abstentions = [0] * len(self.ballots)
        self._num_prompts = 0

    def add(self, scores_NLD: np.ndarray) -> None:
        """Count the votes of further prompts: scores (n, L, D) of any floating dtype, finite."""
        if not self._num_prompts:
            self._counts = [np.zeros(scores_NLD.shape[1:], dtype=np.int64) for _ in self.ballots]
            self._totals = {ballot.score: np.zeros(scores_NLD.shape[1:]) for ballot in self.ballots}
        self._num_prompts += len(scores_NLD)
        for start in range(0, len(scores_NLD), MOST_PROMPTS):
            self._add(scores_NLD[start : start + MOST_PROMPTS])

    def result(self) -> list[Votes]:
        """Votes so far, one for each ballot."""
        assert self._num_prompts, "a log has at least one prompt"
        return [
            Votes(counts_LD, self._totals[ballot.score] / self._num_prompts, self._num_prompts, abstentions)
            for ballot, counts_LD, abstentions in zip(self.ballots, self._counts, self._abstentions, strict=True)
        ]

    def _add(self, scores_NLD: np.ndarray) -> None:
        num_prompts, num_layers, num_rows = scores_NLD.shape
        standing_LD = self.candidates_LD

        def add_layer(layer: int) -> _Tally:
            tally = _Tally(self._of_scope["layer"], num_rows, None if standing_LD is None else standing_LD[layer])
            for block_ND in _blocks(scores_NLD[:, layer]):
                exact_ND = as_float32(block_ND) if block_ND.dtype == np.float16 else block_ND
                for score, total_LD in self._totals.items():
                    total_LD[layer] += score_of(exact_ND, score).sum(axis=0, dtype=np.float64)
                tally.add(block_ND)
            return tally

        for layer, tally in enumerate(in_threads(add_layer, range(num_layers))):
            self._collect(tally, layer, num_layers)
        if not self._of_scope["model"]:
            return

        def add_prompts(scores_NC: np.ndarray) -> _Tally:
            standing_C = None if standing_LD is None else standing_LD.reshape(-1)
            tally = _Tally(self._of_scope["model"], num_layers * num_rows, standing_C)
            for block_NC in _blocks(scores_NC):
                tally.add(block_NC)
            return tally

        flat_NC = scores_NLD.reshape(num_prompts, -1)
        tasks = [flat_NC[start : start + MODEL_PROMPTS] for start in range(0, num_prompts, MODEL_PROMPTS)]
        for tally in in_threads(add_prompts, tasks):
            self._collect(tally, 0, 1)

    def _collect(self, tally: _Tally, group: int, num_groups: int) -> None:
        for index, votes_C in tally.votes.items():
            self._counts[index].reshape(num_groups, -1)[group] += votes_C
            self._abstentions[index] += tally.num_abstentions[index]


class _Tally:
    """Votes of up to `MOST_PROMPTS` prompts in one group of rows, for some ballots by their number."""

    def __init__(self, ballots: Mapping[int, Ballot], num_rows: int, standing_C: np.ndarray | None) -> None:
        # A group in which no row stands holds no election.
        self.ballots = {} if standing_C is not None and not standing_C.any() else ballots
        self.standing_C = standing_C
        self.votes = {index: np.zeros(num_rows, dtype=np.uint8) for index in self.ballots}
        self.num_abstentions = dict.fromkeys(self.ballots, 0)

    def add(self, scores_NC: np.ndarray) -> None:
        all_marks = mark_votes(scores_NC, list(self.ballots.values()), self.standing_C)
        for index, marks_NC in zip(self.ballots, all_marks, strict=True):
            self.votes[index] += marks_NC.view(np.uint8).sum(axis=0, dtype=np.uint8)
            self.num_abstentions[index] += int((~marks_NC.any(axis=1)).sum())


def count_votes(chunks: Iterable[np.ndarray], ballots: Sequence[Ballot]) -> list[Votes]:
    """Count several ballots in one pass over score chunks (n, L, D)."""
    counter = VoteCounter(ballots)
    for scores_NLD in read_ahead(chunks):
        counter.add(scores_NLD)
    return counter.result()


def mark_votes(
    scores_NC: np.ndarray, ballots: Sequence[Ballot], standing_C: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """For each ballot the votes of n prompts among C rows: (n, C) bool.

    Ties go to the lower index for `lowest` and, mirrored, to the higher index for `highest`; indices of scope
    `model` run over layers and rows, layer by layer. A prompt whose scores are all equal votes for nothing.
    Rows not in `standing_C` (C,) are passed over.
    """
    if ballots and standing_C is not None and not standing_C.all():
        for marks_NS in mark_votes(scores_NC[:, standing_C], ballots):
            marks_NC = np.zeros(scores_NC.shape, dtype=bool)
            marks_NC[:, standing_C] = marks_NS
            yield marks_NC
        return
    rankings: dict[Score, _Ranking] = {}
    for ballot in ballots:
        if ballot.score not in rankings:
            counts = {(other.direction, other.count) for other in ballots if other.score == ballot.score}
            rankings[ballot.score] = _Ranking(_sortable(scores_NC, ballot.score), sort=len(counts) > 1)
        yield rankings[ballot.score].marks(ballot)


def score_of(scores: np.ndarray, score: Score) -> np.ndarray:
    """What a ballot ranks by."""
    return np.abs(scores) if score == "magnitude" else scores


def _sortable(scores: np.ndarray, score: Score) -> np.ndarray:
    """Numbers in the order of what a ballot ranks by.

    For half precision, which processors do not compare, these are whole numbers: its bits but the first are the
    magnitude's place among all, and the first is the sign. Zeros of both signs are 0.
    """
    if scores.dtype != np.float16:
        return score_of(scores, score)
    bits = scores.view(np.int16)
    places = bits & 0x7FFF
    if score == "signed":
        signs = bits >> 15  # 0 or -1, with which the next two lines negate
        places ^= signs
        places -= signs
    return places


class _Ranking:
    """The scores (n, C) of n prompts, of which the best `count` are found without ranking each row by itself.

    The last score that wins is found by sorting values or by parting them, both of which processors do many at a
    time; comparing with it marks all votes at once. Only where the first score that loses equals it do indices decide.
    """

    def __init__(self, values_NC: np.ndarray, *, sort: bool) -> None:
        self.values_NC = values_NC
        self.sorted_NC = np.sort(values_NC, axis=1) if sort else None

    def marks(self, ballot: Ballot) -> np.ndarray:
        """The votes (n, C) bool."""
        values_NC, num_rows, lowest = self.values_NC, self.values_NC.shape[1], ballot.direction == "lowest"
        if ballot.count == num_rows:
            marks_NC = np.ones(values_NC.shape, dtype=bool)
            marks_NC[values_NC.min(axis=1) == values_NC.max(axis=1)] = False
            return marks_NC
        last_N, first_out_N = self._edge(ballot)
        marks_NC = values_NC <= last_N[:, None] if lowest else values_NC >= last_N[:, None]
        for n in np.flatnonzero(first_out_N == last_N):
            tied = np.flatnonzero(values_NC[n] == last_N[n])
            surplus = len(tied) if len(tied) == num_rows else np.count_nonzero(marks_NC[n]) - ballot.count
            marks_NC[n, tied[len(tied) - surplus :] if lowest else tied[:surplus]] = False
        return marks_NC

    def _edge(self, ballot: Ballot) -> tuple[np.ndarray, np.ndarray]:
        """For each prompt the last score that wins and the first one that does not, (n,) each."""
        num_rows, lowest = self.values_NC.shape[1], ballot.direction == "lowest"
        last, first_out = ballot.count - 1, ballot.count
        if not lowest:
            last, first_out = num_rows - 1 - last, num_rows - 1 - first_out
        if self.sorted_NC is not None:
            return self.sorted_NC[:, last], self.sorted_NC[:, first_out]
        # Parted at the first score that loses, so that the last one that wins is sought among the few winners.
        parted_NC = np.partition(self.values_NC, first_out, axis=1)
        winners_NC = parted_NC[:, :first_out] if lowest else parted_NC[:, first_out + 1 :]
        return winners_NC.max(axis=1) if lowest else winners_NC.min(axis=1), parted_NC[:, first_out]


def _blocks(scores_NC: np.ndarray) -> Iterator[np.ndarray]:
    """The same scores (n, C), few prompts at a time."""
    step = max(1, BLOCK_SCORES // scores_NC.shape[1])
    return (scores_NC[start : start + step] for start in range(0, len(scores_NC), step))
