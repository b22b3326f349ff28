"""Weighted sums of adapters in one model, as an adapter of its own.

Shape suffixes: K rows of the new adapter (the union), F inputs of the layer, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loki.errors import InputError
from loki.implanting.tuner.config import LokiConfig
from loki.implanting.tuner.layer import LokiLayer


def combine(tuner: Any, adapters: list[str], weights: list[float], name: str, combination_type: str) -> None:
    """Add the adapter `name` to a LokiModel: the sum of `adapters`, each times its weight.

    Raises:
        InputError: as `LokiModel.add_weighted_adapter`.
    """
    _require_possible(tuner, adapters, weights, name, combination_type)
    configs = [tuner.peft_config[adapter] for adapter in adapters]
    layers = {key: layer for key, layer in tuner.model.named_modules() if isinstance(layer, LokiLayer)}
    ranks = [config.r for config in configs]
    rank = sum(ranks) if all(ranks) else 0
    tuner.peft_config[name] = LokiConfig(
        task_type=configs[0].task_type,
        base_model_name_or_path=configs[0].base_model_name_or_path,
        positions=_union(configs, layers, adapters),
        target_modules=configs[0].target_modules if _by_same_layers(configs) else None,
        r=rank,
        lora_alpha=rank or None,  # each part brings its own factor
        bias="rows" if any(config.bias == "rows" for config in configs) else "none",
    )
    tuner.inject_adapter(tuner.model, name)
    with torch.no_grad():
        for layer in layers.values():
            if name in layer.loki_rows:
                _fill(layer, adapters, ranks, weights, name)


def _require_possible(tuner: Any, adapters: list[str], weights: list[float], name: str, combination_type: str) -> None:
    if combination_type != "linear":
        raise InputError(f"combination_type {combination_type!r} is not possible: LoKI adapters combine as 'linear'")
    if not adapters or len(adapters) != len(weights):
        raise InputError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter")
    for adapter in adapters:
        if adapter not in tuner.peft_config:
            raise InputError(f"adapter {adapter!r} does not exist: the model has {', '.join(tuner.peft_config)}")
        config = tuner.peft_config[adapter]
        for setting in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, setting):
                raise InputError(f"adapter {adapter!r} has {setting}, which cannot be added up: leave it out")
    if name in tuner.peft_config:
        raise InputError(f"adapter {name!r} exists already: choose another name")


def _by_same_layers(configs: list[LokiConfig]) -> bool:
    """Whether all give positions by layer, of the same projection."""
    return all(
        not isinstance(config.positions, Mapping) and config.target_modules == configs[0].target_modules
        for config in configs
    )


def _union(configs: list[LokiConfig], layers: dict[str, LokiLayer], adapters: list[str]) -> Any:
    """Every row that one of the adapters has: by layer where all say so, otherwise by module name."""
    if _by_same_layers(configs):
        by_layer = zip(*(config.positions for config in configs), strict=True)
        return [sorted(set().union(*rows)) for rows in by_layer]
    by_module = {
        key: sorted({row for adapter in adapters if adapter in layer.loki_rows for row in _rows(layer, adapter)})
        for key, layer in layers.items()
    }
    return {key: rows for key, rows in by_module.items() if rows}


def _rows(layer: LokiLayer, adapter: str) -> list[int]:
    rows: list[int] = layer.loki_rows[adapter].tolist()
    return rows


def _fill(layer: LokiLayer, adapters: list[str], ranks: list[int], weights: list[float], name: str) -> None:
    """Write the sum into the parameters that `inject_adapter` made."""
    place_of = {row: place for place, row in enumerate(_rows(layer, name))}
    parameters = [layer.loki_delta, layer.loki_A, layer.loki_B, layer.loki_bias]
    for parameter in (held[name] for held in parameters if name in held):
        parameter.zero_()
    first_rank = 0
    for adapter, adapter_rank, weight in zip(adapters, ranks, weights, strict=True):
        ranks_here = slice(first_rank, first_rank := first_rank + adapter_rank)
        if adapter not in layer.loki_rows:
            continue
        places = torch.tensor([place_of[row] for row in _rows(layer, adapter)], device=layer.loki_rows[name].device)
        if name in layer.loki_delta:
            layer.loki_delta[name].index_add_(0, places, weight * layer.row_change(adapter))
        else:
            layer.loki_A[name][places, ranks_here] = (
                weight * layer.loki_scaling[adapter] * layer.loki_A[adapter].float()
            )
            layer.loki_B[name][ranks_here] = layer.loki_B[adapter].float()
        if adapter in layer.loki_bias:
            layer.loki_bias[name].index_add_(0, places, weight * layer.loki_bias[adapter].float())
