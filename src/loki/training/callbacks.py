"""Trainer callbacks: training progress for whoever started it, and the way to a trainer's reporters."""

from __future__ import annotations

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


def reporters_of(trainer: Trainer, prefix: str) -> Callable[[Row], None]:
    """What sends a row to the trainer's reporters (TensorBoard, Weights & Biases, …) as `<prefix>/<name>`."""

    def send(row: Row) -> None:
        logs = {f"{prefix}/{name}": value for name, value in row.items() if name != "step"}
        for callback in trainer.callback_handler.callbacks:
            if type(callback).__module__.startswith("transformers.integrations"):
                callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(logs), model=trainer.model)

    return send
