"""Suppressing rows: a checkpoint whose selected rows are zero, as in the paper's test of what they hold (S-H, S-L)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from loki.architecture import BLOCKS, shape_of_config
from loki.choices import ModuleName
from loki.errors import ArtefactError
from loki.implanting.checkpoint import (
    NewTensor,
    StoredTensor,
    copy_companions,
    find_folder,
    open_checkpoint,
    rewrite,
    unchanged,
)
from loki.implanting.stored_rows import Replace, find_projections, replace_rows
from loki.models import load_config
from loki.progress import Track, silent
from loki.provenance import new_directory, require_new_directory
from loki.rows import RowSelection


@dataclass(frozen=True)
class SuppressReport:
    """What suppressing did."""

    num_parameters: int
    """Elements of the checkpoint."""
    num_suppressed_rows: int
    """Rows set to zero."""
    num_changed: int
    """Elements that were not zero before."""


def suppress(
    model: str,
    positions_path: Path,
    output: Path,
    *,
    module: ModuleName = "down_proj",
    trust_remote_code: bool = False,
    track: Track = silent,
) -> SuppressReport:
    """Write the model to `output` with the selected rows at zero, and all else bit-identical.

    A row's element of the bias, where there is one, is zero too: the output node is then zero whatever its input
    (a norm that follows may still give it a bias of its own). `module` says whose rows the positions name.

    Raises:
        InputError: the model cannot be found, or holds no safetensors.
        ArchitectureError: a family that is not known, or a mixture of experts.
        ArtefactError: positions that do not fit the model; nothing is written then.
        OutputError: `output` cannot be written.
    """
    require_new_directory(output)
    positions = RowSelection.load(positions_path)
    source = open_checkpoint(find_folder(model))
    if "target_pos" in source.config():
        raise ArtefactError(f"model {model!r} is a LoKI model: name an ordinary one, such as restore-model writes")
    shape = shape_of_config(load_config(model, trust_remote_code=trust_remote_code))
    what = f"positions file {positions_path} (for the {BLOCKS[module]})"
    positions.require_fit(num_layers=shape.num_layers, num_rows=shape.num_rows, what=what)
    writers: dict[str, Callable[[StoredTensor], NewTensor]] = {}
    counter = _Counter()
    found = find_projections(source.tensors, shape.model_type, shape.num_layers, source.folder, module)
    for projection, rows in zip(found, positions.rows, strict=True):
        if not rows:
            continue
        if projection.num_rows != shape.num_rows:
            raise ArtefactError(
                f"{projection.weight.name} of model {model!r} has {projection.num_rows} rows, its config says "
                f"{shape.num_rows}: fetch the model again"
            )
        for stored in (projection.weight, projection.bias):
            if stored is not None:
                stored.require_float()
                is_transposed = projection.is_transposed and stored is projection.weight
                writers[stored.name] = counter.zeroed(rows, is_transposed=is_transposed)

    def write(stored: StoredTensor) -> list[NewTensor]:
        counter.num_parameters += stored.num_elements
        return [writers[stored.name](stored) if stored.name in writers else unchanged(stored)]

    with new_directory(output) as directory:
        copy_companions(source.folder, directory)
        rewrite(source, directory, write, track=track)
    return SuppressReport(counter.num_parameters, positions.num_selected, counter.num_changed)


class _Counter:
    """Writes zeros, and counts what they replace."""

    def __init__(self) -> None:
        self.num_parameters = 0
        self.num_changed = 0

    def zeroed(self, rows: tuple[int, ...], *, is_transposed: bool) -> Callable[[StoredTensor], NewTensor]:
        """How a tensor is written whose `rows` become zero."""
        return lambda stored: replace_rows(stored, rows, self._prepare, is_transposed=is_transposed)

    def _prepare(self) -> Replace:
        return self._zeros

    def _zeros(self, before_KF: torch.Tensor, _rows: slice, _columns: slice) -> torch.Tensor:
        self.num_changed += int((before_KF != 0).sum())
        return torch.zeros_like(before_KF)
