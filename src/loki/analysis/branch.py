"""KVA from one prefill and one small forward and backward pass (design, section 2).

Attention is causal and only the last position T is touched, so keys and values of positions 1…T-1 are the
same in every evaluation. Each pair (layer, node) becomes one *branch*: a row at position T that sees the
cached prefix and itself. It departs at its own layer, from the input that the unmodified model has there, with
the site's output scaled by the node's α, and goes on to the logits. Branches do not see each other, so one
backward pass of the sum of their objectives gives each its own gradient. A node at α = 1 changes nothing: one
row from the first layer on, the *trunk*, serves it for all layers.

The model's own forward pass carries the branches: hooks let them in at each layer and scale them at its site.

Shapes: N prompts, T positions, B branches under way, L layers, M nodes, D rows of the projection, V tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from loki.analysis.attention import attention_for_branches, takes_branch_attention
from loki.analysis.hooks import Hook, hooked
from loki.analysis.masks import BranchMasks
from loki.analysis.objective import objective_gradient
from loki.analysis.path import Path, PromptAttribution, combine
from loki.analysis.prefill import PaddedPrompts, UnsupportedByBranchError, prefill
from loki.analysis.settings import KVASettings


def attribute_batch(
    model: nn.Module,
    prompts: PaddedPrompts,
    layers: Sequence[nn.Module],
    sites: Sequence[nn.Module],
    path: Path,
    settings: KVASettings,
    target_ids: Sequence[int | None],
    max_branches: int,
) -> list[PromptAttribution]:
    """Attribution of a batch of prompts; parameters of `model` must be frozen.

    At most `max_branches` branches, over all prompts of the batch together, are under way at once (but one a
    prompt); memory grows with them, and the scores do not depend on them.

    Raises:
        UnsupportedByBranchError: not plain causal attention with a plain key-value cache.
    """
    prefix = prefill(model, prompts, len(layers))
    num_prompts = len(prompts.ids_NT)
    trunk = Trunk()
    found: _Gathered | None = None
    with attention_for_branches(model):
        for group in group_branches(len(layers), path.alphas, max(1, max_branches // num_prompts)):
            logits_NBV, leaves = _carry(model, prompts, prefix, trunk, group, layers, sites, path.alphas)
            logits_NBV = logits_NBV.reshape(num_prompts, group.num_branches, -1)  # GPT-2 folds branches into prompts
            if found is None:
                found = _Gathered.of(logits_NBV[:, 0], trunk, target_ids, len(path.alphas), settings)
            found.add(logits_NBV, leaves, settings)
    assert found is not None
    return [
        combine(
            found.gradients_NLMD[n],
            found.values_NLM[n],
            torch.stack([activation_ND[n].cpu() for activation_ND in trunk.activations]),
            float(found.unmodified_N[n]),
            path,
            settings,
            int(found.targets_N[n]),
        )
        for n in range(num_prompts)
    ]


@dataclass(frozen=True)
class Group:
    """Branches that go through the model together; those of an earlier layer stand first."""

    nodes: Mapping[int, tuple[int, ...]]
    """The nodes whose branches depart at each layer, in the order of layers."""
    has_trunk: bool = False
    """Whether the trunk is the first row."""
    trunk_nodes: tuple[int, ...] = ()
    """Nodes at α = 1, which the trunk serves."""

    @property
    def num_branches(self) -> int:
        """Rows at the end of the model."""
        return self.has_trunk + sum(len(nodes) for nodes in self.nodes.values())

    @property
    def first_layer(self) -> int:
        """Where the first row departs."""
        return 0 if self.has_trunk else min(self.nodes)

    def departing(self, layer: int) -> slice:
        """The rows that depart at a layer; at the end of its input, they come last."""
        start = self.has_trunk + sum(len(nodes) for at, nodes in self.nodes.items() if at < layer)
        return slice(start, start + len(self.nodes.get(layer, ())))


def group_branches(num_layers: int, alphas: Sequence[float], max_branches: int) -> list[Group]:
    """The trunk and all branches of one prompt in groups of at most `max_branches`, of consecutive layers."""
    trunk_nodes = tuple(node for node, alpha in enumerate(alphas) if alpha == 1)
    own_nodes = [node for node in range(len(alphas)) if node not in trunk_nodes]
    branches = [(layer, node) for layer in range(num_layers) for node in own_nodes]
    chunks = [branches[: max_branches - 1]]
    chunks += [branches[start : start + max_branches] for start in range(max_branches - 1, len(branches), max_branches)]
    nodes = [{layer: tuple(node for at, node in chunk if at == layer) for layer in dict(chunk)} for chunk in chunks]
    return [Group(nodes[0], has_trunk=True, trunk_nodes=trunk_nodes), *map(Group, nodes[1:])]


@dataclass(frozen=True)
class Trunk:
    """The unmodified model at position T, filled in layer by layer while the first group goes through it."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    """Each layer's input (N, 1, D)."""
    activations: list[torch.Tensor] = field(default_factory=list)
    """Each site's output z (N, D)."""


@dataclass(frozen=True)
class _Leaf:
    """A point of differentiation: the scaled outputs of one layer's branches, or the trunk's output there."""

    layer: int
    nodes: list[int]
    branches: slice
    value: torch.Tensor
    """(N, B, D), or (N, 1, D) for the trunk."""


@dataclass(frozen=True)
class _Gathered:
    """What the groups have brought so far."""

    targets_N: torch.Tensor  # noqa: N815
    unmodified_N: torch.Tensor  # noqa: N815
    """G of the trunk."""
    values_NLM: torch.Tensor  # noqa: N815
    gradients_NLMD: torch.Tensor  # noqa: N815

    @classmethod
    def of(
        cls,
        logits_NV: torch.Tensor,
        trunk: Trunk,
        target_ids: Sequence[int | None],
        num_nodes: int,
        settings: KVASettings,
    ) -> _Gathered:
        """Nothing yet; the trunk's logits say which tokens are predicted."""
        predicted = logits_NV.argmax(-1).tolist()
        targets_N = torch.tensor(
            [found if asked is None else asked for asked, found in zip(target_ids, predicted, strict=True)],
            device=logits_NV.device,
        )
        unmodified_N = objective_gradient(logits_NV[:, None], targets_N, settings.objective).values_NB[:, 0]
        shape = (len(targets_N), len(trunk.activations), num_nodes)
        return cls(targets_N, unmodified_N, torch.zeros(shape), torch.zeros(*shape, trunk.activations[0].shape[-1]))

    def add(self, logits_NBV: torch.Tensor, leaves: Sequence[_Leaf], settings: KVASettings) -> None:
        """Send a group's objectives back to its leaves."""
        if not leaves:
            return
        found = objective_gradient(logits_NBV, self.targets_N, settings.objective)
        gradients = torch.autograd.grad(logits_NBV, [leaf.value for leaf in leaves], found.direction_NBV)
        factor_NB, value_NB = found.factor_NB.cpu(), found.values_NB.cpu()
        for leaf, gradient_NBD in zip(leaves, gradients, strict=True):
            place = (slice(None), leaf.layer, leaf.nodes)
            wide_NBD = gradient_NBD.to("cpu", torch.promote_types(gradient_NBD.dtype, torch.float32))
            gradients_NBD = factor_NB[:, leaf.branches, None] * wide_NBD
            self.gradients_NLMD[place] = gradients_NBD.to(self.gradients_NLMD.dtype)
            self.values_NLM[place] = value_NB[:, leaf.branches].to(self.values_NLM.dtype)


def _carry(
    model: nn.Module,
    prompts: PaddedPrompts,
    prefix: DynamicCache,
    trunk: Trunk,
    group: Group,
    layers: Sequence[nn.Module],
    sites: Sequence[nn.Module],
    alphas: Sequence[float],
) -> tuple[torch.Tensor, list[_Leaf]]:
    """One forward pass with a group of branches: their logits and the points of differentiation."""
    leaves: list[_Leaf] = []
    masks = None
    if not takes_branch_attention(model):
        masks = BranchMasks(prompts.ids_NT.shape[1] - 1, group.num_branches)
    hooks: list[Hook] = []
    for layer in range(group.first_layer, len(layers)):
        hooks.append((layers[layer], "before", partial(_let_in, layer, group, trunk, masks)))
        if group.has_trunk or layer in group.nodes:
            hooks.append((sites[layer], "after", partial(_scale, layer, group, alphas, trunk, leaves)))
    with hooked(hooks):
        logits_NBV: torch.Tensor = model(
            input_ids=prompts.ids_NT[:, -1:],
            position_ids=prompts.position_ids_NT[:, -1:],
            attention_mask=prompts.mask_NT,
            past_key_values=prefix,
            use_cache=True,
        ).logits
    return logits_NBV, leaves


def _let_in(
    layer: int,
    group: Group,
    trunk: Trunk,
    masks: BranchMasks | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook before a layer: the branches under way, then those that depart here from the trunk's input."""
    call = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    if "hidden_states" not in call.arguments:
        raise UnsupportedByBranchError(f"{type(module).__name__} does not name its input hidden_states")
    hidden_NBD = call.arguments["hidden_states"]
    departing = group.departing(layer)
    if group.has_trunk:
        trunk.inputs.append(hidden_NBD[:, :1].detach().clone())
    entering_NBD = trunk.inputs[layer].to(hidden_NBD.device).expand(-1, departing.stop - departing.start, -1)
    # Before its first layer a group without the trunk is one row that nobody needs.
    arrived_NBD = hidden_NBD[:, : departing.start]
    hidden_NBD = torch.cat([arrived_NBD, entering_NBD], dim=1)
    call.arguments["hidden_states"] = hidden_NBD
    if masks is not None:
        masks.widen(call.arguments, hidden_NBD)
    return call.args[1:], call.kwargs


def _scale(
    layer: int,
    group: Group,
    alphas: Sequence[float],
    trunk: Trunk,
    leaves: list[_Leaf],
    _module: nn.Module,
    _args: object,
    output_NBD: torch.Tensor,
) -> torch.Tensor:
    """Hook after a site: α·z in place of the output of the branches that depart here."""
    departing, nodes = group.departing(layer), group.nodes.get(layer, ())
    if group.has_trunk:
        trunk.activations.append(output_NBD[:, 0].detach().clone())
    pieces = [output_NBD[:, : departing.start]]
    if group.trunk_nodes:
        # Adding zero changes nothing and makes the trunk's output a point of differentiation.
        zero_N1D = torch.zeros_like(output_NBD[:, :1], requires_grad=True)
        leaves.append(_Leaf(layer, list(group.trunk_nodes), slice(0, 1), zero_N1D))
        pieces = [output_NBD[:, :1] + zero_N1D, output_NBD[:, 1 : departing.start]]
    if nodes:
        # Scaled in float32 or wider: in bfloat16 the node 1/7 itself would be off by 0.1 %.
        wide = torch.promote_types(output_NBD.dtype, torch.float32)
        alphas_B1 = torch.tensor([alphas[node] for node in nodes], dtype=wide, device=output_NBD.device)[:, None]
        scaled_NBD = alphas_B1 * trunk.activations[layer].to(output_NBD.device, wide)[:, None]
        leaf_NBD = scaled_NBD.to(output_NBD.dtype).requires_grad_()
        leaves.append(_Leaf(layer, list(nodes), departing, leaf_NBD))
        pieces.append(leaf_NBD)
    return torch.cat(pieces, dim=1)
