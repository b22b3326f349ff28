"""The objective G: how strongly the model still predicts the target token (LoKI eq. 4)."""

from __future__ import annotations

import torch

from loki.choices import Objective


def objective_values(logits_BV: torch.Tensor, target_id: int, objective: Objective) -> torch.Tensor:
    """G for each row of logits, (B,) float32; softmax and logarithm are taken in float32."""
    logits_BV = logits_BV.float()
    match objective:
        case "logit":
            return logits_BV[:, target_id]
        case "log_probability":
            return logits_BV.log_softmax(-1)[:, target_id]
        case "probability":
            return logits_BV.softmax(-1)[:, target_id]
