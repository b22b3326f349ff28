"""The parts of a trained adapter that can be turned down, each by a scale of its own.

The change of a LoKI adapter falls apart into rows; that of a LoRA into modules. A part is scaled in the adapter's own
tensors, in which its change is linear: a row of Δ (of A for LoKI*), with the row's bias, or a module's whole B.

Shape suffixes: U units, the parts that have a scale; K rows of a module.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from loki.errors import ArtefactError, InputError
from loki.implanting.stored_rows import layer_number
from loki.implanting.tuner.layer import LokiLayer
from loki.provenance import new_directory, read_json, write_bytes
from loki.training.modes import BASE_KEEPING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RESULT, CURVE = "dial.json", "curve"
NOT_LINEAR = ("use_dora", "use_qalora", "use_bdlora", "modules_to_save", "trainable_token_indices", "arrow_config")
"""What a LoRA may have besides two factors, and what a scale of one of them would not scale."""


@dataclass(frozen=True)
class Part:
    """Tensors of one module that its change is proportional to."""

    layer: int
    tensors: tuple[nn.Parameter, ...]
    """In the model."""
    trained: tuple[torch.Tensor, ...]
    """Their values at scale 1."""
    num_units: int
    """Rows, where each has a scale, or 1."""

    def set(self, scales_U: torch.Tensor) -> None:
        """Turn this part to scales (U,) of its own units."""
        for tensor, trained in zip(self.tensors, self.trained, strict=True):
            scales = scales_U.to(trained)
            tensor.copy_(trained * (scales if self.num_units == 1 else scales.view(-1, *[1] * (trained.dim() - 1))))

    def derivatives(self) -> torch.Tensor:
        """Derivative of what was differentiated with respect to each unit's scale, (U,) float64 on the CPU."""
        total_U = torch.zeros(self.num_units, dtype=torch.float64)
        for tensor, trained in zip(self.tensors, self.trained, strict=True):
            if tensor.grad is not None:
                product = (tensor.grad.float() * trained.float()).double().cpu()
                total_U += (
                    product.sum()
                    if self.num_units == 1
                    else product.flatten(1).sum(1)
                    if product.dim() > 1
                    else product
                )
        return total_U


class DialledAdapter:
    """A model with one trained adapter whose parts are turned up and down.

    Only the adapter's tensors take gradients, and only while `differentiable` is entered; `saved_as` writes what is
    set at the time.
    """

    def __init__(self, model: PeftModel, folder: Path) -> None:
        self.model, self.folder = model.eval(), folder
        model.requires_grad_(False)
        self.parts = list(_parts(model, folder))
        if not self.parts:
            raise ArtefactError(f"adapter {folder} changes no layer: name one that was trained")
        self.has_rows = any(isinstance(module, LokiLayer) for module in model.modules())
        """Whether units are rows."""
        self.layers_U = np.concatenate([np.full(part.num_units, part.layer) for part in self.parts])
        """Layer of each unit."""

    @classmethod
    def load(cls, base: PreTrainedModel, folder: Path) -> DialledAdapter:
        """Put an adapter on its base.

        Raises:
            InputError: it does not fit the base.
            ArtefactError: no adapter, or one whose change cannot be scaled part by part.
        """
        from peft import PeftModel

        require_dialable(folder)
        try:
            model = PeftModel.from_pretrained(base, str(folder))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            text = " ".join(str(error).split())
            raise InputError(f"adapter {folder} does not fit this model ({text[:200]}): name its base") from error
        return cls(model, folder)

    @property
    def num_units(self) -> int:
        """U."""
        return len(self.layers_U)

    @torch.no_grad()
    def set(self, scales_U: np.ndarray) -> None:
        """Turn each unit to its scale (U,): 0 is the base, 1 what was trained, bit for bit."""
        start = 0
        for part in self.parts:
            part.set(torch.from_numpy(np.asarray(scales_U[start : start + part.num_units], dtype=np.float64)))
            start += part.num_units

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Let the adapter's tensors take gradients, which are gone afterwards."""
        tensors = [tensor for part in self.parts for tensor in part.tensors]
        for tensor in tensors:
            tensor.requires_grad_(True)
        try:
            yield
        finally:
            for tensor in tensors:
                tensor.requires_grad_(False)
                tensor.grad = None

    def derivatives(self) -> np.ndarray:
        """Derivatives of what was differentiated with respect to all scales, (U,)."""
        return torch.cat([part.derivatives() for part in self.parts]).numpy()

    def save(self, output: Path, write_also: Callable[[Path], None] = lambda _folder: None) -> None:
        """Write the adapter as it is set, with the other files of its folder and what `write_also` adds.

        Raises:
            OutputError: the folder cannot be written.
        """
        from peft import get_peft_model_state_dict
        from safetensors.torch import load_file
        from safetensors.torch import save as as_bytes

        dtypes = {name: tensor.dtype for name, tensor in load_file(self.folder / WEIGHTS).items()}
        state = {
            name: tensor.detach().to("cpu", dtypes.get(name, tensor.dtype)).contiguous()
            for name, tensor in get_peft_model_state_dict(self.model).items()
        }
        with new_directory(output) as directory:
            for path in sorted(self.folder.iterdir()):
                if (
                    path.is_file()
                    and not path.is_symlink()
                    and path.name not in (WEIGHTS, RESULT)
                    and path.stem != CURVE
                ):
                    shutil.copyfile(path, directory / path.name)
            write_bytes(directory / WEIGHTS, as_bytes(state, metadata={"format": "pt"}))
            write_also(directory)


def require_dialable(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter whose change can be scaled part by part, before any model is loaded.

    Raises:
        ArtefactError: there is none, or it is of another kind.
    """
    if not (folder / CONFIG).is_file():
        raise ArtefactError(f"{folder} has no {CONFIG}: name the folder of a LoKI or LoRA adapter")
    config = read_json(folder / CONFIG, what="adapter")
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in ("LOKI", "LORA"):
        raise ArtefactError(f"adapter {folder} is of type {kind!r}: LOKI and LORA can be dialled")
    if not (folder / WEIGHTS).is_file():
        raise ArtefactError(f"adapter {folder} has no {WEIGHTS}: save it as safetensors")
    found: dict[str, Any] = config
    for name in NOT_LINEAR:
        if found.get(name):
            raise ArtefactError(f"adapter {folder} has {name}, and not only a change that can be scaled: merge it")
    beginning = found.get("init_lora_weights", True)
    if kind == "LORA" and beginning not in BASE_KEEPING:
        raise ArtefactError(
            f"adapter {folder} began with {beginning!r}, which changes the base's own weights too: save it with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )
    return found


def _parts(model: PeftModel, folder: Path) -> Iterator[Part]:
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if not isinstance(module, LokiLayer | LoraLayer):
            continue
        layer = layer_number(name)
        if layer is None:
            raise ArtefactError(f"adapter {folder} changes {name}, which is in no layer or in several: merge it")
        if isinstance(module, LokiLayer):
            tensors = _of_active(module, model, ("loki_delta", "loki_A", "loki_bias"))
            num_units = len(tensors[0]) if tensors else 0
        else:
            if len(getattr(module, "lora_embedding_B", ())):
                raise ArtefactError(f"adapter {folder} changes an embedding, {name}: merge it")
            tensors = [tensor for factor in _of_active(module, model, ("lora_B",)) for tensor in factor.parameters()]
            num_units = 1 if tensors else 0
        if num_units:
            yield Part(layer, tuple(tensors), tuple(tensor.detach().clone() for tensor in tensors), num_units)


def _of_active(module: Any, model: PeftModel, names: tuple[str, ...]) -> list[Any]:
    """What a module has under these names for the adapter in use."""
    return [
        getattr(module, name)[model.active_adapter] for name in names if model.active_adapter in getattr(module, name)
    ]
