"""Rows of output projections in a checkpoint: which tensor holds them, and how some of them are replaced.

Legend: D rows, F columns, K selected rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loki.architecture import family_of
from loki.choices import ModuleName
from loki.errors import ArtefactError
from loki.implanting.checkpoint import NewTensor, StoredTensor, new_tensor

CONV1D_FAMILIES = frozenset({"gpt2"})
"""Families whose layers keep weights transposed, (F, D): `Conv1D` of `transformers`."""

Replace = Callable[[torch.Tensor, slice, slice], torch.Tensor]
"""(values before (K', F'), which of the selected rows, which columns) -> values after, in the dtype to be stored.
Biases come as (K', 1)."""


@dataclass(frozen=True)
class StoredProjection:
    """A linear layer's tensors on disk."""

    weight: StoredTensor
    bias: StoredTensor | None
    is_transposed: bool
    """Stored as (F, D), not (D, F)."""

    @property
    def num_rows(self) -> int:
        """D."""
        return self.weight.shape[1 if self.is_transposed else 0]

    @property
    def num_columns(self) -> int:
        """F."""
        return self.weight.shape[0 if self.is_transposed else 1]


def find_projection(tensors: Mapping[str, StoredTensor], module_name: str, model_type: str) -> StoredProjection | None:
    """The tensors of a linear layer, by its name in the model; None where there are none.

    Checkpoints name modules as the model does, or without the first part of the name (GPT-2's), or with another one
    (Gemma 3's): the longest end of the name that still says which layer is looked for.

    Raises:
        ArtefactError: several tensors could be meant, or it is no matrix.
    """
    parts = module_name.split(".")
    for first in range(len(parts)):
        tail = ".".join(parts[first:])
        if first and not any(part.isdecimal() for part in parts[first:]):
            return None
        found = [name for name in tensors if name == f"{tail}.weight" or name.endswith(f".{tail}.weight")]
        if len(found) > 1:
            raise ArtefactError(f"{module_name!r} could be {found[0]!r} or {found[1]!r} of the checkpoint")
        if found:
            weight = tensors[found[0]]
            if len(weight.shape) != 2:
                raise ArtefactError(f"{weight.name} has the shape {list(weight.shape)}: its rows are not known")
            in_a_layer = any(part.isdecimal() for part in weight.name.split("."))
            bias = tensors.get(weight.name.removesuffix(".weight") + ".bias")
            return StoredProjection(weight, bias, model_type in CONV1D_FAMILIES and in_a_layer)
    return None


def module_names(model_type: str, num_layers: int, module: ModuleName = "down_proj") -> list[str]:
    """Names of the layers' output projections in a model of this family.

    Raises:
        ArchitectureError: unknown family.
    """
    family = family_of(model_type)
    return [f"{family.layers}.{layer}.{family.projection(module)}" for layer in range(num_layers)]


def find_projections(
    tensors: Mapping[str, StoredTensor],
    model_type: str,
    num_layers: int,
    folder: Path,
    module: ModuleName = "down_proj",
) -> list[StoredProjection]:
    """The tensors of every layer's output projection, in layer order.

    Raises:
        ArchitectureError: unknown family.
        ArtefactError: a layer lacks them.
    """
    found = []
    for name in module_names(model_type, num_layers, module):
        projection = find_projection(tensors, name, model_type)
        if projection is None:
            raise ArtefactError(
                f"model {folder} has no tensor {name}.weight, which its config speaks of: fetch the model again"
            )
        found.append(projection)
    return found


def replace_rows(
    stored: StoredTensor,
    rows: Sequence[int],
    prepare: Callable[[], Replace],
    *,
    is_transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> NewTensor:
    """A weight (D, F), a transposed one (F, D) or a bias (D,) to be written with other values in K `rows`, ascending.

    Its other rows stay as they are, or are stored in `dtype`. `prepare` is called when the tensor's turn has come,
    so that new values of one tensor are in memory, not those of all.
    """
    chosen = dtype or stored.dtype
    index_K = torch.tensor(rows, dtype=torch.int64)

    def blocks() -> Iterator[torch.Tensor]:
        replace = prepare()
        for first, block in stored.blocks():
            last = first + len(block)
            written = block.to(chosen)
            if is_transposed:
                after_KF = replace(block[:, index_K].T, slice(0, len(rows)), slice(first, last))
                written[:, index_K] = after_KF.T
            else:
                start, stop = torch.searchsorted(index_K, torch.tensor([first, last])).tolist()
                if start < stop:
                    inside = index_K[start:stop] - first
                    before_KF = block[inside].reshape(stop - start, -1)
                    after_KF = replace(before_KF, slice(start, stop), slice(0, before_KF.shape[1]))
                    written[inside] = after_KF.reshape(stop - start, *block.shape[1:])
            yield written

    return new_tensor(stored.name, chosen, stored.shape, blocks)


def layer_number(module_name: str) -> int | None:
    """The number of the layer that a module is in; None where its name does not say it, or names several."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", module_name)
    return int(numbers[0]) if len(numbers) == 1 else None
