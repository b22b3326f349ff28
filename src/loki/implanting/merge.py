"""Merging a LoKI adapter into an ordinary checkpoint, shard by shard.

The base's own files are read and written again: original tensor names, dtypes and shards; rows that were not
selected stay bit-identical. Only the shard at hand is in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from loki.errors import ArtefactError, InputError
from loki.models import locate_model
from loki.provenance import new_directory, read_json, require_new_directory
from loki.rows import RowSelection, named_for

ADAPTER_WEIGHTS = "adapter_model.safetensors"
CARRIED_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")
"""Copied along with the weights: configuration, tokenizer, chat template, licence; no code, no pickles."""


@dataclass(frozen=True)
class RowChange:
    """The change of one layer's selected rows."""

    rows: torch.Tensor
    """(K,) int64."""
    delta_KF: torch.Tensor  # noqa: N815
    """(K, F) float32."""


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


def load_row_changes(adapter: Path) -> dict[str, RowChange]:
    """Changes of a saved LoKI adapter by module name, without loading a model.

    Raises:
        ArtefactError: not a LoKI adapter, or its weights and positions disagree.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise ArtefactError(f"{adapter} has no adapter_config.json: name the folder that `loki train` wrote")
    config = read_json(adapter / "adapter_config.json", what="adapter")
    if not isinstance(config, dict) or config.get("peft_type") != "LOKI":
        found = config.get("peft_type") if isinstance(config, dict) else None
        raise ArtefactError(f"adapter {adapter} is of type {found!r}, not 'LOKI': merge it with PEFT")
    if config.get("modules_to_save"):
        raise ArtefactError(f"adapter {adapter} has modules_to_save: merge it with PEFT's merge_and_unload")
    weights_path = adapter / ADAPTER_WEIGHTS
    if not weights_path.is_file():
        raise ArtefactError(f"adapter {adapter} has no {ADAPTER_WEIGHTS}: train again")
    try:
        weights = load_file(weights_path)
    except Exception as error:  # safetensors raises its own and OSError for damaged files
        raise ArtefactError(f"adapter weights {weights_path} are damaged: train again") from error
    return {
        name: RowChange(torch.tensor(rows), delta)
        for name, rows, delta in _match(weights, config.get("positions"), adapter)
    }


def merge(base: str, adapter: Path, output: Path, *, dtype: torch.dtype | None = None) -> MergeReport:
    """Write base + adapter to `output` as an ordinary checkpoint that `transformers` loads by itself.

    `dtype` stores floating-point tensors in another dtype than the base's (float32 loses nothing).

    Raises:
        InputError: the base cannot be found, or holds no safetensors.
        ArtefactError: the adapter does not fit the base; nothing is written then.
        OutputError: `output` cannot be written.
    """
    require_new_directory(output)
    source = _local_folder(base)
    shards = _shards(source)
    changes = load_row_changes(adapter)
    _require_fit(source, shards, changes, adapter, base)
    totals = _Totals()
    with new_directory(output) as directory:
        for pattern in CARRIED_FILES:
            for file in source.glob(pattern):
                if file.is_file() and not file.name.startswith(("loki_", "adapter_")):
                    shutil.copyfile(file, directory / file.name)
        if dtype is not None:
            _set_config_dtype(directory / "config.json", dtype)
        for shard in sorted(set(shards.values())):
            _merge_shard(source / shard, directory / shard, changes, dtype, totals)
    return MergeReport(
        num_parameters=totals.num_parameters,
        num_changed=totals.num_changed,
        change_norm=totals.change_squared**0.5,
        lost_percent=100 * (totals.lost_squared / totals.change_squared) ** 0.5 if totals.change_squared else 0.0,
    )


@dataclass
class _Totals:
    num_parameters: int = 0
    num_changed: int = 0
    change_squared: float = 0.0
    lost_squared: float = 0.0


def _merge_shard(
    source: Path, target: Path, changes: Mapping[str, RowChange], dtype: torch.dtype | None, totals: _Totals
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(source, framework="pt") as shard:
        metadata = shard.metadata()
        for name in shard.keys():  # noqa: SIM118  (not a mapping)
            tensor = shard.get_tensor(name)
            totals.num_parameters += tensor.numel()
            stored = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            change = changes.get(name.removesuffix(".weight"))
            if change is not None and name.endswith(".weight"):
                before_KF = tensor[change.rows].float()
                after_KF = (before_KF + change.delta_KF.float()).to(stored.dtype)
                stored = stored.index_copy(0, change.rows, after_KF)
                moved_KF = after_KF.float() - before_KF
                totals.num_changed += int((moved_KF != 0).sum())
                totals.change_squared += float(change.delta_KF.double().square().sum())
                totals.lost_squared += float((moved_KF.double() - change.delta_KF.double()).square().sum())
            tensors[name] = stored.contiguous()
    save_file(tensors, target, metadata=metadata)
    target.chmod(0o644)  # safetensors makes files that only their owner may read


def _match(
    weights: Mapping[str, torch.Tensor], positions: Any, adapter: Path
) -> list[tuple[str, list[int], torch.Tensor]]:
    """Each weight with its rows: by module name, or by layer number for positions in a list."""
    deltas = {
        name.removeprefix("base_model.model.").removesuffix(".loki_delta"): delta
        for name, delta in weights.items()
        if name.endswith(".loki_delta")
    }
    if len(deltas) != len(weights) or not deltas:
        raise ArtefactError(f"adapter {adapter} holds tensors that are no row changes: merge it with PEFT")
    if isinstance(positions, Mapping):
        by_name = {name: positions.get(named_for(name, positions), []) for name in deltas}
    else:
        selection = RowSelection.from_lists(positions, what=f"positions of adapter {adapter}")
        by_name = {name: list(selection.rows[_layer_number(name, adapter)]) for name in deltas}
        with_rows = sum(1 for rows in selection.rows if rows)
        if len(deltas) != with_rows:
            raise ArtefactError(f"adapter {adapter} has weights for {len(deltas)} layers, positions for {with_rows}")
    matched = []
    for name, delta in deltas.items():
        rows = by_name.get(name, [])
        if len(rows) != len(delta):
            raise ArtefactError(f"adapter {adapter}: {name} has {len(delta)} row changes for {len(rows)} positions")
        matched.append((name, rows, delta))
    return matched


def _layer_number(module_name: str, adapter: Path) -> int:
    numbers = [int(part) for part in module_name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise ArtefactError(f"adapter {adapter}: {module_name!r} does not say which layer it is in")
    return numbers[0]


def _require_fit(
    source: Path, shards: Mapping[str, str], changes: Mapping[str, RowChange], adapter: Path, base: str
) -> None:
    for module, change in changes.items():
        name = f"{module}.weight"
        if name not in shards:
            raise ArtefactError(
                f"adapter {adapter} changes {name}, which model {base!r} does not have: "
                "merge it with the model it was trained on"
            )
        with safe_open(source / shards[name], framework="pt") as shard:
            num_rows, num_columns = shard.get_slice(name).get_shape()
        if int(change.rows.max()) >= num_rows or change.delta_KF.shape[1] != num_columns:
            raise ArtefactError(
                f"adapter {adapter} does not fit {name} ({num_rows} × {num_columns}) of model {base!r}: "
                "merge it with the model it was trained on"
            )


def _local_folder(base: str) -> Path:
    source = locate_model(base)
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", *CARRIED_FILES]))
    except Exception as error:  # the Hub's errors have no common class but this
        raise InputError(f"model {base!r} cannot be fetched: {str(error).splitlines()[0]}") from error


def _shards(source: Path) -> dict[str, str]:
    """Which file holds each tensor of a checkpoint.

    Raises:
        InputError: no safetensors in the folder.
        ArtefactError: a shard that the index names is missing, or lacks tensors.
    """
    index_path = source / "model.safetensors.index.json"
    if index_path.exists():
        index: dict[str, str] = read_json(index_path, what="shard index")["weight_map"]
    elif (source / "model.safetensors").exists():
        index = {}
    else:
        raise InputError(f"model folder {source} has no safetensors weights: save it with safe_serialization")
    files = set(index.values()) or {"model.safetensors"}
    found: dict[str, str] = {}
    for name in sorted(files):
        if Path(name).name != name or not (source / name).is_file():
            raise ArtefactError(f"shard {name!r} of model {source} is missing: fetch the model again")
        try:
            with safe_open(source / name, framework="pt") as shard:
                found.update(dict.fromkeys(shard.keys(), name))
        except SafetensorError as error:
            raise ArtefactError(f"shard {name!r} of model {source} is damaged: fetch the model again") from error
    if index and index != found:
        raise ArtefactError(f"shards of model {source} do not hold what their index says: fetch the model again")
    return found


def _set_config_dtype(config_path: Path, dtype: torch.dtype) -> None:
    config = read_json(config_path, what="model config")
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
