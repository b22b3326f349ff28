"""The plain definition of KVA: one full forward and backward pass for every layer and node.

Slow, and the oracle for `branch`. It works for every model whose attribution sites are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from loki.analysis.hooks import hooked
from loki.analysis.objective import objective_values
from loki.analysis.path import Path, PromptAttribution, combine
from loki.analysis.settings import KVASettings


def attribute_prompt(
    model: nn.Module,
    input_ids_T: torch.Tensor,
    sites: Sequence[nn.Module],
    path: Path,
    settings: KVASettings,
    target_id: int | None,
) -> PromptAttribution:
    """Attribution of one prompt without padding; parameters of `model` must be frozen."""
    activations: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        activations.append(output[0, -1].detach().clone())  # Falcon adds to the output in place

    with torch.no_grad(), hooked([(site, "after", keep) for site in sites]):
        logits_1V = _last_logits(model, input_ids_T)
    target = int(logits_1V.argmax()) if target_id is None else target_id
    unmodified = float(objective_values(logits_1V, target, settings.objective))

    gradients, values = [], []
    for site, activation_D in zip(sites, activations, strict=True):
        for alpha in path.alphas:
            leaf_D = (alpha * activation_D).requires_grad_()
            with hooked([(site, "after", partial(_replace_last, leaf_D))]):
                value = objective_values(_last_logits(model, input_ids_T), target, settings.objective).sum()
            gradients.append(torch.autograd.grad(value, leaf_D)[0])
            values.append(value.detach())
    num_layers, num_nodes = len(sites), len(path.alphas)
    return combine(
        torch.stack(gradients).reshape(num_layers, num_nodes, -1),
        torch.stack(values).reshape(num_layers, num_nodes),
        torch.stack(activations),
        unmodified,
        path,
        settings,
        target,
    )


def _replace_last(leaf_D: torch.Tensor, _module: nn.Module, _args: object, output_1TD: torch.Tensor) -> torch.Tensor:
    """Hook that puts `leaf_D` in place of the output at the last position."""
    return torch.cat([output_1TD[:, :-1], leaf_D.expand(1, 1, -1)], dim=1)


def _last_logits(model: nn.Module, input_ids_T: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=input_ids_T[None], use_cache=False).logits[:, -1]
    return logits
