"""A LoKI adapter as an ordinary LoRA adapter, which needs nothing of this package.

LoKI* changes rows S by s·A·B (A: K × R, B: R × F). LoRA changes the weight by s·lora_B·lora_A (D × R and R × F):
lora_A is B, and lora_B is A with its rows put in their places among zeros. Rows that were trained themselves are
a LoRA adapter too, of rank K: lora_A is Δ, and lora_B says which row is which. Both are exact.

Legend: D rows, F columns, K selected rows, R rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loki.errors import ArtefactError, InputError
from loki.implanting.checkpoint import Checkpoint, find_folder, open_checkpoint
from loki.implanting.merge import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DELTA,
    FACTOR_A,
    FACTOR_B,
    RowChange,
    find_changed,
    load_row_changes,
)
from loki.implanting.stored_rows import StoredProjection
from loki.provenance import new_directory, read_json, require_new_directory


@dataclass(frozen=True)
class LoraExport:
    """What the LoRA adapter is like."""

    rank: int
    """The largest of its modules' ranks."""
    num_modules: int
    """Modules that it changes."""
    num_parameters: int
    """Elements of its factors."""
    num_bytes: int
    """Size of its weights on disk."""


def export_lora(adapter: Path, output: Path, *, model: str | None = None) -> LoraExport:
    """Write a LoKI adapter to `output` as a LoRA adapter of the same base, in float32.

    `model` is the base; the one that the adapter names when left out. Only its shapes are read.

    Raises:
        InputError: no base is known, or it cannot be found.
        ArtefactError: not a LoKI adapter, one that does not fit the base, or one that changes more than weights.
        OutputError: `output` cannot be written.
    """
    require_new_directory(output)
    changes = load_row_changes(adapter)
    config: dict[str, Any] = read_json(adapter / ADAPTER_CONFIG, what="adapter")
    base = model or config.get("base_model_name_or_path")
    if not base:
        raise InputError(f"adapter {adapter} does not say which model it was trained on: name it with --model")
    source = open_checkpoint(find_folder(base))
    projections = {name: _projection(name, change, source, adapter, base) for name, change in changes.items()}
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name, change in changes.items():
        lora_a_RF, lora_b_DR = _factors(change, projections[name].num_rows)
        if not (lora_a_RF.isfinite().all() and lora_b_DR.isfinite().all()):
            raise ArtefactError(f"adapter {adapter}: the change of {name} has NaN or infinity: train again")
        tensors[f"{change.prefix}.lora_A.weight"] = lora_a_RF
        tensors[f"{change.prefix}.lora_B.weight"] = lora_b_DR
        ranks[name] = len(lora_a_RF)
    scale = next(iter(changes.values())).scale or 1.0
    with new_directory(output) as directory:
        lora_config = _lora_config(
            ranks,
            scale,
            targets=_targets(list(changes), source),
            is_transposed=any(projection.is_transposed for projection in projections.values()),
            task_type=config.get("task_type"),
            base=base,
        )
        lora_config.save_pretrained(directory)
        save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (directory / ADAPTER_WEIGHTS).chmod(0o644)  # safetensors makes files that only their owner may read
        num_bytes = (directory / ADAPTER_WEIGHTS).stat().st_size
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    return LoraExport(max(ranks.values()), len(ranks), num_parameters, num_bytes)


def _projection(name: str, change: RowChange, source: Checkpoint, adapter: Path, base: str) -> StoredProjection:
    projection = find_changed(name, change, source, adapter, base)
    if change.has_bias:
        raise ArtefactError(
            f"adapter {adapter} changes biases of {name}, which a LoRA adapter cannot: merge it with `loki merge`"
        )
    return projection


def _factors(change: RowChange, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A (R, F) and lora_B (D, R), float32."""
    rows = torch.tensor(change.rows)
    with safe_open(change.weights, framework="pt") as file:
        if change.scale is None:
            lora_a_RF = file.get_tensor(f"{change.prefix}.{DELTA}").float()
            rows_KR = torch.eye(len(rows))
        else:
            lora_a_RF = file.get_tensor(f"{change.prefix}.{FACTOR_B}").float()
            rows_KR = file.get_tensor(f"{change.prefix}.{FACTOR_A}").float()
    lora_b_DR = torch.zeros(num_rows, rows_KR.shape[1]).index_copy(0, rows, rows_KR)
    return lora_a_RF, lora_b_DR


def _lora_config(
    ranks: Mapping[str, int], scale: float, *, targets: list[str], is_transposed: bool, task_type: str | None, base: str
) -> Any:
    from peft import LoraConfig

    rank, _ = Counter(ranks.values()).most_common(1)[0]
    others = {name: other for name, other in ranks.items() if other != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=_alpha(scale, rank),
        rank_pattern=others,
        alpha_pattern={name: _alpha(scale, other) for name, other in others.items()},
        target_modules=targets,
        fan_in_fan_out=is_transposed,
        task_type=task_type,
        base_model_name_or_path=base,
        inference_mode=True,
    )


def _alpha(scale: float, rank: int) -> int | float:
    """lora_alpha: an integer where it is one, as other programs expect."""
    alpha = scale * rank
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha


def _targets(names: list[str], source: Checkpoint) -> list[str]:
    """The shortest common end of the modules' names that means no other module, or their names in full."""
    for num_parts in (1, 2):
        ends = {".".join(name.split(".")[-num_parts:]) for name in names}
        meant = [
            tensor
            for tensor in source.tensors
            if any(tensor == f"{end}.weight" or tensor.endswith(f".{end}.weight") for end in ends)
        ]
        if len(meant) == len(names):
            return sorted(ends)
    return sorted(names)
