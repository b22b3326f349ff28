"""Uninstalling a skill: an adapter's rows of a merged model become the base's again, bit for bit.

All else stays as it is in the merged model, bit for bit: the rows of other adapters too. Tensor by tensor, in blocks,
with the rows of one layer in memory: see `loki.implanting.checkpoint`.

Legend: D rows, F columns, K selected rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from loki.architecture import shape_of_config
from loki.choices import ModuleName
from loki.errors import ArtefactError, InputError
from loki.implanting.checkpoint import (
    Checkpoint,
    NewTensor,
    StoredTensor,
    copy_companions,
    find_folder,
    open_checkpoint,
    rewrite,
    unchanged,
)
from loki.implanting.merge import find_changed, load_row_changes
from loki.implanting.restore import ROUNDINGS
from loki.implanting.stored_rows import Replace, StoredProjection, find_projections, replace_rows
from loki.models import load_config
from loki.progress import Track, silent
from loki.provenance import new_directory, require_new_directory
from loki.rows import RowSelection, module_of

PRODUCT_ROUNDINGS = 8
"""Float32 roundings that A·B may be off by where it was summed in another order."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UninstallReport:
    """What uninstalling did."""

    num_parameters: int
    """Elements of the checkpoint."""
    num_rows: int
    """Rows that are the base's now."""
    num_changed: int
    """Elements that were not the base's before."""
    num_absent: int
    """Rows that were the base's already, though the adapter changes them; without an adapter, all that were."""
    num_altered: int | None
    """Rows that were neither the base's nor what merging the adapter makes of them; None without an adapter."""


@dataclass(frozen=True)
class _Part:
    """The rows of one tensor in the model and in its base, and what was added to them."""

    installed: StoredTensor
    base: StoredTensor
    rows: tuple[int, ...]
    """K, ascending."""
    is_transposed: bool = False
    delta: Callable[[], torch.Tensor] | None = None
    """(K, F) float32; None where it is not known."""
    is_product: bool = False
    """Whether the change is A·B."""

    def base_rows(self) -> torch.Tensor:
        """(K, F) in the model's dtype.

        Raises:
            ArtefactError: NaN or infinity.
        """
        rows_KF = _read_rows(self.base, self.rows, is_transposed=self.is_transposed).to(self.installed.dtype)
        if not rows_KF.isfinite().all():
            raise ArtefactError(
                f"{self.base.name} of {self.base.path} has rows that are not finite as {self.installed.dtype_name}, "
                "the model's dtype: give --base the model that it was made from"
            )
        return rows_KF

    def compare(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Which rows (K,) are the base's, which are what merging makes of them, and how many elements are not the
        base's.
        """
        installed_KF = _read_rows(self.installed, self.rows, is_transposed=self.is_transposed)
        differs_KF = installed_KF != self.base_rows()
        is_base_K = ~differs_KF.any(dim=1)
        is_merged_K = torch.zeros_like(is_base_K)
        if self.delta is not None:
            before_KF = _read_rows(self.base, self.rows, is_transposed=self.is_transposed)
            delta_KF = self.delta()
            for merged_KF in _merged(before_KF, delta_KF, installed_KF.dtype):
                is_merged_K |= self._is_same(installed_KF, merged_KF, before_KF, delta_KF).all(dim=1)
                if is_merged_K.all():
                    break
        return is_base_K, is_merged_K, int(differs_KF.sum())

    def _is_same(
        self, found_KF: torch.Tensor, merged_KF: torch.Tensor, before_KF: torch.Tensor, delta_KF: torch.Tensor
    ) -> torch.Tensor:
        if not self.is_product:
            return found_KF == merged_KF
        sizes_KF = before_KF.abs() + delta_KF.abs()
        bound_KF = PRODUCT_ROUNDINGS * torch.finfo(torch.float32).eps * sizes_KF
        bound_KF += torch.finfo(found_KF.dtype).eps * merged_KF.abs()
        return (found_KF - merged_KF).abs() <= bound_KF


def uninstall(
    source: Path,
    model: str,
    base: str,
    output: Path,
    *,
    module: ModuleName | None = None,
    strict: bool = False,
    track: Track = silent,
) -> UninstallReport:
    """Write `model` to `output` with the rows of an adapter as they are in `base`, in the model's dtype.

    `source` is the adapter's folder, or a positions file: its rows of the projections that its provenance says, else
    of `module`, else of the down-projections, with their biases. Of an adapter, biases are put back where it changed
    them. Rows that are not the base's plus the adapter's change go back too, with a warning; they are refused if
    `strict`.

    Raises:
        InputError: a model cannot be found, holds no safetensors, or `module` is given with an adapter or with
            positions of another.
        ArchitectureError: positions for a family that is not known.
        ArtefactError: not a LoKI adapter, or one that does not fit; positions, model and base that do not belong
            together; nothing is written then.
        OutputError: `output` cannot be written.
    """
    require_new_directory(output)
    installed, original = _open_ordinary(model, "--model"), _open_ordinary(base, "--base")
    kinds = [checkpoint.config().get("model_type") for checkpoint in (installed, original)]
    if kinds[0] != kinds[1]:
        raise ArtefactError(
            f"model {model!r} is of type {kinds[0]!r}, base {base!r} of type {kinds[1]!r}: "
            "give --base the model that it was made from"
        )
    if not source.is_dir():
        modules = _parts_of_positions(source, installed, original, module_of(source, module))
    elif module is None:
        modules = _parts_of_adapter(source, installed, original, model, base)
    else:
        raise InputError(f"--site-module {module} is for positions files: adapter {source} says whose rows it changes")
    uninstalling = _Uninstalling()
    for parts in modules:
        uninstalling.add(parts)
    uninstalling.tell(source, model, strict=strict)
    with new_directory(output) as directory:
        copy_companions(installed.folder, directory)
        rewrite(installed, directory, uninstalling.write, track=track)
    return uninstalling.report()


def _open_ordinary(model: str, option: str) -> Checkpoint:
    found = open_checkpoint(find_folder(model))
    if "target_pos" in found.config():
        raise ArtefactError(
            f"model {model!r} is a LoKI model: give {option} an ordinary one, such as restore-model writes"
        )
    return found


def _parts_of_adapter(
    adapter: Path, installed: Checkpoint, original: Checkpoint, model: str, base: str
) -> Iterator[list[_Part]]:
    """The tensors of each module that an adapter changes."""
    changes = load_row_changes(
        adapter, remedy="it has no rows of its own to put back; merge the other adapters into the base instead"
    )
    for name, change in changes.items():
        remedies = ("give --model a model that it was merged into", "give --base the model it was trained on")
        ours = find_changed(name, change, installed, adapter, model, remedy=remedies[0])
        theirs = find_changed(name, change, original, adapter, base, remedy=remedies[1])
        is_product = change.scale is not None
        parts = [_Part(ours.weight, theirs.weight, change.rows, ours.is_transposed, change.delta, is_product)]
        if change.has_bias and ours.bias is not None and theirs.bias is not None:
            parts.append(_Part(ours.bias, theirs.bias, change.rows, delta=change.bias))
        yield parts


def _parts_of_positions(
    path: Path, installed: Checkpoint, original: Checkpoint, module: ModuleName
) -> Iterator[list[_Part]]:
    """The tensors of each layer with rows in a positions file."""
    if not path.exists():
        raise InputError(f"{str(path)!r} does not exist: name an adapter folder, or a positions file")
    positions = RowSelection.load(path)
    shape = shape_of_config(load_config(str(original.folder)))
    positions.require_fit(num_layers=shape.num_layers, num_rows=shape.num_rows, what=f"positions file {path}")
    ours, theirs = (
        find_projections(checkpoint.tensors, shape.model_type, shape.num_layers, checkpoint.folder, module)
        for checkpoint in (installed, original)
    )
    for rows, mine, its in zip(positions.rows, ours, theirs, strict=True):
        if rows:
            _require_same_shape(mine, its)
            parts = [_Part(mine.weight, its.weight, rows, mine.is_transposed)]
            if mine.bias is not None and its.bias is not None:
                parts.append(_Part(mine.bias, its.bias, rows))
            yield parts


def _require_same_shape(mine: StoredProjection, its: StoredProjection) -> None:
    for ours, theirs in ((mine.weight, its.weight), (mine.bias, its.bias)):
        shapes = [None if stored is None else list(stored.shape) for stored in (ours, theirs)]
        if shapes[0] != shapes[1]:
            name = (ours or theirs or mine.weight).name
            raise ArtefactError(
                f"{name} is {shapes[0] or 'not there'} in the model, {shapes[1] or 'not there'} in the base: "
                "give --base the model that it was made from"
            )


class _Uninstalling:
    """Which rows are put back, how they were found, and what has been written so far."""

    def __init__(self) -> None:
        self.parts: dict[str, _Part] = {}
        self.num_parameters = 0
        self.num_rows = 0
        self.num_changed = 0
        self.num_absent = 0
        self.num_altered: int | None = None
        self.altered: str = ""
        """One row of them, by name."""

    def add(self, parts: list[_Part]) -> None:
        """Note that the rows of a module are to be put back, and compare them with the base's.

        Raises:
            ArtefactError: a tensor is named twice, or stored in a dtype that cannot be changed, or the base's rows
                are not finite.
        """
        rows, is_known = parts[0].rows, parts[0].delta is not None
        is_base_K, is_merged_K = torch.ones(len(rows), dtype=torch.bool), torch.ones(len(rows), dtype=torch.bool)
        for part in parts:
            part.installed.require_float()
            part.base.require_float()
            if part.installed.name in self.parts:
                raise ArtefactError(f"{part.installed.name} is named twice: name its rows once, or train again")
            is_base, is_merged, num_changed = part.compare()
            is_base_K &= is_base
            is_merged_K &= is_merged
            self.num_changed += num_changed
            self.parts[part.installed.name] = part
        self.num_rows += len(rows)
        self.num_absent += int((is_base_K & ~is_merged_K).sum())
        if is_known:
            altered = (~is_base_K & ~is_merged_K).nonzero().flatten().tolist()
            self.num_altered = (self.num_altered or 0) + len(altered)
            if altered and not self.altered:
                self.altered = f"row {rows[altered[0]]} of {parts[0].installed.name}"

    def tell(self, source: Path, model: str, *, strict: bool) -> None:
        """Warn of rows that are not the base's plus the change.

        Raises:
            ArtefactError: there are any, and `strict`.
        """
        messages = []
        if self.num_absent == self.num_rows:
            messages.append(f"nothing of {source} is installed in {model}: its rows are the base's already")
        elif self.num_absent:
            messages.append(
                f"{self.num_absent:,} of {self.num_rows:,} rows of {source} are the base's in {model} already"
            )
        if self.num_altered:
            messages.append(
                f"{self.num_altered:,} of {self.num_rows:,} rows of {source} are not the base's plus its change in "
                f"{model} ({self.altered}, for one): what else changed them goes too"
            )
        if strict and messages:
            raise ArtefactError(
                f"{'; '.join(messages)}: give adapter, model and base that belong together, or leave out --strict"
            )
        for message in messages:
            logger.warning(message)

    def write(self, stored: StoredTensor) -> list[NewTensor]:
        """What is written in a tensor's place."""
        self.num_parameters += stored.num_elements
        part = self.parts.get(stored.name)
        if part is None:
            return [unchanged(stored)]

        def prepare() -> Replace:
            rows_KF = part.base_rows()
            return lambda _, rows, columns: rows_KF[rows, columns]

        return [replace_rows(stored, part.rows, prepare, is_transposed=part.is_transposed)]

    def report(self) -> UninstallReport:
        """What uninstalling did."""
        return UninstallReport(self.num_parameters, self.num_rows, self.num_changed, self.num_absent, self.num_altered)


def _read_rows(stored: StoredTensor, rows: tuple[int, ...], *, is_transposed: bool) -> torch.Tensor:
    """(K, F), of a bias (K, 1)."""
    index_K = torch.tensor(rows)
    if is_transposed:
        return torch.cat([block[:, index_K] for _, block in stored.blocks()]).T
    pieces = []
    for first, block in stored.blocks():
        start, stop = torch.searchsorted(index_K, torch.tensor([first, first + len(block)])).tolist()
        pieces.append(block[index_K[start:stop] - first])
    return torch.cat(pieces).reshape(len(rows), -1)


def _merged(before_KF: torch.Tensor, delta_KF: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """What merging may have made of rows: rounded once, before the change too, or through a dtype on the way."""
    for start_KF in (before_KF, before_KF.to(dtype)):
        after_KF = start_KF.to(torch.promote_types(start_KF.dtype, torch.float32)) + delta_KF
        for rounding in ROUNDINGS:
            yield (after_KF if rounding is None else after_KF.to(rounding)).to(dtype)
