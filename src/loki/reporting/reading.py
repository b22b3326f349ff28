"""From an attribution log and positions files to what the report shows of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loki.errors import ArtefactError, InputError
from loki.log.reader import AttributionLog
from loki.reporting.data import NamedSelection, ReportData
from loki.reporting.survey import LogSurvey, survey_log
from loki.reporting.wording import KVA, Wording, wording_of
from loki.rows import RowSelection, load_meta
from loki.selection.candidates import candidate_rows
from loki.selection.stability import Stability, stability
from loki.selection.strategies import Election, Selection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """What a log and positions say."""

    survey: LogSurvey
    selections: tuple[NamedSelection, ...]
    stability: Stability | None
    header: Mapping[str, Any]
    """The log's own account of what made it; empty for a log of the public implementation."""


def read_log(log_path: Path, positions: Sequence[Path], *, with_stability: bool = True) -> Reading:
    """Survey a log once, and bootstrap the first of the positions where their provenance tells how they were chosen.

    Raises:
        ArtefactError: a file that is damaged or of another model, or a log with NaN or infinity.
    """
    with AttributionLog(log_path) as log:
        wording = KVA if log.header is None else wording_of(_score(log.header.settings))
        selections = tuple(_named(path, wording) for path in positions)
        for selection, path in zip(selections, positions, strict=True):
            selection.rows.require_fit(num_layers=log.num_layers, num_rows=log.num_rows, what=f"positions file {path}")
        shown = selections[0].rows if selections else None
        election = _election(log, positions[0], tell=with_stability) if selections else None
        survey = survey_log(log, shown, election)
        found = None
        if with_stability and election is not None and shown is not None:
            if election.winners(survey.votes_again) == shown:
                found = stability(log, Selection(election, shown, survey.votes_again))
            else:
                logger.info(
                    "%s: its provenance makes other rows of this log, so its stability is left out", positions[0]
                )
        return Reading(survey, selections, found, log.header.as_dict() if log.header else {})


def report_of_log(log_path: Path, positions: Sequence[Path], *, with_stability: bool = True) -> ReportData:
    """What a report shows of a log alone.

    Raises:
        ArtefactError: as `read_log`.
    """
    reading = read_log(log_path, positions, with_stability=with_stability)
    model = str(reading.header.get("model_name", ""))
    return ReportData(
        title=reading.survey.wording.title.format(model=model.split(" (")[0] or "the model"),
        model_label=model,
        survey=reading.survey,
        selections=reading.selections,
        stability=reading.stability,
        provenance={f"{reading.survey.wording.noun} log": {"file": log_path.name, **reading.header}},
    )


def _named(path: Path, shown: Wording) -> NamedSelection:
    """A selection with its name; its score is told unless it and that of the log shown are attribution."""
    meta = load_meta(path) or {}
    strategy, quota = meta.get("strategy"), meta.get("quota_percent")
    how = f"{strategy}, {quota}\u00a0%" if strategy and quota else ""
    log = meta.get("log")
    settings = log.get("settings") if isinstance(log, Mapping) else None
    wording = wording_of(_score(settings)) if isinstance(settings, Mapping) else KVA
    if how and strategy != "random" and {wording, shown} != {KVA}:
        how += f", by {wording.noun}"
    return NamedSelection(path.name, RowSelection.load(path), how)


def _score(settings: Mapping[str, Any]) -> str:
    """The score that a log's settings name; attribution has no name there."""
    return str(settings.get("score", "kva"))


def _election(log: AttributionLog, path: Path, *, tell: bool) -> Election | None:
    """How the rows of a file were elected; None where its provenance does not tell, or they were drawn at random.

    `tell` says in the log of the program that there will be no stability.
    """
    meta = load_meta(path) or {}
    try:
        candidates_LD = candidate_rows(
            log.num_layers,
            log.num_rows,
            layers=None if meta.get("layers") is None else str(meta["layers"]),
            exclude=[RowSelection.load(excluded) for excluded in meta.get("excluded", ())],
        )
        election = Election.of(meta["strategy"], meta["quota_percent"], candidates_LD)
    except (KeyError, TypeError, InputError, ArtefactError) as error:
        if tell:
            logger.info("%s: its provenance does not tell how it was selected (%s); stability is left out", path, error)
        return None
    return election if election.ballot is not None else None
