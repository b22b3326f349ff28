"""KL divergence between two predictions over the whole vocabulary, some positions at a time.

As in `loki.training.chunked_loss`, each piece's gradient is made right after its scores, so that the log-probabilities
of all positions are never there together.

Shape suffixes: T positions, D hidden size, V tokens of the vocabulary, X either of the two.
"""

from __future__ import annotations

from typing import Any

import torch

POSITIONS_AT_ONCE = 128


def chunked_divergence(
    base_TX: torch.Tensor, now_TX: torch.Tensor, head_VD: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over positions of KL(base ‖ now) in nats, float32, with the gradient of `now_TX` alone.

    Given are hidden states and the frozen head, or without a head the logits themselves. Products are taken in the
    dtype that comes in, all else in float32.
    """
    divergence: torch.Tensor = _ChunkedDivergence.apply(base_TX, now_TX, head_VD)  # type: ignore[no-untyped-call]  # torch has no types for it
    return divergence


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base_TX: torch.Tensor, now_TX: torch.Tensor, head_VD: torch.Tensor | None) -> torch.Tensor:
        """Divergence, and the gradient of what the model gives now: its probabilities minus the base's."""
        total = torch.zeros((), device=now_TX.device)
        grad_TX = torch.empty_like(now_TX)
        for start in range(0, len(now_TX), POSITIONS_AT_ONCE):
            piece = slice(start, start + POSITIONS_AT_ONCE)
            base_TV = _log_probabilities(base_TX[piece], head_VD)
            now_TV = _log_probabilities(now_TX[piece], head_VD)
            probabilities_TV = base_TV.exp()
            total += (probabilities_TV * base_TV.sub_(now_TV)).sum()
            grad_TV = now_TV.exp_().sub_(probabilities_TV)
            grad_TX[piece] = grad_TV if head_VD is None else grad_TV.to(head_VD.dtype) @ head_VD
        ctx.save_for_backward(grad_TX)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Only the model as it is now has one."""
        (grad_TX,) = ctx.saved_tensors
        return None, grad_TX * grads[0], None


def _log_probabilities(inputs_TX: torch.Tensor, head_VD: torch.Tensor | None) -> torch.Tensor:
    scores_TV = inputs_TX if head_VD is None else inputs_TX @ head_VD.T
    return scores_TV.float().log_softmax(-1)
