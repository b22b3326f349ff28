"""From an attribution log to a positions file with its provenance."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from loki.architecture import Shape
from loki.choices import StrategyName
from loki.errors import ArtefactError
from loki.log.reader import AttributionLog
from loki.provenance import compare_models, fingerprint_model
from loki.rows import load_meta
from loki.selection.quota import format_quota, parse_quota
from loki.selection.strategies import Selection, select

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


def default_positions_name(strategy: StrategyName, quota: str | float | Fraction) -> str:
    """`10.json` for the layer-balanced strategy, `global_lowest_30.json` for others.

    Raises:
        InputError: not a quota.
    """
    text = format_quota(parse_quota(quota))
    return f"{text}.json" if strategy == "layer_balanced" else f"{strategy}_{text}.json"


def default_positions_dir(log_path: Path) -> Path:
    """`kva_result/pos_json/<model>`, named after the model in the log's header.

    A log of the public implementation has no header: there the model is the folder that holds the log.

    Raises:
        ArtefactError: the log cannot be read.
    """
    with AttributionLog(log_path) as log:
        name = log.header.model_name if log.header else ""
    # A folder's or Hub id's last part, without a remark in brackets; a header may say anything.
    folder = Path(name.split(" (")[0]).name
    return Path("kva_result/pos_json") / (log_path.resolve().parent.name if folder in ("", "..") else folder)


def select_to_file(
    log_path: Path,
    output: Path,
    *,
    quota: str | float | Fraction,
    strategy: StrategyName = "layer_balanced",
    shape: Shape | None = None,
) -> Selection:
    """Select rows from a log and write them to `output`, with provenance in `<name>.meta.json`.

    With `shape`, the log must be of a model of this shape.

    Raises:
        InputError: as `select`.
        ArtefactError: as `select`, or the log is of another model.
        OutputError: the folder cannot be written.
    """
    with AttributionLog(log_path) as log:
        if shape is not None:
            require_shape(log, shape)
        selection = select(log, quota, strategy)
        header = log.header.as_dict() if log.header else None
    selection.rows.save(
        output,
        meta={
            "strategy": strategy,
            "quota_percent": format_quota(parse_quota(quota)),
            "votes_per_prompt": selection.ballot.count,
            "num_prompts": selection.votes.num_prompts,
            "num_abstentions": selection.votes.num_abstentions,
            "log": header,
        },
    )
    return selection


def require_shape(log: AttributionLog, shape: Shape) -> None:
    """Make sure that a log is of a model of this shape.

    Raises:
        ArtefactError: another architecture, or other numbers of layers or rows.
    """
    found = log.header.model.get("architecture") if log.header else None
    if found not in (None, str(shape)) or (log.num_layers, log.num_rows) != (shape.num_layers, shape.num_rows):
        raise ArtefactError(
            f"attribution log {log.path} is of a {found or 'model'} with {log.num_layers} layers of "
            f"{log.num_rows} rows, not of this {shape} model: analyse this model"
        )


def check_model(positions_path: Path, model: nn.Module, *, strict: bool) -> None:
    """Compare the model that positions were selected for, where that is known, with the one at hand.

    Other weights of the same architecture are worth a warning in the log.

    Raises:
        ArtefactError: another architecture, or any difference when `strict`.
    """
    meta = load_meta(positions_path)
    header = meta.get("log") if meta else None
    if header is not None:
        warning = compare_models(
            header["model"], fingerprint_model(model), what=f"positions file {positions_path}", strict=strict
        )
        if warning:
            logger.warning(warning)
