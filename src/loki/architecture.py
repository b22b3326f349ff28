"""Where each model family keeps the output projections of its feed-forward and attention blocks.

LoKI trains rows of the former. The table is data: to add a family, add one entry here and a tiny model
to `tests/families.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from loki.choices import ModuleName, SiteName
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
    o_proj: str = "self_attn.o_proj"
    """Path from a decoder layer to the linear layer that ends its attention block."""
    post_norm: str | None = None
    """Path from a decoder layer to the norm of the down-projection's output, where there is one."""
    post_attention_norm: str | None = None
    """Path from a decoder layer to the norm of the attention block's output, where there is one."""
    columns: str = "intermediate_size"
    """Field of the config with the down-projection's number of inputs; None there means 4 times the hidden size."""

    def projection(self, module: ModuleName) -> str:
        """Path from a decoder layer to a block's output projection."""
        return {"down_proj": self.down_proj, "o_proj": self.o_proj}[module]

    def norm_after(self, module: ModuleName) -> str | None:
        """Path from a decoder layer to the norm that follows a block's output projection."""
        return {"down_proj": self.post_norm, "o_proj": self.post_attention_norm}[module]


_BOTH_NORMED = Family(post_norm="post_feedforward_layernorm", post_attention_norm="post_attention_layernorm")

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(),
        "mistral": Family(),
        "qwen2": Family(),
        "qwen3": Family(),
        "smollm3": Family(),
        "granite": Family(),
        "phi3": Family(),
        "cohere": Family(),
        "cohere2": Family(),
        "starcoder2": Family(down_proj="mlp.c_proj"),
        "olmo2": _BOTH_NORMED,
        "gemma2": _BOTH_NORMED,
        "gemma3_text": _BOTH_NORMED,
        "gemma3": replace(_BOTH_NORMED, layers="model.language_model.layers"),
        "gpt2": Family(layers="transformer.h", down_proj="mlp.c_proj", o_proj="attn.c_proj", columns="n_inner"),
        "gptj": Family(layers="transformer.h", down_proj="mlp.fc_out", o_proj="attn.out_proj", columns="n_inner"),
        "gpt_neox": Family(layers="gpt_neox.layers", down_proj="mlp.dense_4h_to_h", o_proj="attention.dense"),
        "falcon": Family(
            layers="transformer.h",
            down_proj="mlp.dense_4h_to_h",
            o_proj="self_attention.dense",
            columns="ffn_hidden_size",
        ),
        "phi": Family(down_proj="mlp.fc2", o_proj="self_attn.dense"),
    }
)

BLOCKS: Mapping[ModuleName, str] = MappingProxyType(
    {"down_proj": "down-projection", "o_proj": "attention's output projection"}
)
"""What messages call a projection."""

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Fields of configs with the number of experts; a model of one expert is an ordinary one."""


def family_of(model_type: str) -> Family:
    """Paths for a `config.model_type`.

    Raises:
        ArchitectureError: the family is not in `FAMILIES`.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise ArchitectureError(
            f"unknown architecture {model_type!r}: known are {', '.join(FAMILIES)}; "
            "add an entry to FAMILIES in loki/architecture.py, or pass LokiConfig(positions={module name: rows})"
        ) from None


def model_type_of(model: nn.Module) -> str:
    """The model's family name, or an empty string for a model without a `transformers` config."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Decoder layers in order, by their full module name; works on the causal-LM model and on its body.

    Raises:
        ArchitectureError: unknown family, a mixture of experts, or a model built differently from its family.
    """
    model_type = model_type_of(model)
    if _counts_experts(getattr(model, "config", None)) or (model_type not in FAMILIES and _has_experts(model)):
        raise _mixture_of_experts(model_type)
    family = family_of(model_type)
    _, _, path_inside_body = family.layers.partition(".")
    for path in (family.layers, path_inside_body):
        try:
            layers = model.get_submodule(path)
        except AttributeError:
            continue
        return {f"{path}.{name}": layer for name, layer in layers.named_children()}
    raise ArchitectureError(
        f"{type(model).__name__} has no {family.layers!r}, where {model_type!r} models keep their layers"
    )


def projections(model: nn.Module, module: ModuleName = "down_proj") -> dict[str, nn.Module]:
    """The linear layer that ends each feed-forward or attention block, in layer order, by full module name.

    GPT-2's `Conv1D` is one too: it keeps its weight transposed, and its outputs are the same rows.

    Raises:
        ArchitectureError: unknown family, or a layer without such a linear layer (fused experts, for one).
    """
    layers = decoder_layers(model)
    path = family_of(model_type_of(model)).projection(module)
    found: dict[str, nn.Module] = {}
    for layer_name, layer in layers.items():
        name = f"{layer_name}.{path}"
        try:
            projection = layer.get_submodule(path)
        except AttributeError:
            if _has_experts(layer):
                raise _mixture_of_experts(model_type_of(model)) from None
            raise ArchitectureError(
                f"{name} does not exist: this {model_type_of(model)!r} model has no linear {BLOCKS[module]} "
                "in every layer"
            ) from None
        if _size(projection) is None:
            raise ArchitectureError(
                f"{name} is {type(projection).__name__}, not a linear layer: its rows are not known"
            )
        found[name] = projection
    return found


def down_projections(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layer that ends each feed-forward block: `projections` of the module that LoKI trains."""
    return projections(model, "down_proj")


def linear_layers(model: nn.Module, blocks: Sequence[ModuleName] = ("down_proj", "o_proj")) -> list[str]:
    """Full names of all linear layers in the blocks that end with these projections, layer by layer.

    Raises:
        ArchitectureError: as `decoder_layers`.
    """
    family = family_of(model_type_of(model))
    inside = tuple(f"{family.projection(block).rpartition('.')[0]}." for block in blocks)
    return [
        f"{layer_name}.{name}"
        for layer_name, layer in decoder_layers(model).items()
        for name, module in layer.named_modules()
        if name.startswith(inside) and _size(module) is not None
    ]


def attribution_sites(
    model: nn.Module, site: SiteName, module: ModuleName = "down_proj"
) -> tuple[ModuleName | Literal["after_norm"], list[nn.Module]]:
    """The modules whose output at the last position is scaled, one per layer, and the site they stand for.

    `down_proj` takes the output of the projection itself, whichever `module` names it, and is then called by
    the module's name. `auto` takes the norm's output in families that normalise the block's output, because
    RMSNorm forgets the scale of its input and the path from zero to the activation would be flat; the norm
    acts elementwise, so node j still belongs to row j. Elsewhere it takes the projection's output.

    Raises:
        InputError: `after_norm` for a family without such a norm.
        ArchitectureError: as `projections`, or attention that is not causal.
    """
    found = projections(model, module)
    _require_causal(model)
    norm = family_of(model_type_of(model)).norm_after(module)
    if site == "after_norm" and norm is None:
        raise InputError(
            f"site 'after_norm' does not exist in {model_type_of(model)!r} models: "
            f"no norm follows their {BLOCKS[module]}; use 'auto' or 'down_proj'"
        )
    if site == "down_proj" or norm is None:
        return module, list(found.values())
    return "after_norm", [layer.get_submodule(norm) for layer in decoder_layers(model).values()]


def site_warning(model: nn.Module, site: SiteName, module: ModuleName = "down_proj") -> str | None:
    """What a user should know who takes a projection's own output where a norm follows it; None elsewhere.

    Raises:
        ArchitectureError: unknown family.
    """
    if site != "down_proj" or family_of(model_type_of(model)).norm_after(module) is None:
        return None
    return (
        f"site 'down_proj' in {model_type_of(model)!r} models: the norm after the {BLOCKS[module]} forgets its scale, "
        "so nearly all attribution falls on α = 0 and does not converge as steps grow; use 'auto'"
    )


def text_config(config: object) -> Any:
    """The part of a multimodal model's config that speaks of its language model; other configs as they are."""
    get_text_config = getattr(config, "get_text_config", None)
    return config if get_text_config is None else get_text_config()


def _require_causal(model: nn.Module) -> None:
    config = text_config(getattr(model, "config", None))
    if getattr(config, "use_bidirectional_attention", None) is True or getattr(config, "is_causal", True) is False:
        raise ArchitectureError(
            f"this {model_type_of(model)!r} model attends to later tokens too (its config says so): "
            "it predicts no next token; choose a causal language model"
        )


def _counts_experts(config: object) -> bool:
    language_config = text_config(config)
    counts = [getattr(language_config, name, None) for name in _EXPERT_COUNTS]
    return any(isinstance(count, int) and count > 1 for count in counts)


def _has_experts(module: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "experts" for name, _ in module.named_modules())


def _mixture_of_experts(model_type: str) -> ArchitectureError:
    return ArchitectureError(
        f"{model_type!r} models keep their experts' weights fused (mixture of experts): "
        "their rows cannot be attributed; choose a dense model"
    )


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
        ArchitectureError: unknown family, or a mixture of experts.
    """
    if _counts_experts(config):
        raise _mixture_of_experts(config.model_type)
    family = family_of(config.model_type)
    language_config = text_config(config)
    num_rows: int = language_config.hidden_size
    num_columns: int | None = getattr(language_config, family.columns)
    return Shape(config.model_type, language_config.num_hidden_layers, num_rows, num_columns or 4 * num_rows)


def _size(linear: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of a linear layer or of GPT-2's `Conv1D`; None for other modules."""
    for rows_name, columns_name in (("out_features", "in_features"), ("nf", "nx")):
        rows, columns = getattr(linear, rows_name, None), getattr(linear, columns_name, None)
        if isinstance(rows, int) and isinstance(columns, int):
            return rows, columns
    return None


def shape_of(model: nn.Module) -> Shape:
    """Layers, rows and columns of the model's down-projections.

    Raises:
        ArchitectureError: as `projections`, or layers of different sizes.
    """
    found = down_projections(model)
    sizes = {size for module in found.values() if (size := _size(module)) is not None}
    if len(sizes) != 1:
        raise ArchitectureError(f"down-projections of several sizes in one model are not supported: {sorted(sizes)}")
    ((num_rows, num_columns),) = sizes
    return Shape(model_type_of(model), len(found), num_rows, num_columns)
