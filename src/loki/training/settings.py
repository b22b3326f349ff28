"""How the selected rows are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from loki.errors import InputError

AnswersName = Literal["auto", "all", "last"]
ReporterName = Literal["none", "tensorboard"]


@dataclass(frozen=True)
class TrainSettings:
    """How the rows are trained: AdamW, cosine schedule."""

    learning_rate: float
    """Peak learning rate at a quota of 10 %; see `scale_learning_rate`."""
    steps: int | None = None
    """Optimiser steps; this or `epochs`."""
    epochs: float | None = None
    """Passes over the examples, or with `packing` over the packs of them."""
    batch_size: int = 4
    """Examples, or with `packing` packs of them, per process and step, before accumulation."""
    accumulate: int = 1
    """Batches per optimiser step."""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_length: int | None = 2048
    """Longer examples are cut, in tokens; with `packing` also the length of a pack."""
    save_every: int = 50
    """Steps between checkpoints; an interrupted run goes on from the last one."""
    log_every: int = 5
    gradient_checkpointing: bool = False
    seed: int = 0
    scale_learning_rate: bool = True
    """Whether the peak is `learning_rate · (10 / quota)^0.83`, the paper's rule, or `learning_rate` itself."""
    rank: int = 0
    """0 trains the rows themselves, above 0 a change A·B of this rank (LoKI*)."""
    lora_alpha: float | None = None
    """With a rank, the change is (lora_alpha / rank)·A·B; 2·rank when None."""
    packing: bool = False
    """Whether several examples share one sequence, each attending to itself only."""
    answers: AnswersName = "auto"
    """Which of the assistant's turns in `messages` are learned: all, the last one, or all if the template can."""
    report_to: ReporterName = "none"
    """Where the figures go besides the record."""
    mixed_precision: bool = False
    """Whether products are taken in bfloat16 (autocast) while weights and change stay float32; for float32 models."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise InputError(f"learning rate {self.learning_rate} is not possible: give one above 0")
        if self.steps is None and self.epochs is None:
            raise InputError("steps is missing: give steps (of the optimiser), or epochs (passes over the examples)")
        if self.steps is not None and self.epochs is not None:
            raise InputError(f"steps {self.steps} and epochs {self.epochs:g} are both given: leave one of them out")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise InputError(f"epochs {self.epochs} is not possible: give a number above 0")
        for name in ("steps", "batch_size", "accumulate", "save_every", "log_every"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise InputError(f"{name.replace('_', ' ')} {count} is not possible: give 1 or more")
        for name in ("warmup_steps", "weight_decay", "rank"):
            if getattr(self, name) < 0:
                raise InputError(f"{name.replace('_', ' ')} {getattr(self, name)} is not possible: give 0 or more")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"max length {self.max_length} is not possible: give 2 tokens or more")
        if self.packing and self.max_length is None:
            raise InputError("packing needs a max length, that of a pack: give one, in tokens")
        if self.lora_alpha is not None and self.rank == 0:
            raise InputError(f"lora alpha {self.lora_alpha} needs a rank: give a rank above 0, or leave it out")
