"""Making LoKI models: an ordinary checkpoint with its projections split into trainable and frozen rows.

The form is that of the paper's public implementation: `….active.weight` has the selected rows in ascending order,
`….frozen.weight` the others, `active_bias` and `frozen_bias` the same of a bias, `index_map` says where each output
stands in both together, and `target_pos` in `config.json` names the rows. The folder carries a modelling file, so
that trainers load it with `trust_remote_code=True`. `loki.implanting.restore` is the way back.

Legend: D rows, F columns, K selected rows.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from loki.architecture import family_of, shape_of_config
from loki.choices import DtypeName
from loki.errors import ArtefactError, InputError
from loki.implanting.checkpoint import (
    FLOATS,
    Checkpoint,
    NewTensor,
    StoredTensor,
    copy_companions,
    find_folder,
    new_tensor,
    open_checkpoint,
    rewrite,
    unchanged,
    with_dtype,
)
from loki.implanting.stored_rows import StoredProjection, find_projections
from loki.models import load_config, resolve_dtype
from loki.progress import Track, silent
from loki.provenance import new_directory, require_new_directory, write_json
from loki.rows import RowSelection, module_of

MODELING_FILE = "modeling_loki.py"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CreateReport:
    """What splitting did."""

    num_parameters: int
    """Elements of the checkpoint, index maps not counted."""
    num_trainable: int
    """Elements of the active rows and their biases."""


def create_loki_model(
    loki_model_class: object = None,
    loki_config_cls: object = None,
    model_name: str = "Qwen/Qwen2.5-0.5B-Instruct",
    target_pos_path: str | Path = "",
    save_dir: str | Path = "./loki_model",
    torch_dtype: torch.dtype | DtypeName = torch.bfloat16,
    trust_remote_code: bool = False,
    *,
    model_type: str | None = None,
    track: Track = silent,
) -> CreateReport:
    """Write a LoKI model to `save_dir`, from a base model and a positions file.

    `torch_dtype` is the dtype to store; `auto` keeps the base's. The two classes are arguments of the public
    implementation and have no effect: the base's config says which classes there are. `trust_remote_code` concerns
    the base's config only; `model_type` must be the one that it names.

    Raises:
        InputError: the base cannot be found, is of another type, or is a LoKI model already; positions of attention.
        ArchitectureError: a family that is not known, or a mixture of experts.
        ArtefactError: positions that do not fit the base, or a base with missing or damaged tensors.
        OutputError: `save_dir` cannot be written.
    """
    if loki_model_class is not None or loki_config_cls is not None:
        logger.info("loki_model_class and loki_config_cls have no effect: config.json of the model says what it is")
    directory = Path(save_dir)
    require_new_directory(directory)
    module_of(target_pos_path, "down_proj")  # a LoKI model has no other rows apart
    positions = RowSelection.load(target_pos_path)
    source = open_checkpoint(find_folder(model_name))
    config = source.config()
    if "target_pos" in config:
        raise InputError(f"model {model_name!r} is a LoKI model already: name the model that it was made from")
    if model_type not in (None, config.get("model_type")):
        raise InputError(
            f"model type {model_type!r} is not that of {model_name!r}, which is {config.get('model_type')!r}: "
            "leave --model-type out"
        )
    dtype = chosen_dtype(torch_dtype)
    typed_config = load_config(model_name, trust_remote_code=trust_remote_code)
    splitting = _Splitting(fitting_projections(source, typed_config, positions, target_pos_path), positions, dtype)
    with new_directory(directory) as temporary:
        copy_companions(source.folder, temporary)
        written = config if dtype is None else with_dtype(config, dtype)
        write_json(temporary / "config.json", {**written, **_loki_entries(typed_config, positions)})
        with resources.as_file(resources.files("loki.implanting.modeling") / MODELING_FILE) as file:
            shutil.copyfile(file, temporary / MODELING_FILE)
        rewrite(source, temporary, splitting.write, track=track)
    return CreateReport(splitting.num_parameters, splitting.num_trainable)


def chosen_dtype(torch_dtype: torch.dtype | DtypeName) -> torch.dtype | None:
    """The dtype to store, None for the base's own.

    Raises:
        InputError: no dtype for weights.
    """
    if isinstance(torch_dtype, torch.dtype):
        if torch_dtype not in FLOATS.values():
            raise InputError(f"weights cannot be stored as {torch_dtype}: choose torch.float32, bfloat16 or float16")
        return torch_dtype
    return None if torch_dtype == "auto" else resolve_dtype(torch_dtype)


def fitting_projections(
    source: Checkpoint, typed_config: Any, positions: RowSelection, positions_path: str | Path
) -> dict[int, StoredProjection]:
    """Projections of the layers with selected rows, after all checks of shape."""
    shape = shape_of_config(typed_config)
    what = f"positions file {positions_path}"
    positions.require_fit(num_layers=shape.num_layers, num_rows=shape.num_rows, what=what)
    found = find_projections(source.tensors, shape.model_type, shape.num_layers, source.folder)
    chosen = {layer: found[layer] for layer, rows in enumerate(positions.rows) if rows}
    for projection in chosen.values():
        for stored in (projection.weight, projection.bias):
            if stored is not None:
                stored.require_float()
        if (projection.num_rows, projection.num_columns) != (shape.num_rows, shape.num_columns):
            raise ArtefactError(
                f"{projection.weight.name} of model {source.folder} has {projection.num_rows} × "
                f"{projection.num_columns} elements, its config says {shape.num_rows} × {shape.num_columns}: "
                "fetch the model again"
            )
    return chosen


def _loki_entries(typed_config: Any, positions: RowSelection) -> dict[str, Any]:
    """What `config.json` of a LoKI model says besides the base's own."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    family = family_of(typed_config.model_type)
    # Those of transformers itself, also where the base came with code of its own.
    config_class = CONFIG_MAPPING[typed_config.model_type]
    base_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class].__name__
    module = Path(MODELING_FILE).stem
    return {
        "architectures": [f"LoKI{base_class}"],
        # AutoModel too: saving what it loads must not lose the head.
        "auto_map": {
            "AutoConfig": f"{module}.LoKI{config_class.__name__}",
            "AutoModel": f"{module}.LoKI{base_class}",
            "AutoModelForCausalLM": f"{module}.LoKI{base_class}",
        },
        "target_module": f"{family.layers}.{{layer}}.{family.down_proj}",
        "target_pos": positions.as_lists(),
    }


class _Splitting:
    """Which tensors are split, and what has been written so far."""

    def __init__(
        self, projections: dict[int, StoredProjection], positions: RowSelection, dtype: torch.dtype | None
    ) -> None:
        self.dtype = dtype
        self.weights = {p.weight.name: (p, positions.rows[layer]) for layer, p in projections.items()}
        self.biases = {p.bias.name: positions.rows[layer] for layer, p in projections.items() if p.bias is not None}
        self.num_parameters = 0
        self.num_trainable = 0

    def write(self, stored: StoredTensor) -> list[NewTensor]:
        """What is written in a tensor's place."""
        self.num_parameters += stored.num_elements
        if stored.name in self.weights:
            projection, active = self.weights[stored.name]
            self.num_trainable += len(active) * projection.num_columns
            module, frozen = stored.name.removesuffix(".weight"), others(active, projection.num_rows)
            index_map = torch.tensor([*active, *frozen]).argsort()
            return [
                self._picked(stored, f"{module}.active.weight", active, projection.is_transposed),
                self._picked(stored, f"{module}.frozen.weight", frozen, projection.is_transposed),
                new_tensor(f"{module}.index_map", torch.int64, index_map.shape, lambda: [index_map]),
            ]
        if stored.name in self.biases:
            active = self.biases[stored.name]
            self.num_trainable += len(active)
            module, frozen = stored.name.removesuffix(".bias"), others(active, stored.num_elements)
            return [
                self._picked(stored, f"{module}.active_bias", active),
                self._picked(stored, f"{module}.frozen_bias", frozen),
            ]
        return [unchanged(stored, self.dtype)]

    def _picked(self, stored: StoredTensor, name: str, rows: Sequence[int], is_transposed: bool = False) -> NewTensor:
        dtype = self.dtype or stored.dtype
        index_K = torch.tensor(rows, dtype=torch.int64)

        def blocks() -> Iterator[torch.Tensor]:
            if is_transposed:
                yield stored.read()[:, index_K].T.to(dtype)
                return
            for first, block in stored.blocks():
                start, stop = torch.searchsorted(index_K, torch.tensor([first, first + len(block)])).tolist()
                if start < stop:
                    yield block[index_K[start:stop] - first].to(dtype)

        shape = (len(rows), stored.shape[0]) if is_transposed else (len(rows), *stored.shape[1:])
        return new_tensor(name, dtype, shape, blocks)


def others(rows: Sequence[int], num_rows: int) -> list[int]:
    """The rows that are not among these, ascending."""
    return sorted(set(range(num_rows)) - set(rows))
