"""LokiConfig: which rows of which linear layers are trained, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from peft.config import PeftConfig

from loki.choices import ModuleName
from loki.errors import InputError
from loki.implanting.tuner.peft_type import LOKI
from loki.rows import RowSelection, module_of


@dataclass
class LokiConfig(PeftConfig):
    """Configuration of Low-damage Knowledge Implanting (LoKI, arXiv 2505.22120, section 3.3).

    Only the rows named in `positions` are trained, as a float32 change that starts at zero; everything else
    is frozen. `positions` may be given as

    - the path of a positions file (JSON, one list of rows for each layer) that `loki select-nodes` wrote; its
      provenance, where there is one, says whether they are rows of the down-projections or of `o_proj`,
    - a list of L lists, one for each layer, or a `RowSelection`: rows of the layers' down-projections, or with
      `target_modules="o_proj"` of their attention blocks' output projections,
    - a mapping from module name to rows, as in `{"lin0": [0, 3, 7]}`: rows of any linear layers.

    It is kept as lists, so that an adapter never depends on a file elsewhere.

    Raises:
        ArtefactError: positions that are not lists of distinct row indices.
        InputError: positions of another type, a positions file of another projection than `target_modules`, or
            other values that are not possible.
    """

    positions: Any = field(
        default=None,
        metadata={"help": "Rows to train: path, list of lists, RowSelection or {module name: rows}."},
    )
    r: int = field(
        default=0,
        metadata={"help": "0 trains the rows themselves; above 0 their change is A·B of this rank (LoKI*)."},
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "With r above 0 the change is (lora_alpha / r)·A·B; 2·r when left out."},
    )
    target_modules: set[str] | list[str] | str | None = field(
        default=None,
        metadata={"help": "For positions by layer: 'down_proj' (when left out) or 'o_proj'. Otherwise leave it out."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Further modules to train and save whole, such as a new classifier head."},
    )
    bias: Literal["none", "rows"] = field(
        default="none",
        metadata={"help": "'rows' trains the rows' biases too, in those layers that have a bias."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start from a zero change, the unmodified model. False: a random change, for tests."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Embeddings of these tokens to train too, as in PEFT's LoraConfig."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LOKI
        if isinstance(self.positions, str | Path):
            self._take_module(self.positions)
        self.positions = _plain(self.positions)
        if isinstance(self.target_modules, str):
            self.target_modules = {self.target_modules}
        elif isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 0:
            raise InputError(f"r {self.r!r} is not possible: give 0 to train the rows themselves, or a rank (1, 2, …)")
        if self.r == 0 and self.lora_alpha is not None:
            raise InputError(f"lora_alpha {self.lora_alpha!r} needs a rank: give r too, or leave lora_alpha out")
        if self.r > 0 and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if self.lora_alpha is not None and not (_is_number(self.lora_alpha) and self.lora_alpha > 0):
            raise InputError(f"lora_alpha {self.lora_alpha!r} is not possible: give a positive number")
        if self.bias not in ("none", "rows"):
            raise InputError(f"bias {self.bias!r} is not possible: give 'none' or 'rows'")

    def _take_module(self, path: str | Path) -> None:
        """The projection that a positions file names rows of, where it is not the down-projection."""
        targets = {self.target_modules} if isinstance(self.target_modules, str) else set(self.target_modules or ())
        given = next((module for module in get_args(ModuleName) if targets == {module}), None)
        if module_of(path, given) == "o_proj" and not targets:
            self.target_modules = {"o_proj"}

    @property
    def scaling(self) -> float:
        """What A·B is multiplied by; 1 for rows that are trained themselves."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.r


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
