"""KVA from one prefill and one small forward and backward pass (design, section 2).

Attention is causal and only the last position T is touched, so keys and values of positions 1…T-1 are the
same in every evaluation. Each pair (layer, node) becomes one *branch*: a copy of the last token at position T
that sees the cached prefix and itself, and whose output at its own layer's site is scaled by the node's α.
Branches do not see each other, so one backward pass of the sum of their objectives gives each its gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from loki.analysis.objective import objective_values
from loki.analysis.path import Path, PromptAttribution, combine
from loki.analysis.settings import KVASettings


class UnsupportedByBranchError(Exception):
    """This model cannot be attributed by branches; `recompute` can."""


def attribute_prompt(
    model: nn.Module,
    input_ids_T: torch.Tensor,
    sites: Sequence[nn.Module],
    path: Path,
    settings: KVASettings,
    target_id: int | None,
) -> PromptAttribution:
    """Attribution of one prompt without padding; parameters of `model` must be frozen.

    Raises:
        UnsupportedByBranchError: attention is not plain causal attention with a plain key-value cache.
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention not in ("eager", "sdpa"):
        raise UnsupportedByBranchError(f"attention {attention!r} takes no mask of ours (eager and sdpa do)")
    cache, activations_LD, logits_1V = _prefill(model, input_ids_T, sites)
    target = int(logits_1V.argmax()) if target_id is None else target_id
    unmodified = float(objective_values(logits_1V, target, settings.objective))

    num_layers, num_nodes = len(sites), len(path.alphas)
    num_branches, num_prefix = num_layers * num_nodes, len(input_ids_T) - 1
    alphas_M1 = torch.tensor(path.alphas, dtype=torch.float32, device=input_ids_T.device)[:, None]
    leaves: list[torch.Tensor] = []
    handles = [
        site.register_forward_hook(partial(_scale_own_branches, layer, alphas_M1, leaves))
        for layer, site in enumerate(sites)
    ]
    try:
        logits_BV = model(
            input_ids=input_ids_T[-1:].expand(1, num_branches),
            position_ids=torch.full((1, num_branches), num_prefix, device=input_ids_T.device),
            attention_mask=_branch_mask(num_prefix, num_branches, model),
            past_key_values=cache,
            use_cache=True,
        ).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    values_B = objective_values(logits_BV, target, settings.objective)
    gradients = torch.autograd.grad(values_B.sum(), leaves)
    return combine(
        torch.stack(gradients),
        values_B.detach().reshape(num_layers, num_nodes),
        activations_LD,
        unmodified,
        path,
        settings,
        target,
    )


def _prefill(
    model: nn.Module, input_ids_T: torch.Tensor, sites: Sequence[nn.Module]
) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
    """Run the whole prompt once: keys and values of 1…T-1, the sites' outputs at T (L, D), logits at T (1, V).

    All T positions are run, because position scaling may depend on the length of the prompt.
    """
    activations: list[torch.Tensor] = []
    handles = [
        site.register_forward_hook(lambda _m, _i, output: activations.append(output[0, -1].detach())) for site in sites
    ]
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    try:
        with torch.no_grad():
            output = model(input_ids=input_ids_T[None], use_cache=True, **options)
    finally:
        for handle in handles:
            handle.remove()
    cache = output.past_key_values
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise UnsupportedByBranchError("its cache is not a plain cache of all positions (sliding window or states)")
    cache.crop(-1)
    return cache, torch.stack(activations), output.logits[:, -1]


def _scale_own_branches(
    layer: int,
    alphas_M1: torch.Tensor,
    leaves: list[torch.Tensor],
    _module: nn.Module,
    _inputs: object,
    output_1BD: torch.Tensor,
) -> torch.Tensor:
    """Forward hook: scale the branches of this layer and make them the point of differentiation."""
    own = slice(layer * len(alphas_M1), (layer + 1) * len(alphas_M1))
    # Scaled in float32: in bfloat16 the node 1/7 itself would be off by 0.1 %.
    leaf_MD = (alphas_M1 * output_1BD[0, own].detach()).to(output_1BD.dtype).requires_grad_()
    leaves.append(leaf_MD)
    return torch.cat([output_1BD[:, : own.start], leaf_MD[None], output_1BD[:, own.stop :]], dim=1)


def _branch_mask(num_prefix: int, num_branches: int, model: nn.Module) -> torch.Tensor:
    """Additive mask (1, 1, B, T-1+B): a branch sees the prefix and itself."""
    parameter = next(model.parameters())
    lowest = torch.finfo(parameter.dtype).min
    mask = torch.full((num_branches, num_prefix + num_branches), lowest, dtype=parameter.dtype, device=parameter.device)
    mask[:, :num_prefix] = 0
    mask[:, num_prefix:].fill_diagonal_(0)
    return mask[None, None]
