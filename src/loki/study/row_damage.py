"""An anchor on trained rows by their damage. Tried in studies, where it did not help (docs/damage.md); in no command.

The damage of row j estimates the trace of its Fisher information, d_j = tr F_j, so that a change Δ_j of its F weights
that is no better directed than a random one moves predictions by about ½ d_j ‖Δ_j‖² / F nats a token.

Shape suffixes: L layers, D rows, K chosen rows of a layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loki.training.row_rates import changes_with_scores


class DamageAnchor(TrainerCallback):
    """Adds the gradient of weight · Σ_j ½ d_j ‖Δ_j‖² / F: elastic weight consolidation on rows.

    (Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3, with one number a row in place of one a weight.) Gradients
    are zero as a step begins, and the trainer adds its own.
    """

    def __init__(self, damage_LD: np.ndarray, weight: float) -> None:
        self.damage_LD, self.weight = damage_LD, weight

    @torch.no_grad()
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the anchor's gradient."""
        for _, (change, *_), damage_K in changes_with_scores(kwargs["model"], self.damage_LD):
            pull = self.weight * damage_K.to(change)[:, None] * change / change.shape[1]
            change.grad = pull if change.grad is None else change.grad + pull
