"""From an attribution log to a positions file with its provenance."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loki.architecture import Shape
from loki.choices import StrategyName
from loki.errors import ArtefactError, InputError
from loki.log.reader import AttributionLog
from loki.provenance import compare_models, fingerprint_model
from loki.rows import RowSelection, load_meta, meta_path
from loki.selection.candidates import candidate_rows
from loki.selection.quota import format_quota, parse_quota
from loki.selection.stability import Stability, require_ballot, stability
from loki.selection.strategies import STRATEGIES, Election, Selection, select_all

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


@dataclass(frozen=True)
class Request:
    """One positions file to be made."""

    output: Path
    quota: str | float | Fraction
    """In percent of the rows of each layer that is selected from, or of these layers together."""
    strategy: StrategyName = "layer_balanced"


@dataclass(frozen=True)
class Constraints:
    """What holds for all requests."""

    layers: str | None = None
    """Layers to select from, such as `8-29`; None: all."""
    exclude: Sequence[Path] = ()
    """Positions files whose rows are left alone."""
    seed: int = 0
    """Of the random strategy and of the bootstrap."""
    resamples: int = 0
    """Bootstrap resamples for the stability; 0: none."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"seed {self.seed} is not possible: give 0 or more")


@dataclass(frozen=True)
class Selected:
    """One positions file that was made."""

    request: Request
    selection: Selection
    stability: Stability | None


def select_to_file(
    log_path: Path,
    output: Path,
    *,
    quota: str | float | Fraction,
    strategy: StrategyName = "layer_balanced",
    shape: Shape | None = None,
) -> Selection:
    """Select rows from a log and write them to `output`, with provenance in `<name>.meta.json`.

    With `shape`, the log must be of a model of this shape. Raises as `select_to_files`.
    """
    (selected,) = select_to_files(log_path, [Request(output, quota, strategy)], shape=shape)
    return selected.selection


def select_to_files(
    log_path: Path | None,
    requests: Sequence[Request],
    constraints: Constraints | None = None,
    *,
    shape: Shape | None = None,
) -> list[Selected]:
    """Make several positions files in one pass over a log, each with provenance in `<name>.meta.json`.

    Rows drawn at random need no log: None will do if there is a `shape`. Nothing is written before all selections
    are made.

    Raises:
        InputError: as `Election.of` and `candidate_rows`; no log for a strategy that needs one; two requests for
            one file; a stability of rows drawn at random.
        ArtefactError: the log is damaged, holds NaN or infinity, or is of another model; excluded positions are
            of another shape.
        OutputError: a folder cannot be written.
    """
    constraints = constraints or Constraints()
    outputs = [request.output for request in requests]
    for output in outputs:
        if outputs.count(output) > 1:
            raise InputError(f"{output} is to be written twice: give each strategy and quota once")
    with ExitStack() as stack:
        log = None if log_path is None else stack.enter_context(AttributionLog(log_path))
        if log is not None and shape is not None:
            require_shape(log, shape)
        size = log or shape
        if size is None:
            raise InputError("neither log nor model is given: rows come from a log, random rows from a model's shape")
        candidates_LD = candidate_rows(
            size.num_layers,
            size.num_rows,
            layers=constraints.layers,
            exclude=[RowSelection.load(path) for path in constraints.exclude],
        )
        elections = [
            Election.of(request.strategy, request.quota, candidates_LD, seed=constraints.seed) for request in requests
        ]
        if constraints.resamples:
            if log is None:
                raise InputError("stability needs a log: it asks how much of a selection depends on its prompts")
            for election in elections:
                require_ballot(election)
        selections = select_all(log, elections)
        stabilities: list[Stability | None] = [None] * len(selections)
        if constraints.resamples and log is not None:
            stabilities = [
                stability(log, selection, resamples=constraints.resamples, seed=constraints.seed)
                for selection in selections
            ]
        header = log.header.as_dict() if log is not None and log.header else None
    made = [Selected(*parts) for parts in zip(requests, selections, stabilities, strict=True)]
    for selected in made:
        selected.selection.rows.save(selected.request.output, meta=_provenance(selected, constraints, header))
    return made


def _provenance(selected: Selected, constraints: Constraints, header: Mapping[str, Any] | None) -> dict[str, Any]:
    election, votes = selected.selection.election, selected.selection.votes
    strategy = STRATEGIES[election.strategy]
    meta: dict[str, Any] = {"strategy": election.strategy, "quota_percent": format_quota(election.quota)}
    if votes is None or selected.stability is not None:
        meta["seed"] = constraints.seed
    if strategy.votes_decide:
        # Which score the log holds stands in its header.
        meta |= {"votes_on": strategy.score, "votes_per_prompt": election.count}
    if votes is not None:
        meta["num_prompts"] = votes.num_prompts
        if strategy.votes_decide:
            meta["num_abstentions"] = votes.num_abstentions
    if constraints.layers is not None:
        meta["layers"] = constraints.layers
    if constraints.exclude:
        meta["excluded"] = [str(path) for path in constraints.exclude]
    if selected.stability is not None:
        meta["stability"] = selected.stability.mean
        meta["num_resamples"] = selected.stability.num_resamples
    meta["log"] = header
    return meta


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
        ArtefactError: another architecture, any difference when `strict`, or provenance that does not say which.
    """
    meta = load_meta(positions_path)
    header = meta.get("log") if meta else None
    if header is not None:
        made_with = header.get("model") if isinstance(header, dict) else None
        if not isinstance(made_with, dict):
            raise ArtefactError(
                f"positions provenance {meta_path(positions_path)} does not say for which model: "
                "select again, or remove it"
            )
        warning = compare_models(
            made_with, fingerprint_model(model), what=f"positions file {positions_path}", strict=strict
        )
        if warning:
            logger.warning(warning)
