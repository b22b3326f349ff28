"""Trainer callbacks: training progress for whoever started it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loki.progress import Track


class ShowProgress(TrainerCallback):
    """Takes one item of `track` for every optimiser step."""

    def __init__(self, track: Track) -> None:
        self.track = track
        self.steps: Iterator[int] = iter(())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start with the steps that are left."""
        self.steps = iter(self.track(range(state.global_step, state.max_steps), "training"))
        next(self.steps, None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance by one step."""
        next(self.steps, None)
