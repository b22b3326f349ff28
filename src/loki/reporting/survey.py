"""One pass over an attribution log for everything that the report shows of it.

Shapes: N prompts, L layers, D rows (hidden size).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loki.log import schema
from loki.log.reader import AttributionLog
from loki.prompts.mmlu import SUBJECTS
from loki.reporting.statistics import NO_SUBJECT, SubjectProfile, SubjectTally
from loki.rows import RowSelection
from loki.selection.strategies import Election, winners
from loki.selection.threads import read_ahead
from loki.selection.votes import Ballot, Direction, Scope, Score, VoteCounter, Votes

EXTREME_PERCENT = 5
"""Share of the model's rows that figure 2 of the paper shows as highest and lowest."""
_SUBJECT = re.compile(rf"(?:.+:)?(?:mmlu_(?:dev|validation|test)_)?({'|'.join(SUBJECTS)})[-/_]\S*\d")


@dataclass(frozen=True)
class Rivals:
    """What votes by either score would have selected, as many rows as the selection shown has."""

    scope: Scope
    """Whether rows competed in their layer, as in a selection with equal numbers, or in the whole model."""
    signed: RowSelection
    magnitude: RowSelection


@dataclass(frozen=True)
class LogSurvey:
    """What the report shows of a log."""

    num_prompts: int
    high: Votes
    """For the 5 % of the model's rows with the highest attribution of a prompt."""
    low: Votes
    high_magnitude: Votes
    """The same by |attribution|."""
    low_magnitude: Votes
    rivals: Rivals | None = None
    subject_names: tuple[str, ...] = ()
    """Subjects of `subjects`, as MMLU names them."""
    subjects: SubjectProfile | None = None
    votes_again: Votes | None = None
    """Of the election that was asked for beside these."""

    @property
    def mean_scores_LD(self) -> np.ndarray:  # noqa: N802
        """Mean attribution of each row (L, D), float64."""
        return self.high.mean_scores_LD

    @property
    def mean_magnitudes_LD(self) -> np.ndarray:  # noqa: N802
        """Mean |attribution| of each row (L, D), float64."""
        return self.high_magnitude.mean_scores_LD


def survey_log(
    log: AttributionLog, selection: RowSelection | None = None, election: Election | None = None
) -> LogSurvey:
    """Read a log once; the votes of `election`, which is not of random rows, are counted beside the rest.

    Raises:
        ArtefactError: the log holds NaN or infinity, or is damaged; the selection is of another shape.
    """
    kinds: list[tuple[Score, Direction]] = [
        (score, direction) for score in ("signed", "magnitude") for direction in ("highest", "lowest")
    ]
    count = max(1, log.num_layers * log.num_rows * EXTREME_PERCENT // 100)
    ballots = [Ballot("model", direction, count, score) for score, direction in kinds]
    if selection is not None:
        selection.require_fit(num_layers=log.num_layers, num_rows=log.num_rows)
        scope, quota = _size(selection)
        ballots += [Ballot(scope, "lowest", quota, score) for score in ("signed", "magnitude")]
    counter, again = VoteCounter(ballots), None
    if election is not None:
        assert election.ballot is not None, "random rows are not elected"
        again = VoteCounter([election.ballot], election.candidates_LD)
    names, subject_N = _subjects(log)
    tally = SubjectTally(subject_N, len(names)) if subject_N is not None else None
    for scores_NLD in read_ahead(log.chunks()):
        for accumulator in (counter, again, tally):
            if accumulator is not None:
                accumulator.add(scores_NLD)
    high, low, high_magnitude, low_magnitude, *of_rivals = counter.result()
    rivals = None
    if selection is not None:
        chosen = [
            _only_used_layers(winners(vote, ballot), selection, scope)
            for vote, ballot in zip(of_rivals, ballots[4:], strict=True)
        ]
        rivals = Rivals(scope, *chosen)
    return LogSurvey(
        log.num_prompts,
        high,
        low,
        high_magnitude,
        low_magnitude,
        rivals=rivals,
        subject_names=names,
        subjects=tally.result() if tally else None,
        votes_again=again.result()[0] if again else None,
    )


def subjects_of(prompt_ids: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray] | None:
    """The MMLU subjects that prompt ids carry, and which of them each prompt has (N,), or `NO_SUBJECT`.

    Known are the ids of the built-in probe (`anatomy-3`), those that MMLU questions get (`mmlu_test_anatomy_7`) and
    those that begin with the subject (`anatomy/test/7`), each perhaps after the name of its source and a colon. None
    where fewer than two subjects are found.
    """
    found = [match[1] if (match := _SUBJECT.fullmatch(prompt_id)) else None for prompt_id in prompt_ids]
    names = tuple(sorted({name for name in found if name is not None}))
    if len(names) < 2:
        return None
    places = {name: index for index, name in enumerate(names)}
    return names, np.array([NO_SUBJECT if name is None else places[name] for name in found])


def _subjects(log: AttributionLog) -> tuple[tuple[str, ...], np.ndarray | None]:
    if log.header is None or log.column(schema.PROMPT_IDS) is None:
        return (), None
    return subjects_of(log.prompts()[1]) or ((), None)


def _size(selection: RowSelection) -> tuple[Scope, int]:
    """How many rows compete for in which scope: layers that have rows at all have equally many, or all layers do."""
    counts = {len(rows) for rows in selection.rows if rows}
    return ("layer", counts.pop()) if len(counts) == 1 else ("model", selection.num_selected)


def _only_used_layers(rows: list[list[int]], selection: RowSelection, scope: Scope) -> RowSelection:
    if scope == "layer":
        rows = [own if theirs else [] for own, theirs in zip(rows, selection.rows, strict=True)]
    return RowSelection.from_lists(rows)
