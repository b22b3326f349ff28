"""Merging LoKI adapters into an ordinary checkpoint, block by block.

The base's own files are read and written again: original tensor names, dtypes and shards; rows that were not
selected stay bit-identical. One block of one tensor is in memory, and the change of one layer. Adapters of disjoint
rows leave each other's rows alone: merged together, or one after the other in any order, they give the same bits.

Legend: D rows, F columns, K selected rows, R rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loki.errors import ArtefactError
from loki.implanting.checkpoint import (
    Checkpoint,
    NewTensor,
    StoredTensor,
    copy_companions,
    find_folder,
    open_checkpoint,
    rewrite,
    unchanged,
    with_dtype,
)
from loki.implanting.stored_rows import Replace, StoredProjection, find_projection, layer_number, replace_rows
from loki.progress import Track, silent
from loki.provenance import new_directory, read_json, require_new_directory, write_json
from loki.rows import RowSelection, named_for

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DELTA, FACTOR_A, FACTOR_B, BIAS = "loki_delta", "loki_A", "loki_B", "loki_bias"
"""Tensors of an adapter: change of rows (K, F), or its factors (K, R) and (R, F); change of the rows' biases (K,)."""


@dataclass(frozen=True)
class RowChange:
    """The change of one module's selected rows, on disk."""

    weights: Path
    prefix: str
    """What the names of its tensors begin with."""
    rows: tuple[int, ...]
    """K, ascending."""
    num_columns: int
    """F."""
    scale: float | None
    """Factor of the product of the factors; None where the change itself is stored."""
    has_bias: bool

    def delta(self) -> torch.Tensor:
        """(K, F) float32."""
        if self.scale is None:
            return self._read(DELTA)
        return self.scale * (self._read(FACTOR_A) @ self._read(FACTOR_B))

    def bias(self) -> torch.Tensor:
        """(K, 1) float32."""
        return self._read(BIAS)[:, None]

    def _read(self, part: str) -> torch.Tensor:
        with safe_open(self.weights, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(f"{self.prefix}.{part}")
        return tensor.float()


@dataclass(frozen=True)
class MergeReport:
    """What merging did."""

    num_parameters: int
    """Elements of the checkpoint."""
    num_changed: int
    """Elements that differ from the base afterwards."""
    change_norm: float
    """‖Δ‖ over all selected rows."""
    lost_percent: float
    """‖(merged − base) − Δ‖ in percent of ‖Δ‖: what rounding to the checkpoint's dtype took away."""


def load_row_changes(adapter: Path, *, remedy: str = "merge it with PEFT's merge_and_unload") -> dict[str, RowChange]:
    """Changes of a saved LoKI adapter by module name, without loading a model, nor the weights.

    Raises:
        ArtefactError: not a LoKI adapter, or one of more than rows (`remedy` is what to do then), or its weights and
            positions disagree.
    """
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise ArtefactError(f"{adapter} has no {ADAPTER_CONFIG}: name the folder that `loki train` wrote")
    config = read_json(adapter / ADAPTER_CONFIG, what="adapter")
    if not isinstance(config, dict) or config.get("peft_type") != "LOKI":
        found = config.get("peft_type") if isinstance(config, dict) else None
        raise ArtefactError(f"adapter {adapter} is of type {found!r}, not 'LOKI': {remedy}")
    if config.get("modules_to_save"):
        raise ArtefactError(f"adapter {adapter} has modules_to_save: {remedy}")
    weights = adapter / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ArtefactError(f"adapter {adapter} has no {ADAPTER_WEIGHTS}: train again")
    try:
        with safe_open(weights, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no dict)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"adapter weights {weights} are damaged: train again") from error
    parts: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in shapes.items():
        prefix, _, part = name.rpartition(".")
        parts[prefix][part] = shape
    prefixes = {prefix.removeprefix("base_model.model."): prefix for prefix in parts}
    if not parts or any(set(found) - {BIAS} not in ({DELTA}, {FACTOR_A, FACTOR_B}) for found in parts.values()):
        raise ArtefactError(f"adapter {adapter} holds tensors that are no row changes: {remedy}")
    rows_of = _rows_by_name(list(prefixes), config.get("positions"), adapter)
    return {
        name: _row_change(name, prefix, parts[prefix], rows_of[name], config, adapter)
        for name, prefix in prefixes.items()
    }


def _row_change(
    name: str,
    prefix: str,
    shapes: Mapping[str, tuple[int, ...]],
    rows: Sequence[int],
    config: Mapping[str, Any],
    adapter: Path,
) -> RowChange:
    scale = None
    num_rows, *columns = shapes[DELTA] if DELTA in shapes else (shapes[FACTOR_A][0], *shapes[FACTOR_B][1:])
    if DELTA not in shapes:
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise ArtefactError(f"adapter {adapter} has r={rank!r} and lora_alpha={alpha!r}: both must be numbers")
        if shapes[FACTOR_A][1:] != (rank,) or shapes[FACTOR_B][:1] != (rank,):
            raise ArtefactError(
                f"adapter {adapter}: factors {list(shapes[FACTOR_A])} and {list(shapes[FACTOR_B])} of {name} "
                f"do not have rank {rank}"
            )
        scale = alpha / rank
    if num_rows != len(rows):
        raise ArtefactError(f"adapter {adapter}: {name} has {num_rows} row changes for {len(rows)} positions")
    if BIAS in shapes and shapes[BIAS] != (num_rows,):
        found = math.prod(shapes[BIAS])
        raise ArtefactError(f"adapter {adapter}: the bias of {name} has {found} changes for {num_rows} positions")
    if len(columns) != 1:
        raise ArtefactError(f"adapter {adapter}: the change of {name} is no matrix")
    return RowChange(adapter / ADAPTER_WEIGHTS, prefix, tuple(rows), columns[0], scale, BIAS in shapes)


def _rows_by_name(names: Sequence[str], positions: Any, adapter: Path) -> dict[str, list[int]]:
    """Each module's rows: by its name, or by its layer for positions in a list."""
    if isinstance(positions, Mapping):
        named = dict(zip(positions, RowSelection.from_lists(list(positions.values())).as_lists(), strict=True))
        return {name: named.get(named_for(name, named) or "", []) for name in names}
    selection = RowSelection.from_lists(positions, what=f"positions of adapter {adapter}")
    layers: dict[str, set[int]] = defaultdict(set)
    rows: dict[str, list[int]] = {}
    for name in names:
        layer = layer_number(name)
        if layer is None:
            raise ArtefactError(f"adapter {adapter}: {name!r} does not say which layer it is in")
        rows[name] = list(selection.rows[layer]) if layer < selection.num_layers else []
        layers[name.replace(str(layer), "*")].add(layer)
    with_rows = {layer for layer, chosen in enumerate(selection.rows) if chosen}
    for found in layers.values():
        if found != with_rows:
            raise ArtefactError(
                f"adapter {adapter} has weights for {len(found)} layers, positions for {len(with_rows)}: train again"
            )
    return rows


def find_changed(
    module: str,
    change: RowChange,
    source: Checkpoint,
    adapter: Path,
    base: str,
    *,
    remedy: str = "give --model the model it was trained on",
) -> StoredProjection:
    """The tensors of a model that a module's change belongs to.

    Raises:
        ArtefactError: the base has none, or of another shape.
    """
    projection = find_projection(source.tensors, module, str(source.config().get("model_type")))
    if projection is None or (change.has_bias and projection.bias is None):
        missing = f"{module}.weight" if projection is None else f"{module}.bias"
        raise ArtefactError(f"adapter {adapter} changes {missing}, which model {base!r} does not have: {remedy}")
    if change.rows[-1] >= projection.num_rows or change.num_columns != projection.num_columns:
        raise ArtefactError(
            f"adapter {adapter} does not fit {projection.weight.name} "
            f"({projection.num_rows} × {projection.num_columns}) of model {base!r}: {remedy}"
        )
    return projection


def merge(
    base: str,
    adapters: Path | Sequence[Path],
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    track: Track = silent,
) -> MergeReport:
    """Write base + adapters to `output` as an ordinary checkpoint that `transformers` loads by itself.

    `dtype` stores floating-point tensors in another dtype than the base's (float32 loses nothing).

    Raises:
        InputError: the base cannot be found, or holds no safetensors.
        ArtefactError: an adapter does not fit the base, or two change the same rows; nothing is written then.
        OutputError: `output` cannot be written.
    """
    require_new_directory(output)
    source = open_checkpoint(find_folder(base))
    merging = _Merging(dtype)
    for adapter in [adapters] if isinstance(adapters, Path) else adapters:
        for module, change in load_row_changes(adapter).items():
            projection = find_changed(module, change, source, adapter, base)
            _require_finite(change, module, adapter)
            added = _TensorChange(adapter, change.rows, change.delta, projection.is_transposed)
            merging.add(projection.weight, added)
            if change.has_bias and projection.bias is not None:
                merging.add(projection.bias, _TensorChange(adapter, change.rows, change.bias))
    with new_directory(output) as directory:
        copy_companions(source.folder, directory)
        if dtype is not None:
            write_json(directory / "config.json", with_dtype(source.config(), dtype))
        rewrite(source, directory, merging.write, track=track)
    return merging.report()


def _require_finite(change: RowChange, module: str, adapter: Path) -> None:
    if not (change.delta().isfinite().all() and (not change.has_bias or change.bias().isfinite().all())):
        raise ArtefactError(
            f"adapter {adapter}: the change of {module} has NaN or infinity: train again with a lower rate"
        )


@dataclass(frozen=True)
class _TensorChange:
    """What an adapter adds to rows of one tensor."""

    adapter: Path
    rows: tuple[int, ...]
    """K, ascending."""
    load: Callable[[], torch.Tensor]
    """(K, F) float32."""
    is_transposed: bool = False


class _Merging:
    """The tensors to change, and what has been changed so far."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.changes: dict[str, list[_TensorChange]] = defaultdict(list)
        self.num_parameters = 0
        self.num_changed = 0
        self.change_squared = 0.0
        self.lost_squared = 0.0

    def add(self, stored: StoredTensor, change: _TensorChange) -> None:
        """Note that a tensor's rows are to be changed.

        Raises:
            ArtefactError: it is stored in a dtype that cannot be changed, or another adapter changes the same rows.
        """
        stored.require_float()
        for other in self.changes[stored.name]:
            if shared := set(change.rows) & set(other.rows):
                raise ArtefactError(
                    f"adapters {other.adapter} and {change.adapter} both change {len(shared)} rows of {stored.name}, "
                    f"{min(shared)} for one: train the second on rows that `loki select-nodes --exclude` selects"
                )
        self.changes[stored.name].append(change)

    def write(self, stored: StoredTensor) -> list[NewTensor]:
        """What is written in a tensor's place."""
        self.num_parameters += stored.num_elements
        if stored.name not in self.changes:
            return [unchanged(stored, self.dtype)]
        changes = self.changes[stored.name]
        found = [row for change in changes for row in change.rows]
        order_K = torch.tensor(found).argsort()

        def prepare() -> Replace:
            delta_KF = torch.cat([change.load() for change in changes])[order_K]
            return lambda before_KF, rows, columns: self._changed(stored, before_KF, delta_KF[rows, columns])

        return [
            replace_rows(stored, sorted(found), prepare, is_transposed=changes[0].is_transposed, dtype=self.dtype),
        ]

    def _changed(self, stored: StoredTensor, before_KF: torch.Tensor, delta_KF: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(before_KF.dtype, torch.float32)
        after_KF = (before_KF.to(wide) + delta_KF).to(self.dtype or stored.dtype)
        if not after_KF.isfinite().all():
            raise ArtefactError(
                f"{stored.name} does not fit into {str(after_KF.dtype).removeprefix('torch.')} with its change: "
                "merge with --dtype float32"
            )
        moved_KF = after_KF.to(wide) - before_KF.to(wide)
        self.num_changed += int((moved_KF != 0).sum())
        self.change_squared += float(delta_KF.double().square().sum())
        self.lost_squared += float((moved_KF.double() - delta_KF.double()).square().sum())
        return after_KF

    def report(self) -> MergeReport:
        """What merging did."""
        lost = (self.lost_squared / self.change_squared) ** 0.5 if self.change_squared else 0.0
        return MergeReport(self.num_parameters, self.num_changed, self.change_squared**0.5, 100 * lost)
