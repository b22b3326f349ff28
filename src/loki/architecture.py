"""Where each model family keeps its feed-forward output projections (the matrices whose rows LoKI trains).

The table is data: to add a family, add one entry and its name to the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from loki.choices import SiteName
from loki.errors import ArchitectureError, InputError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """Module paths of one model family, as `transformers` names them."""

    layers: str = "model.layers"
    """Path from the causal-LM model to its list of decoder layers."""
    down_proj: str = "mlp.down_proj"
    """Path from a decoder layer to the linear layer that ends its feed-forward block."""
    post_norm: str | None = None
    """Path from a decoder layer to the norm that follows the down-projection, where there is one."""


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(),
        "mistral": Family(),
        "qwen2": Family(),
        "qwen3": Family(),
        "olmo2": Family(post_norm="post_feedforward_layernorm"),
    }
)


def family_of(model_type: str) -> Family:
    """Paths for a `config.model_type`.

    Raises:
        ArchitectureError: the family is not in `FAMILIES`.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise ArchitectureError(
            f"unknown architecture {model_type!r}: known are {', '.join(sorted(FAMILIES))}; "
            "add an entry to FAMILIES in loki/architecture.py, or pass LokiConfig(positions={module name: rows})"
        ) from None


def model_type_of(model: nn.Module) -> str:
    """The model's family name, or an empty string for a model without a `transformers` config."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Decoder layers in order, by their full module name; works on the causal-LM model and on its body.

    Raises:
        ArchitectureError: unknown family, or a model built differently from its family.
    """
    family = family_of(model_type_of(model))
    _, _, path_inside_body = family.layers.partition(".")
    for path in (family.layers, path_inside_body):
        try:
            layers = model.get_submodule(path)
        except AttributeError:
            continue
        return {f"{path}.{name}": layer for name, layer in layers.named_children()}
    raise ArchitectureError(
        f"{type(model).__name__} has no {family.layers!r}, where {model_type_of(model)!r} models keep their layers"
    )


def down_projections(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layer that ends each feed-forward block, in layer order, by full module name.

    Raises:
        ArchitectureError: unknown family, or a layer without such a linear layer (fused experts, for one).
    """
    family = family_of(model_type_of(model))
    projections: dict[str, nn.Module] = {}
    for layer_name, layer in decoder_layers(model).items():
        name = f"{layer_name}.{family.down_proj}"
        try:
            module = layer.get_submodule(family.down_proj)
        except AttributeError:
            raise ArchitectureError(
                f"{name} does not exist: this {model_type_of(model)!r} model has no linear down-projection "
                "in every layer (mixture-of-experts weights are not supported)"
            ) from None
        if not hasattr(module, "in_features"):
            raise ArchitectureError(f"{name} is {type(module).__name__}, not a linear layer: its rows are not known")
        projections[name] = module
    return projections


def attribution_sites(model: nn.Module, site: SiteName) -> tuple[Literal["down_proj", "after_norm"], list[nn.Module]]:
    """The modules whose output at the last position is scaled, one per layer, and the site they stand for.

    `auto` takes the norm's output in families that normalise the feed-forward block's output, because
    RMSNorm forgets the scale of its input and the path from zero to the activation would be flat; the norm
    acts elementwise, so node j still belongs to row j. Elsewhere it takes the down-projection's output.

    Raises:
        InputError: `after_norm` for a family without such a norm.
        ArchitectureError: as `down_projections`.
    """
    projections = down_projections(model)
    family = family_of(model_type_of(model))
    if site == "after_norm" and family.post_norm is None:
        raise InputError(
            f"site 'after_norm' does not exist in {model_type_of(model)!r} models: "
            "no norm follows their down-projection; use 'auto' or 'down_proj'"
        )
    if site == "down_proj" or family.post_norm is None:
        return "down_proj", list(projections.values())
    return "after_norm", [layer.get_submodule(family.post_norm) for layer in decoder_layers(model).values()]


@dataclass(frozen=True)
class Shape:
    """What decides whether an artefact of one model fits another."""

    model_type: str
    num_layers: int
    num_rows: int
    """D: output rows of each down-projection (the hidden size)."""
    num_columns: int
    """F: inputs of each down-projection (the intermediate size)."""

    def __str__(self) -> str:
        return f"{self.model_type}-{self.num_layers}x{self.num_rows}x{self.num_columns}"


def shape_of_config(config: PretrainedConfig) -> Shape:
    """The shape that a model of this config has, without building it.

    Raises:
        ArchitectureError: unknown family.
    """
    family_of(config.model_type)
    return Shape(config.model_type, config.num_hidden_layers, config.hidden_size, config.intermediate_size)


def _size(linear: nn.Module) -> tuple[int, int]:
    rows, columns = linear.out_features, linear.in_features
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    return rows, columns


def shape_of(model: nn.Module) -> Shape:
    """Layers, rows and columns of the model's down-projections.

    Raises:
        ArchitectureError: as `down_projections`, or layers of different sizes.
    """
    projections = down_projections(model)
    sizes = {_size(module) for module in projections.values()}
    if len(sizes) != 1:
        raise ArchitectureError(f"down-projections of several sizes in one model are not supported: {sorted(sizes)}")
    ((num_rows, num_columns),) = sizes
    return Shape(model_type_of(model), len(projections), num_rows, num_columns)
