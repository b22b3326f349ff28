"""How the selected rows are trained."""

from __future__ import annotations

from dataclasses import dataclass

from loki.errors import InputError


@dataclass(frozen=True)
class TrainSettings:
    """How the rows are trained: AdamW, cosine schedule."""

    learning_rate: float
    steps: int
    """Optimiser steps."""
    batch_size: int = 4
    """Examples per device and step, before accumulation."""
    accumulate: int = 1
    """Batches per optimiser step."""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_length: int | None = 2048
    """Longer examples are cut, in tokens."""
    save_every: int = 50
    """Steps between checkpoints; an interrupted run goes on from the last one."""
    log_every: int = 5
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise InputError(f"learning rate {self.learning_rate} is not possible: give one above 0")
        for name in ("steps", "batch_size", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name.replace('_', ' ')} {getattr(self, name)} is not possible: give 1 or more")
