"""LokiConfig: which rows of which linear layers are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from loki.errors import InputError
from loki.implanting.tuner.peft_type import LOKI
from loki.rows import RowSelection


@dataclass
class LokiConfig(PeftConfig):
    """Configuration of Low-damage Knowledge Implanting (LoKI, arXiv 2505.22120, section 3.3).

    Only the rows named in `positions` are trained, as a float32 change that starts at zero; everything else
    is frozen. `positions` may be given as

    - the path of a positions file (JSON, one list of rows for each layer),
    - a list of L lists, one for each layer, or a `RowSelection`: rows of the layers' down-projections,
    - a mapping from module name to rows, as in `{"lin0": [0, 3, 7]}`: rows of any linear layers.

    It is kept as lists, so that an adapter never depends on a file elsewhere.

    Raises:
        ArtefactError: positions that are not lists of distinct row indices.
        InputError: positions of another type.
    """

    positions: Any = field(
        default=None,
        metadata={"help": "Rows to train: path, list of lists, RowSelection or {module name: rows}."},
    )
    target_modules: set[str] | list[str] | None = field(
        default=None,
        metadata={"help": "Set from `positions`; leave it out."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Further modules to train and save whole, such as a new classifier head."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start from a zero change, the unmodified model. False: a random change, for tests."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LOKI
        self.positions = _plain(self.positions)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


def _plain(positions: Any) -> list[list[int]] | dict[str, list[int]] | None:
    """Positions as sorted lists, whatever form they came in."""
    if positions is None:
        return None
    if isinstance(positions, str | Path):
        return RowSelection.load(positions).as_lists()
    if isinstance(positions, RowSelection):
        return positions.as_lists()
    if isinstance(positions, Mapping):
        rows = RowSelection.from_lists(list(positions.values())).as_lists()
        return dict(zip(positions, rows, strict=True))
    if isinstance(positions, list | tuple):
        return RowSelection.from_lists(positions).as_lists()
    raise InputError(
        f"positions of type {type(positions).__name__} are not possible: "
        "give a path, a list of lists, a RowSelection or a mapping from module name to rows"
    )
