"""Sections on subjects: which layers serve which, and the rows most specific to one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loki.reporting import maps
from loki.reporting.content import Explorer, Section, Table
from loki.reporting.numbers import format_number, plural
from loki.reporting.statistics import SubjectProfile
from loki.reporting.wording import Wording
from loki.rows import RowSelection

MAX_SPECIFIC = 12


def layers_section(profile: SubjectProfile, names: Sequence[str], order_S: np.ndarray, wording: Wording) -> Section:
    """The map of subjects by layers, subjects in the given order."""
    relative_SL = profile.relative_SL
    far = np.abs(np.log(np.maximum(relative_SL, 1e-12)))
    subject, layer = (int(i) for i in np.unravel_index(far.argmax(), far.shape))
    flat = int((relative_SL.max(axis=0) / np.maximum(relative_SL.min(axis=0), 1e-12)).argmin())
    result = (
        f"The largest departure is {_subject(names[subject])} in layer {layer}: {relative_SL[subject, layer]:.2g} "
        f"times the layer’s mean over subjects. Layer {flat} differs least between subjects."
    )
    reading = (
        f"Each cell is the mean {wording.subject_measure} over a layer’s rows and a subject’s {wording.entries}, "
        "relative to the layer’s mean over all subjects: orange is more, purple less. Subjects stand in an order that "
        "puts those with like profiles side by side (their first principal component). Whole bands of one colour often "
        "follow the form of the questions, such as their length, more than their topic."
    )
    picture = maps.subject_map(relative_SL[order_S], [names[s] for s in order_S], title="Subjects by layer")
    return Section(
        "subjects",
        "Which layers serve which subjects" if wording.argues else f"How {wording.noun} differs between subjects",
        result,
        reading,
        {"subjects": picture},
        Explorer("subjects"),
    )


def rows_section(
    profile: SubjectProfile, names: Sequence[str], selection: RowSelection | None, wording: Wording
) -> Section:
    """The table of rows, and how many stand out against chance."""
    entries = wording.entries
    result = (
        f"{format_number(profile.num_above)} of {format_number(profile.num_pairs)} pairs of a row and a subject have a "
        f"z-score above {profile.threshold:.1f}, the highest that arises when subjects are shuffled among the "
        f"{wording.entries}."
    )
    shown = profile.best[:MAX_SPECIFIC]
    headings: tuple[str, ...] = ("Subject", "Layer", "Row", "Times the rest", "z-score")
    rows = [
        (
            _subject(names[best.subject]),
            str(best.layer),
            str(best.row),
            f"{best.ratio:.1f}" if np.isfinite(best.ratio) else "∞",
            f"{best.z_score:.1f}",
            "yes" if selection is not None and best.row in selection.rows[best.layer] else "no",
        )
        for best in shown
    ]
    if selection is not None:
        headings += ("Selected",)
    caption = (
        f"The most specific row of each subject, {len(shown)} of {plural(len(profile.best), 'subject')} that have one "
        "above the threshold"
    )
    reading = (
        f"The z-score says how far a row’s mean {wording.subject_measure} over a subject’s {entries} lies from its "
        f"mean over all {entries}, in standard deviations of the mean of as many {entries} drawn at random. “Times the "
        f"rest” compares it with the mean over all other {entries}. So many pairs are looked at that some stand out by "
        "chance: the threshold is what the largest of them reaches when the subjects mean nothing."
    )
    table = Table(caption, headings, tuple(row[: len(headings)] for row in rows)) if rows else None
    return Section("specific", "Rows most specific to a subject", result, reading, table=table)


def _subject(name: str) -> str:
    return name.replace("_", " ")
