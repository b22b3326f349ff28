"""Steps of each row by the inverse root of its damage: rows whose change moves predictions much take shorter ones.

The damage d_j of a row (`docs/damage.md`) is the trace of its Fisher information: a random change Δ_j of its F weights
moves predictions by about ½ d_j ‖Δ_j‖² / F nats a token. Scaled by √(median d / d_j), steps that an optimiser makes of
like size damage alike in every row.

Shape suffixes: L layers, D rows, K chosen rows of a layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loki.architecture import family_of, model_type_of
from loki.choices import ModuleName
from loki.errors import InputError
from loki.implanting.stored_rows import layer_number
from loki.implanting.tuner.layer import LokiLayer
from loki.log.reader import AttributionLog
from loki.prompts.json_lines import user_path
from loki.provenance import ModelFingerprint, compare_models, digest
from loki.training.modes import require_unsharded

logger = logging.getLogger(__name__)

MOST = 4.0
"""No row's step is scaled by more, nor by less than its inverse."""
SCORES = ("damage", "fisher")
"""What a step may be scaled by."""


class RowRates(TrainerCallback):
    """Scales the steps of a LoKI adapter's rows while any Hugging Face `Trainer` trains it.

    `log` is an attribution log whose score is `damage` or `fisher` (`loki analyse --score damage`), of the model that
    is trained. Row j's step, whatever the optimiser made of it, is multiplied by √(median d / d_j), the median over
    all trained rows, and by a quarter at the least and 4 at the most; the step of its bias too.

    Raises:
        InputError: a log of another score.
        ArtefactError: a log that cannot be read.
    """

    def __init__(self, log: str | Path) -> None:
        path = user_path(str(log))
        with AttributionLog(path) as found:
            settings = {} if found.header is None else found.header.settings
            score = settings.get("score", "kva")
            if score not in SCORES:
                raise InputError(
                    f"row rates: {path} has scores of kind {score!r}: give a log of `loki analyse --score damage`"
                )
            self.mean_LD = found.mean_scores()
            self._made_with = {} if found.header is None else found.header.model
        self._site: ModuleName = settings.get("site_module", "down_proj")
        self._path = path
        self._steps: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._before: list[torch.Tensor] = []

    def as_dict(self) -> dict[str, Any]:
        """What decides the steps, as JSON."""
        return {"damage": digest(self.mean_LD.tolist())}

    def require_made_with(self, fingerprint: ModelFingerprint) -> None:
        """Make sure that the log is of this model; other weights of its architecture are worth a warning.

        Raises:
            ArtefactError: another architecture.
        """
        what = f"row rates: log {self._path}"
        if warning := compare_models(self._made_with, fingerprint, what=what, strict=False):
            logger.warning(warning)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the rows and their rates.

        Raises:
            InputError: a model without rows of its own to train, or of another shape; training in shards.
        """
        require_unsharded("row rates")
        model = kwargs["model"]
        changes = list(changes_with_scores(model, self.mean_LD))
        if not changes:
            raise InputError("row rates are for rows of a LoKI adapter, and this one has none: leave them out")
        path = family_of(model_type_of(model)).projection(self._site)
        for name, _, _ in changes:
            if not name.endswith(path):
                raise InputError(f"row rates: {self._path} scores rows of {path}, and the adapter changes {name}")
        damage = torch.cat([damage_K for _, _, damage_K in changes])
        self._steps = [
            (tensor, rates_of(damage_K, damage.median()).to(tensor).view(-1, *[1] * (tensor.dim() - 1)))
            for _, tensors, damage_K in changes
            for tensor in tensors
        ]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep where the rows are."""
        self._before = [tensor.detach().clone() for tensor, _ in self._steps]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shorten or lengthen the step that was taken."""
        for before, (tensor, rates) in zip(self._before, self._steps, strict=True):
            tensor.copy_(before + rates * (tensor - before))
        self._before = []


def rates_of(damage_K: torch.Tensor, median: torch.Tensor) -> torch.Tensor:
    """Factors (K,) of the steps of rows with these damages; a row without any takes the longest."""
    ratios_K = torch.where(damage_K > 0, median / damage_K, torch.inf)
    return ratios_K.sqrt().clamp(1 / MOST, MOST)


def changes_with_scores(
    model: nn.Module, mean_LD: np.ndarray
) -> Iterator[tuple[str, list[nn.Parameter], torch.Tensor]]:
    """A module's name, what is trained of its rows, (K, F) and perhaps biases (K,), and their scores (K,) float64.

    Raises:
        InputError: scores of another shape, or an adapter that trains a product in place of rows.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LokiLayer):
            continue
        layer, num_rows = layer_number(name), module.out_features
        if layer is None or layer >= len(mean_LD) or num_rows != mean_LD.shape[1]:
            raise InputError(
                f"row rates: the log has {len(mean_LD)} layers of {mean_LD.shape[1]} rows, and {name} of this model "
                f"has {num_rows}: analyse this model"
            )
        rows, active = module.loki_rows, cast("list[str]", module.active_adapters)
        for adapter in active:
            if adapter in module.loki_A:
                raise InputError("row rates scale rows, and LoKI* (--rank) trains a product: leave one of them out")
            if adapter in module.loki_delta:
                tensors = [group[adapter] for group in (module.loki_delta, module.loki_bias) if adapter in group]
                yield name, tensors, torch.from_numpy(mean_LD[layer])[rows[adapter].cpu()]
