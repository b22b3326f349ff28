"""The nodes at which an engine evaluates the gradient, and how node gradients become scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loki.analysis.quadrature import nodes_and_weights
from loki.analysis.settings import KVASettings


@dataclass(frozen=True)
class Path:
    """Evaluation points along α·z, the same for all layers."""

    alphas: tuple[float, ...]
    """Nodes (M,); one more at the end, of weight 0, when G(0) was asked for and no node stands at 0."""
    weights: tuple[float, ...]
    """Weights (M,)."""
    zero_index: int | None
    """Where α = 0 is among the nodes."""

    @classmethod
    def of(cls, settings: KVASettings, *, completeness: bool) -> Path:
        """The settings' rule, with G(0) added when `completeness` asks for it."""
        nodes, node_weights = nodes_and_weights(settings.rule, settings.steps)
        alphas, weights = [float(a) for a in nodes], [float(w) for w in node_weights]
        if completeness and 0.0 not in alphas:
            alphas.append(0.0)
            weights.append(0.0)
        return cls(tuple(alphas), tuple(weights), alphas.index(0.0) if 0.0 in alphas else None)


@dataclass(frozen=True)
class PromptAttribution:
    """What an engine returns for one prompt."""

    scores_LD: torch.Tensor  # noqa: N815
    """Attribution (L, D), float32 on the CPU."""
    target_id: int
    completeness_gap_L: torch.Tensor | None  # noqa: N815
    """Sum of scores minus [G(z) − G(0)] (L,), where G(0) is known and scores are multiplied by z."""


def combine(
    gradients_LMD: torch.Tensor,
    values_LM: torch.Tensor,
    activations_LD: torch.Tensor,
    unmodified_value: float,
    path: Path,
    settings: KVASettings,
    target_id: int,
) -> PromptAttribution:
    """Weighted sum of node gradients, times the activation where the settings say so (LoKI eq. 5)."""
    weights_M = torch.tensor(path.weights, dtype=torch.float32)
    scores_LD = torch.einsum("m,lmd->ld", weights_M, gradients_LMD.float().cpu())
    if settings.multiply_by_activation:
        scores_LD = scores_LD * activations_LD.float().cpu()
    gap_L = None
    if settings.multiply_by_activation and path.zero_index is not None:
        gap_L = scores_LD.sum(-1) - (unmodified_value - values_LM[:, path.zero_index].float().cpu())
    return PromptAttribution(scores_LD, target_id, gap_L)
