"""Trainer callbacks: training progress for whoever started it, checkpoints by the clock, and the way to reporters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loki.progress import Track

if TYPE_CHECKING:
    from transformers import Trainer

Row = dict[str, float]
"""Figures by name, with the `step` that they belong to."""


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


class SaveInTime(TrainerCallback):
    """Has a trainer leave a checkpoint when `seconds` have passed since it began or left the last one.

    It waits for a step that is logged: a trainer that goes on has lost the losses that were not. None is left after
    the last step: the training is over then.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._since = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start."""
        self._since = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint where it is time."""
        is_time = time.monotonic() - self._since >= self.seconds
        if is_time and control.should_log and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start anew."""
        self._since = time.monotonic()


def reporters_of(trainer: Trainer, prefix: str) -> Callable[[Row], None]:
    """What sends a row to the trainer's reporters (TensorBoard, Weights & Biases, …) as `<prefix>/<name>`."""

    def send(row: Row) -> None:
        logs = {f"{prefix}/{name}": value for name, value in row.items() if name != "step"}
        for callback in trainer.callback_handler.callbacks:
            if type(callback).__module__.startswith("transformers.integrations"):
                callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(logs), model=trainer.model)

    return send
