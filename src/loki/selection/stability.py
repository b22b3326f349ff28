"""How stable a selection is: the bootstrap over prompts.

Shapes: n prompts of a piece, B resamples, L layers, D rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loki.errors import InputError
from loki.log.reader import AttributionLog
from loki.rows import RowSelection
from loki.selection.strategies import Election, Selection
from loki.selection.threads import in_threads, read_ahead
from loki.selection.votes import MODEL_PROMPTS, Ballot, Votes, mark_votes, score_of

RESAMPLES = 100


@dataclass(frozen=True)
class Stability:
    """How often resamples of the prompts choose each row."""

    shares_LD: np.ndarray  # noqa: N815
    """Share of the resamples that choose each row, (L, D) float32 in [0, 1]."""
    mean: float
    """Mean share over the selected rows, in [0, 1]: how much of the selection other prompts of the same kind would
    choose again. Rows drawn at random would score the quota."""
    num_resamples: int


def stability(log: AttributionLog, selection: Selection, *, resamples: int = RESAMPLES, seed: int = 0) -> Stability:
    """Elect the same number of rows again from `resamples` draws of N of the N prompts with replacement.

    Votes and the mean attributions that break ties are those of the resample; the adaptive strategy's numbers of
    rows are decided anew in each. Memory grows with B·L·D, and by 4·B bytes a prompt.

    Raises:
        InputError: rows drawn at random, or a number of resamples below 2.
        ArtefactError: the log holds NaN or infinity, or is damaged.
    """
    election = selection.election
    ballot = require_ballot(election)
    if resamples < 2:
        raise InputError(f"{resamples} resamples are too few: give at least 2")
    weights_NB = _weights(log.num_prompts, resamples, seed)
    counts_BLD = np.zeros((resamples, log.num_layers, log.num_rows), dtype=np.float32)
    # In float32, sums of equal numbers may differ by a rounding from row to row, which would break ties.
    totals_BLD = np.zeros(counts_BLD.shape)
    start = 0
    for scores_NLD in read_ahead(log.chunks()):
        weights_BN = np.ascontiguousarray(weights_NB[start : start + len(scores_NLD)].T)
        exact_weights_BN = weights_BN.astype(np.float64)
        marks_NLD = _marks(scores_NLD, election)
        for layer in range(log.num_layers):
            # Sums of whole numbers below 2²⁴ are exact in float32.
            counts_BLD[:, layer] += weights_BN @ marks_NLD[:, layer].astype(np.float32)
            totals_BLD[:, layer] += exact_weights_BN @ score_of(scores_NLD[:, layer], ballot.score)
        start += len(scores_NLD)

    def elected(resample: int) -> RowSelection:
        means_LD = totals_BLD[resample] / log.num_prompts
        return election.winners(Votes(counts_BLD[resample].astype(np.int64), means_LD, log.num_prompts, 0))

    times_LD = np.zeros((log.num_layers, log.num_rows), dtype=np.int64)
    for rows in in_threads(elected, range(resamples)):
        times_LD += rows.as_mask(log.num_rows)
    mean = float(times_LD[selection.rows.as_mask(log.num_rows)].mean() / resamples)
    return Stability((times_LD / resamples).astype(np.float32), mean, resamples)


def require_ballot(election: Election) -> Ballot:
    """The ballot of an election in which prompts have a say.

    Raises:
        InputError: its rows are drawn at random.
    """
    ballot = election.ballot
    if ballot is None:
        raise InputError(f"strategy {election.strategy!r} draws rows without a log: its stability says nothing")
    return ballot


def _weights(num_prompts: int, resamples: int, seed: int) -> np.ndarray:
    """How often each resample draws each prompt, (N, B) float32."""
    generator = np.random.default_rng(seed)
    weights_BN = generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=resamples)
    return weights_BN.T.astype(np.float32)


def _marks(scores_NLD: np.ndarray, election: Election) -> np.ndarray:
    """The votes (n, L, D) bool of an election."""
    ballot, candidates_LD = election.ballot, election.candidates_LD
    assert ballot is not None
    marks_NLD = np.zeros(scores_NLD.shape, dtype=bool)

    def mark_layer(layer: int) -> None:
        (marks_NLD[:, layer],) = mark_votes(scores_NLD[:, layer], [ballot], candidates_LD[layer])

    def mark_prompts(start: int) -> None:
        part = slice(start, start + MODEL_PROMPTS)
        flat_NC = scores_NLD[part].reshape(-1, candidates_LD.size)
        (marks_NC,) = mark_votes(flat_NC, [ballot], candidates_LD.reshape(-1))
        marks_NLD[part] = marks_NC.reshape(-1, *candidates_LD.shape)

    if ballot.scope == "layer":
        in_threads(mark_layer, np.flatnonzero(candidates_LD.any(axis=1)).tolist())
    else:
        in_threads(mark_prompts, range(0, len(scores_NLD), MODEL_PROMPTS))
    return marks_NLD
