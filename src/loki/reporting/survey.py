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
from loki.reporting.wording import KVA, Wording, wording_of
from loki.rows import RowSelection
from loki.selection.strategies import STRATEGIES, Election, winners
from loki.selection.threads import read_ahead
from loki.selection.votes import Ballot, Direction, Scope, Score, VoteCounter, Votes

EXTREME_PERCENT = 5
"""Share of the model's rows that figure 2 of the paper shows as highest and lowest."""
_SUBJECT = re.compile(rf"(?:.+:)?(?:mmlu_(?:dev|validation|test)_)?({'|'.join(SUBJECTS)})[-/_]\S*\d")


@dataclass(frozen=True)
class Rivals:
    """What votes on the signed score and on its magnitude would have selected: as many rows as the selection shown."""

    scope: Scope
    """Whether rows competed in their layer, for as many places as the selection shown has there, or in the model."""
    direction: Direction
    """Which end was taken."""
    signed: RowSelection
    magnitude: RowSelection


@dataclass(frozen=True)
class LogSurvey:
    """What the report shows of a log."""

    num_prompts: int
    high: Votes
    """For the 5 % of the model's rows with the highest score of a prompt."""
    low: Votes
    high_magnitude: Votes
    """The same by |score|."""
    low_magnitude: Votes
    rivals: Rivals | None = None
    subject_names: tuple[str, ...] = ()
    """Subjects of `subjects`, as MMLU names them."""
    subjects: SubjectProfile | None = None
    votes_again: Votes | None = None
    """Of the election that was asked for beside these."""
    wording: Wording = KVA
    """What the scores are called."""
    site_module: str = "down_proj"
    """Whose rows they are of."""

    @property
    def mean_scores_LD(self) -> np.ndarray:  # noqa: N802
        """Mean score of each row (L, D), float64."""
        return self.high.mean_scores_LD

    @property
    def mean_magnitudes_LD(self) -> np.ndarray:  # noqa: N802
        """Mean |score| of each row (L, D), float64."""
        return self.high_magnitude.mean_scores_LD

    @property
    def is_signed(self) -> bool:
        """Whether any score is negative: the two means of a row that has no such score are the same sum."""
        return not np.array_equal(self.mean_scores_LD, self.mean_magnitudes_LD)


def survey_log(
    log: AttributionLog, selection: RowSelection | None = None, election: Election | None = None
) -> LogSurvey:
    """Read a log once; the votes of `election`, which is not of random rows, are counted beside the rest.

    `election` also tells how the rows of `selection` were chosen.

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
        ballots += _rival_ballots(selection, election)
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
        scope, direction = ballots[-1].scope, ballots[-1].direction
        places_L = [len(rows) for rows in selection.rows] if scope == "layer" else None
        chosen = [
            RowSelection.from_lists(winners(vote, ballot, counts_L=places_L))
            for vote, ballot in zip(of_rivals, ballots[4:], strict=True)
        ]
        rivals = Rivals(scope, direction, *chosen)
    settings = log.header.settings if log.header is not None else {}
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
        wording=wording_of(str(settings.get("score", "kva"))),
        site_module=str(settings.get("site_module", "down_proj")),
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


def _rival_ballots(selection: RowSelection, election: Election | None) -> list[Ballot]:
    """On both scores, for as many rows as were selected, from the end that they were taken from.

    Rows compete in their layer where all layers that have rows have equally many, or where they are known to have
    done so, and otherwise in the whole model.
    """
    scope: Scope = "model"
    direction: Direction = "lowest"
    count = selection.num_selected
    if election is not None and election.ballot is not None:
        direction = election.ballot.direction
    places = {len(rows) for rows in selection.rows if rows}
    if len(places) == 1:
        scope, count = "layer", places.pop()
    elif election is not None and STRATEGIES[election.strategy].scope == "layer":
        scope, count = "layer", election.count
    return [Ballot(scope, direction, count, score) for score in ("signed", "magnitude")]
