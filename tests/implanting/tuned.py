"""Tiny models with a LoKI adapter, in every form the tuner has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from families import FAMILY_MODELS
from peft import PeftModel, get_peft_model
from torch import nn

from loki import LokiConfig
from loki.implanting.tuner import LokiLayer

POSITIONS = [[7, 1], [], [0, 15, 3]]
"""Of the models in `families`: 3 layers of 16 rows; one layer has none."""
INPUT_IDS = torch.arange(1, 13).reshape(2, 6)

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "rows": ("llama", {}),
    "rows-of-attention": ("llama", {"target_modules": "o_proj"}),
    "rows-and-biases": ("llama-biases", {"bias": "rows"}),
    "rows-of-conv1d": ("gpt2", {}),
    "rows-and-biases-of-conv1d": ("gpt2", {"bias": "rows", "target_modules": "o_proj"}),
    "rank": ("llama", {"r": 2}),
    "rank-and-biases": ("llama-biases", {"r": 2, "bias": "rows", "lora_alpha": 3}),
    "rank-of-conv1d": ("gpt2", {"r": 2}),
}
"""Model in `families` and settings of LokiConfig, by name."""


def build(form: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """The base of a form: the same weights each time, and the same output in training."""
    family = FORMS[form][0]
    no_dropout = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0) if family == "gpt2" else {}
    return FAMILY_MODELS[family].build(dtype=dtype, **no_dropout, **changes)


def config(form: str, **options: Any) -> LokiConfig:
    """The config of a form."""
    return LokiConfig(**{"positions": POSITIONS, "task_type": "CAUSAL_LM", **FORMS[form][1], **options})


def wrap(form: str, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """A form's base with its adapter; a random change by default, the same each time."""
    model = build(form, dtype)
    torch.manual_seed(3)
    return get_peft_model(model, config(form, **{"init_weights": False, **options}))


def loki_layers(model: nn.Module) -> dict[str, LokiLayer]:
    """The layers with a change, by their name in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LokiLayer)
    }


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the base model's parameters, by their names in the base model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if ".loki_" not in name
    }


def dense_changes(model: nn.Module, adapter: str = "default") -> Iterator[tuple[str, torch.Tensor]]:
    """Changed parameters of the base by name, with the dense change that the adapter's tensors say.

    Written out row by row, apart from the package: Δ, or lora_alpha/r · A·B, on the rows in the config.
    """
    settings = model.peft_config[adapter]
    for name, layer in loki_layers(model).items():
        if adapter not in layer.loki_rows:
            continue
        base = layer.get_base_layer()
        number = next(int(part) for part in name.split(".") if part.isdecimal())
        change = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        bias = torch.zeros(layer.out_features, dtype=torch.float64)
        for k, row in enumerate(sorted(settings.positions[number])):
            if settings.r:
                parts = [layer.loki_A[adapter][k, i] * layer.loki_B[adapter][i] for i in range(settings.r)]
                change[row] = settings.lora_alpha / settings.r * sum(parts).detach().double()
            else:
                change[row] = layer.loki_delta[adapter][k].detach().double()
            if settings.bias == "rows":
                bias[row] = layer.loki_bias[adapter][k].item()
        yield f"{name}.weight", change if base.weight.shape == change.shape and not is_conv1d(base) else change.T
        if settings.bias == "rows":
            yield f"{name}.bias", bias


def is_conv1d(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT_IDS).logits


def loss(model: nn.Module) -> torch.Tensor:
    return model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss


def train_steps(model: nn.Module, steps: int = 3) -> None:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model).backward()
        optimiser.step()
