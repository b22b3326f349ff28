"""The objective G: how strongly the model still predicts the target token (LoKI eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loki.choices import Objective


def objective_values(logits_BV: torch.Tensor, target_id: int, objective: Objective) -> torch.Tensor:
    """G for each row of logits, (B,) float64 on the CPU, differentiable.

    In float32 the gradient of a softmax holds 1 − p, which has lost most of its digits near p = 1.
    """
    logits_BV = logits_BV.to("cpu", torch.float64)
    match objective:
        case "logit":
            return logits_BV[:, target_id]
        case "log_probability":
            return logits_BV.log_softmax(-1)[:, target_id]
        case "probability":
            return logits_BV.softmax(-1)[:, target_id]


@dataclass(frozen=True)
class ObjectiveGradient:
    """G of many branches and its gradient with respect to their logits, which is `factor` times `direction`."""

    values_NB: torch.Tensor  # noqa: N815
    """G, float32 or wider."""
    direction_NBV: torch.Tensor  # noqa: N815
    """What is sent back through the model, in the logits' dtype."""
    factor_NB: torch.Tensor  # noqa: N815
    """What multiplies the gradients that arrive."""


def objective_gradient(logits_NBV: torch.Tensor, target_ids_N: torch.Tensor, objective: Objective) -> ObjectiveGradient:
    """`objective_values` and its gradient in closed form, in as few passes over the logits as there can be.

    Because ∇p = p·∇log p, the probability sends back the direction of its logarithm and is multiplied in at
    the end: nothing underflows, however small p is. 1 − p is the sum of all other probabilities, which keeps
    its digits near p = 1.
    """
    logits_NBV = logits_NBV.detach()
    targets_NB1 = target_ids_N[:, None, None].expand(-1, logits_NBV.shape[1], 1)
    if objective == "logit":
        values_NB = _widened(logits_NBV.gather(-1, targets_NB1).squeeze(-1))
        return ObjectiveGradient(
            values_NB, torch.zeros_like(logits_NBV).scatter_(-1, targets_NB1, 1), torch.ones_like(values_NB)
        )
    p_NBV = torch.softmax(logits_NBV, -1, dtype=_widened(logits_NBV[:0]).dtype)
    target_NB = p_NBV.gather(-1, targets_NB1).squeeze(-1)
    p_NBV.scatter_(-1, targets_NB1, 0)
    p_NBV.scatter_(-1, targets_NB1, -p_NBV.sum(-1, keepdim=True))
    direction_NBV = p_NBV.to(logits_NBV.dtype)
    if objective == "probability":
        return ObjectiveGradient(target_NB, direction_NBV, -target_NB)
    log_NB = _widened(logits_NBV.gather(-1, targets_NB1).squeeze(-1)) - logits_NBV.float().logsumexp(-1)
    return ObjectiveGradient(log_NB, direction_NBV, -torch.ones_like(target_NB))


def _widened(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
