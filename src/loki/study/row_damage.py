"""Training of rows that minds their damage: an anchor, and rates of their own. Tried in studies, in no command yet.

The damage of row j (`docs/damage.md`) estimates the trace of its Fisher information, d_j = tr F_j, so that a change Δ_j
of its F weights that is no better directed than a random one moves predictions by about ½ d_j ‖Δ_j‖² / F nats a token.

Shape suffixes: L layers, D rows, K chosen rows of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loki.implanting.stored_rows import layer_number
from loki.implanting.tuner.layer import LokiLayer
from loki.log.reader import AttributionLog

MOST = 4.0
"""No row's rate is more than so many times the median row's, nor less than its inverse."""


def mean_damage(log: Path) -> np.ndarray:
    """Mean over the texts of a log, (L, D) float64."""
    with AttributionLog(log) as scores:
        total_LD, count = np.zeros((scores.num_layers, scores.num_rows)), 0
        for chunk_NLD in scores.chunks():
            total_LD += chunk_NLD.sum(axis=0, dtype=np.float64)
            count += len(chunk_NLD)
    return total_LD / count


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
        for change, damage_K in _changes(kwargs["model"], self.damage_LD):
            pull = self.weight * damage_K.to(change)[:, None] * change / change.shape[1]
            change.grad = pull if change.grad is None else change.grad + pull


class DamageRates(TrainerCallback):
    """Scales each row's step by √(median d / d_j), so that all rows damage alike by a step of like size."""

    def __init__(self, damage_LD: np.ndarray) -> None:
        self.damage_LD = damage_LD
        self._before: list[torch.Tensor] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep where the rows are."""
        self._before = [change.detach().clone() for change, _ in _changes(kwargs["model"], self.damage_LD)]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shorten or lengthen the step that was taken."""
        found = list(_changes(kwargs["model"], self.damage_LD))
        median = torch.cat([damage_K for _, damage_K in found]).median()
        for before, (change, damage_K) in zip(self._before, found, strict=True):
            rates_K = (median / damage_K).sqrt().clamp(1 / MOST, MOST)
            change.copy_(before + rates_K.to(change)[:, None] * (change - before))


def _changes(model: nn.Module, damage_LD: np.ndarray) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Every layer's trained change (K, F) with the damage (K,) of its rows, float64."""
    for name, module in model.named_modules():
        if isinstance(module, LokiLayer):
            layer = layer_number(name)
            assert layer is not None, f"{name} is in no layer"
            for adapter, change in module.loki_delta.items():
                rows_K = module.loki_rows[adapter]
                yield change, torch.from_numpy(damage_LD[layer])[rows_K.cpu()]
