"""Cross-entropy over the vocabulary, some positions at a time: the logits of all of them are never there together.

With 49,152 tokens the logits of 1,024 positions take 200 MB in float32, their log-softmax as much again, and the
gradient of both the same. Here each piece's gradient is made right after its logits, while they are in the cache.

Shape suffixes: T positions, D hidden size, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

POSITIONS_AT_ONCE = 128


def chunked_loss(hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Sum of the targets' losses (in nats, float32), from hidden states, a frozen head and the right tokens.

    Products are taken in the dtype that comes in, all else in float32.
    """
    loss: torch.Tensor = _ChunkedLoss.apply(hidden_TD, head_VD, targets_T)  # type: ignore[no-untyped-call]  # torch has no types for it
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        """Loss and the gradient of the hidden states."""
        total = torch.zeros((), device=hidden_TD.device)
        grad_TD = torch.empty_like(hidden_TD)
        for start in range(0, len(hidden_TD), POSITIONS_AT_ONCE):
            piece = slice(start, start + POSITIONS_AT_ONCE)
            targets = targets_T[piece, None]
            scores_TV = (hidden_TD[piece] @ head_VD.T).float()
            log_total_T1 = scores_TV.logsumexp(-1, keepdim=True)
            total += (log_total_T1 - scores_TV.gather(-1, targets)).sum()
            grad_TV = scores_TV.sub_(log_total_T1).exp_()
            grad_TV.scatter_add_(-1, targets, grad_TV.new_full(targets.shape, -1))
            grad_TD[piece] = grad_TV.to(head_VD.dtype) @ head_VD
        ctx.save_for_backward(grad_TD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Only hidden states have one."""
        (grad_TD,) = ctx.saved_tensors
        return grad_TD * grads[0], None, None
