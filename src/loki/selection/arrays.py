"""Selection from an array of scores in memory, under the names of the paper's public implementation.

For logs that do not fit in memory, for other strategies and for provenance there is `loki.selection.run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from loki.choices import StrategyName
from loki.errors import InputError
from loki.log.reader import AttributionLog
from loki.rows import RowSelection
from loki.selection.strategies import Election
from loki.selection.votes import count_votes


def load_attributions_from_hdf5(hdf5_path: str | Path) -> np.ndarray:
    """All scores of an attribution log, (N, L, D) float32.

    Raises:
        ArtefactError: missing, damaged, or with scores that are not finite.
    """
    with AttributionLog(hdf5_path) as log:
        scores_NLD = np.empty((log.num_prompts, log.num_layers, log.num_rows), dtype=np.float32)
        start = 0
        for chunk_NLD in log.chunks():
            scores_NLD[start : start + len(chunk_NLD)] = chunk_NLD
            start += len(chunk_NLD)
        return scores_NLD


def select_trainable_nodes_layer_balanced(
    attribution_scores: np.ndarray, quota: str | float | Fraction
) -> list[list[int]]:
    """The lowest rows of every layer, in equal number: L sorted lists of ⌊quota/100 · D⌋ rows each.

    Scores (N, L, D) of any floating dtype; quota in percent.

    Raises:
        InputError: scores of another form or not finite, or a quota outside (0, 100] or too small for one row.
    """
    return _select(attribution_scores, quota, "layer_balanced")


def select_trainable_nodes_global_lowest(
    attribution_scores: np.ndarray, quota: str | float | Fraction
) -> list[list[int]]:
    """The lowest rows of the whole model: L sorted lists of ⌊quota/100 · L·D⌋ rows in all, otherwise as above."""
    return _select(attribution_scores, quota, "global_lowest")


def select_trainable_nodes_global_highest(
    attribution_scores: np.ndarray, quota: str | float | Fraction
) -> list[list[int]]:
    """The highest rows of the whole model, otherwise as above."""
    return _select(attribution_scores, quota, "global_highest")


def save_positions_to_json(
    positions: Sequence[Sequence[int]], output_path: str | Path, create_dirs: bool = True
) -> None:
    """Write positions as a JSON list of L lists; `create_dirs` makes missing folders.

    Raises:
        ArtefactError: not lists of distinct row indices, or no row at all.
        InputError: the folder is missing and `create_dirs` is False.
        OutputError: the file cannot be written.
    """
    folder = Path(output_path).parent
    if not create_dirs and not folder.is_dir():
        raise InputError(f"folder {folder} does not exist: make it, or set create_dirs=True")
    RowSelection.from_lists(positions).save(output_path)


def _select(attribution_scores: np.ndarray, quota: str | float | Fraction, strategy: StrategyName) -> list[list[int]]:
    scores_NLD = np.asarray(attribution_scores)
    is_number = scores_NLD.dtype.kind in "fiu"
    if not is_number or scores_NLD.ndim != 3 or 0 in scores_NLD.shape or not np.isfinite(scores_NLD).all():
        raise InputError(
            f"attribution scores of shape {scores_NLD.shape} and type {scores_NLD.dtype} are not possible: "
            "give finite numbers of shape (prompts, layers, rows), at least one of each"
        )
    election = Election.of(strategy, quota, np.ones(scores_NLD.shape[1:], dtype=bool))
    ballot = election.ballot
    assert ballot is not None
    return election.winners(count_votes([scores_NLD], [ballot])[0]).as_lists()
