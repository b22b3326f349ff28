"""A linear layer's product with the change of some rows in it: one product instead of two.

`y = x Wᵀ`, then `y[..., rows] += x Δᵀ` multiplies x with the chosen rows twice, and again in the backward pass.
`y = x (W + Δ)ᵀ` does not, but autograd would keep a changed copy of the weight for every layer. Here the copy
is made anew in the backward pass: that takes a few hundredths of the product's time, and no memory stays.

Shape suffixes: D rows of the layer (its outputs), F its inputs, K rows with a change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812


class ChangedRowsProduct(torch.autograd.Function):
    """Output (…, D) of x (…, F), a frozen weight (D, F) and bias (D,) or None, rows (K,) and their change (K, F)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_DF: torch.Tensor,
        bias_D: torch.Tensor | None,
        rows: torch.Tensor,
        delta_KF: torch.Tensor,
    ) -> torch.Tensor:
        """Make the changed weight, use it, and let it go."""
        ctx.save_for_backward(x, weight_DF, rows, delta_KF)
        return F.linear(x, weight_DF.index_add(0, rows, delta_KF), bias_D)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, the bias and the change; the weight is frozen."""
        (grad,) = grads
        x, weight_DF, rows, delta_KF = ctx.saved_tensors
        grad_x = grad_bias = grad_delta = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight_DF.index_add(0, rows, delta_KF)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        if ctx.needs_input_grad[4]:
            grad_rows = grad.index_select(-1, rows).reshape(-1, len(rows))
            grad_delta = grad_rows.T @ x.reshape(-1, x.shape[-1])
        return grad_x, None, grad_bias, None, grad_delta
