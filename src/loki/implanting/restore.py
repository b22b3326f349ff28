"""Putting the rows of a trained LoKI model back: an ordinary checkpoint like its base.

Tensor by tensor, in blocks: see `loki.implanting.checkpoint`.

Legend: D rows, F columns, K selected rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loki.architecture import family_of
from loki.choices import DtypeName
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
from loki.implanting.convert import chosen_dtype, fitting_projections, others
from loki.implanting.stored_rows import Replace, StoredProjection, replace_rows
from loki.models import load_config
from loki.progress import Track, silent
from loki.provenance import new_directory, require_new_directory, write_json
from loki.rows import RowSelection

ROUNDINGS = (None, torch.bfloat16, torch.float16)
"""Dtypes that a LoKI model's values may have gone through since they left the base."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RestoreReport:
    """What putting rows back did."""

    num_parameters: int
    """Elements of the checkpoint."""
    num_changed: int
    """Elements of selected rows that differ from the base."""
    num_other_tensors: int
    """Tensors besides the projections that differ from the base, and were taken from the LoKI model."""


def restore_loki_model(
    target_pos_path: str | Path,
    model_path: str | Path,
    model_name: str,
    output_path: str | Path,
    torch_dtype: torch.dtype | DtypeName = "auto",
    *,
    track: Track = silent,
) -> RestoreReport:
    """Write a trained LoKI model to `output_path` as an ordinary checkpoint: names, dtypes and shards of its base.

    Rows that were not selected are the base's own, bit for bit. So are the other tensors, except those that were
    trained too: they are taken from the LoKI model, with a warning. Configuration and tokenizer are the base's.
    `torch_dtype` stores floating-point tensors in another dtype; `auto` keeps the base's, where the public
    implementation stores bfloat16.

    Raises:
        InputError: base or LoKI model cannot be found.
        ArtefactError: a tensor is missing, unknown or damaged, or base, positions and LoKI model do not belong
            together; nothing is written then.
        OutputError: `output_path` cannot be written.
    """
    directory = Path(output_path)
    require_new_directory(directory)
    positions = RowSelection.load(target_pos_path)
    base, split = open_checkpoint(find_folder(str(model_name))), open_checkpoint(find_folder(str(model_path)))
    _require_same_positions(split, positions, target_pos_path)
    typed_config = load_config(str(base.folder))
    projections = fitting_projections(base, typed_config, positions, target_pos_path)
    dtype = chosen_dtype(torch_dtype)
    restoring = _Restoring(base, split, typed_config, dtype)
    for layer, projection in projections.items():
        restoring.add(projection, positions.rows[layer])
    restoring.require_all_known()
    with new_directory(directory) as temporary:
        copy_companions(base.folder, temporary)
        if dtype is not None:
            write_json(temporary / "config.json", with_dtype(base.config(), dtype))
        rewrite(base, temporary, restoring.write, track=track)
    return restoring.report()


class _Restoring:
    """Where each tensor of the base finds its values in the LoKI model, and what has been written so far."""

    def __init__(self, base: Checkpoint, split: Checkpoint, typed_config: Any, dtype: torch.dtype | None) -> None:
        self.base, self.split, self.dtype = base, split, dtype
        self.base_tensors, self.split_tensors = base.tensors, split.tensors
        # Some checkpoints leave out the first part of the names in the model, and transformers puts it back.
        self.prefix = family_of(typed_config.model_type).layers.split(".")[0] + "."
        self.is_tied = bool(getattr(typed_config.get_text_config(), "tie_word_embeddings", False))
        self.writers: dict[str, Callable[[StoredTensor], NewTensor]] = {}
        self.used: set[str] = set()
        self.num_parameters = 0
        self.num_changed = 0
        self.others: list[str] = []

    def add(self, projection: StoredProjection, rows: tuple[int, ...]) -> None:
        """Note that a projection's rows come from the parts in the LoKI model, after all checks.

        Raises:
            ArtefactError: a part is missing, of another shape, or of another base.
        """
        module = projection.weight.name.removesuffix(".weight")
        if self._find(projection.weight.name) is not None:
            raise ArtefactError(
                f"model {self.split.folder} has {projection.weight.name} in one piece: its rows were never split; "
                "name the folder that was trained"
            )
        frozen = others(rows, projection.num_rows)
        index_map = self._part(f"{module}.index_map", (projection.num_rows,)).read()
        if not torch.equal(index_map, torch.tensor([*rows, *frozen]).argsort()):
            raise ArtefactError(
                f"{module} of model {self.split.folder} was split at other rows than the positions name: "
                "give the positions that it was made with"
            )
        columns = (projection.num_columns,)
        self._add(
            projection.weight,
            rows,
            self._part(f"{module}.active.weight", (len(rows), *columns)),
            self._part(f"{module}.frozen.weight", (len(frozen), *columns)),
            is_transposed=projection.is_transposed,
        )
        if projection.bias is not None:
            active = self._part(f"{module}.active_bias", (len(rows),))
            self._add(projection.bias, rows, active, self._part(f"{module}.frozen_bias", (len(frozen),)))

    def require_all_known(self) -> None:
        """Make sure that every tensor has its counterpart.

        Raises:
            ArtefactError: it has none.
        """
        for name, stored in self.base_tensors.items():
            if name in self.writers:
                continue
            counterpart = self._counterpart(name)
            if counterpart is None:
                raise self._missing(name)
            if counterpart.shape != stored.shape:
                raise ArtefactError(
                    f"{counterpart.name} of model {self.split.folder} is {list(counterpart.shape)}, "
                    f"of the base {list(stored.shape)}: give the base that it was made from"
                )
            self.used.add(counterpart.name)
        for name in self.split_tensors:
            if name not in self.used and not (self.is_tied and name == "lm_head.weight"):
                raise self._unknown(name)

    def write(self, stored: StoredTensor) -> list[NewTensor]:
        """What is written in a tensor's place."""
        self.num_parameters += stored.num_elements
        if stored.name in self.writers:
            return [self.writers[stored.name](stored)]
        counterpart = self._counterpart(stored.name)
        assert counterpart is not None
        if _is_same(stored, counterpart):
            return [unchanged(stored, self.dtype)]
        self.others.append(stored.name)
        trained = unchanged(counterpart, self.dtype or stored.dtype)
        return [NewTensor(stored.name, trained.dtype_name, trained.shape, trained.num_bytes, trained.blocks)]

    def report(self) -> RestoreReport:
        """What putting rows back did."""
        if self.others:
            logger.warning(
                "%d tensors besides the selected rows differ from the base, %s for one: taken from %s",
                len(self.others),
                self.others[0],
                self.split.folder,
            )
        return RestoreReport(self.num_parameters, self.num_changed, len(self.others))

    def _add(
        self,
        stored: StoredTensor,
        rows: tuple[int, ...],
        active: StoredTensor,
        frozen: StoredTensor,
        *,
        is_transposed: bool = False,
    ) -> None:
        rounding = self._require_base(stored, rows, frozen, is_transposed=is_transposed)

        def prepare() -> Replace:
            return lambda before_KF, chosen, columns: self._replaced(
                stored, active, rounding, before_KF, chosen, columns
            )

        self.writers[stored.name] = lambda weight: replace_rows(
            weight, rows, prepare, is_transposed=is_transposed, dtype=self.dtype
        )

    def _replaced(
        self,
        stored: StoredTensor,
        active: StoredTensor,
        rounding: torch.dtype | None,
        before_KF: torch.Tensor,
        chosen: slice,
        columns: slice,
    ) -> torch.Tensor:
        trained_KF = active.read(chosen.start, chosen.stop).reshape(len(before_KF), -1)[:, columns]
        if not trained_KF.isfinite().all():
            raise ArtefactError(f"{active.name} of model {self.split.folder} has NaN or infinity: train again")
        # What training did not move keeps the base's value, which may be finer than the LoKI model's.
        is_moved_KF = _rounded(before_KF, rounding, trained_KF.dtype) != trained_KF
        dtype = self.dtype or stored.dtype
        after_KF = torch.where(is_moved_KF, trained_KF.to(dtype), before_KF.to(dtype))
        self.num_changed += int((after_KF != before_KF.to(dtype)).sum())
        return after_KF

    def _require_base(
        self, stored: StoredTensor, rows: tuple[int, ...], frozen: StoredTensor, *, is_transposed: bool
    ) -> torch.dtype | None:
        """The rounding between the base's frozen rows and the LoKI model's."""
        frozen.require_float()
        index = torch.tensor(others(rows, stored.shape[1 if is_transposed else 0]), dtype=torch.int64)
        for rounding in ROUNDINGS:
            if _frozen_is_same(stored, frozen, index, rounding, is_transposed=is_transposed):
                return rounding
        raise ArtefactError(
            f"{frozen.name} of model {self.split.folder} differs from the base {self.base.folder}: "
            "give the base that it was made from"
        )

    def _counterpart(self, name: str) -> StoredTensor | None:
        """The LoKI model's tensor of this name; for a head that is tied and not stored, the embedding."""
        found = self._find(name)
        if found is None and self.is_tied and name == "lm_head.weight":
            embeddings = [
                other for other in self.split_tensors if other.endswith((".embed_tokens.weight", "wte.weight"))
            ]
            return self.split_tensors[embeddings[0]] if len(embeddings) == 1 else None
        return found

    def _find(self, name: str) -> StoredTensor | None:
        for other in (name, self.prefix + name, name.removeprefix(self.prefix)):
            if other in self.split_tensors:
                return self.split_tensors[other]
        return None

    def _part(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        found = self._find(name)
        if found is None:
            raise self._missing(name)
        if found.shape != shape:
            raise ArtefactError(
                f"{found.name} of model {self.split.folder} is {list(found.shape)}, where base and positions "
                f"make it {list(shape)}: give those that it was made with"
            )
        self.used.add(found.name)
        return found

    def _missing(self, name: str) -> ArtefactError:
        for other in self.split_tensors:
            if "lora_" in other or ".base_layer." in other:
                return self._unknown(other)
        return ArtefactError(
            f"model {self.split.folder} has no tensor {name}: "
            "name a whole LoKI model, and the base that it was made from"
        )

    def _unknown(self, name: str) -> ArtefactError:
        remedy = "give the base that it was made from"
        if "lora_" in name or ".base_layer." in name:
            remedy = "merge its adapter first, with PEFT's merge_and_unload"
        return ArtefactError(f"model {self.split.folder} has the unknown tensor {name}: {remedy}")


def _require_same_positions(split: Checkpoint, positions: RowSelection, path: str | Path) -> None:
    stored = split.config().get("target_pos")
    if stored is None:
        raise ArtefactError(f"model {split.folder} is no LoKI model: its config.json has no target_pos")
    what = f"target_pos of model {split.folder}"
    if RowSelection.from_lists(stored, what=what) != positions:
        raise ArtefactError(f"{what} and positions file {path} differ: give the positions that it was made with")


def _rounded(values: torch.Tensor, rounding: torch.dtype | None, dtype: torch.dtype) -> torch.Tensor:
    return (values if rounding is None else values.to(rounding)).to(dtype)


def _frozen_is_same(
    stored: StoredTensor,
    frozen: StoredTensor,
    index: torch.Tensor,
    rounding: torch.dtype | None,
    *,
    is_transposed: bool,
) -> bool:
    if is_transposed:
        return torch.equal(_rounded(stored.read()[:, index].T, rounding, frozen.dtype), frozen.read())
    for first, block in stored.blocks():
        start, stop = torch.searchsorted(index, torch.tensor([first, first + len(block)])).tolist()
        rows = _rounded(block[index[start:stop] - first], rounding, frozen.dtype)
        if not torch.equal(rows, frozen.read(start, stop)):
            return False
    return True


def _is_same(stored: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same values, but for rounding on the way."""
    if stored.dtype_name == other.dtype_name and all(
        mine == theirs for mine, theirs in zip(stored.raw(), other.raw(), strict=True)
    ):
        return True
    if not stored.is_float or not other.is_float:
        return False
    return any(
        all(
            torch.equal(
                _rounded(block, rounding, other.dtype),
                other.read(first, first + len(block)) if stored.shape else other.read(),
            )
            for first, block in stored.blocks()
        )
        for rounding in ROUNDINGS
    )
