"""A forgetting budget: training stops, or slows down, when the model has moved too far from its base.

Forgetting is watched on a text of the user's: the rise of its per-token loss, the measure of PEFT's own comparison of
methods, and the KL divergence of its predictions from the base's, which also sees what the loss averages away.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loki.errors import InputError
from loki.evaluation.knowledge import score_questions
from loki.evaluation.statistics import share
from loki.prompts.questions import Question, load_probe
from loki.provenance import digest
from loki.training.callbacks import Row, reporters_of
from loki.training.modes import adapter_disabled, device_of, has_adapter, measuring, require_own_base
from loki.training.texts import BUILT_IN, read_texts, token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

logger = logging.getLogger(__name__)

ActionName = Literal["stop", "lower"]
ROWS_AT_ONCE = 128
"""Positions whose whole distributions are in memory in float32 at one time."""
FIELDS = ("step", "loss_rise", "kl", "probe_accuracy", "probe_standard_error")
"""What one row of the history may hold."""


@dataclass(frozen=True)
class Movement:
    """How far a model is from its base on a text."""

    loss_rise: float
    """Mean negative log-likelihood of the text's tokens, minus the base's: nats per token."""
    kl: float
    """Mean over the same tokens of KL(base ‖ model): nats per token."""
    num_tokens: int


class ForgettingBudget(TrainerCallback):
    """Watches what a model forgets while any Hugging Face `Trainer` trains it, and acts when the budget is spent.

    `text` is `probe` (the evaluation half of the built-in questions with their right answers), a text file in UTF-8,
    a JSON Lines file whose rows have `text`, or a list of texts. Of these the first `max_tokens` tokens are read, in
    windows of `window`; special tokens are as the tokenizer sets them.

    Every `every` optimiser steps, before the first and after the last, a row of `step`, `loss_rise`, `kl` and, unless
    `probe_accuracy` is off, `probe_accuracy` and `probe_standard_error` (percent, over the evaluation half of the
    built-in questions) is added to `history` and to the trainer's `log_history`; `report_through(trainer)` sends it to
    the trainer's reporters too, and `report` to a function of one's own. When `loss_rise` is above `max_loss_rise`, or
    `kl` above `max_kl`, `action` says what to do: `stop` ends the training after this step, `lower` multiplies the
    learning rate by `factor`, now and at every later measurement that finds the budget spent. None is no limit.

    The base is the model itself with its adapter disabled. A model without an adapter, trained as a whole, is its
    own base when the trainer is made; its log-probabilities are kept in float16 in main memory, 2·V bytes a token.
    Normalised again in float32, they put less than about 1e-6 nats and 0.5 % between the KL found and the true one.
    Measuring draws no random numbers: it does not change what is learned. The history survives an interruption, with
    the checkpoint's `log_history`.

    Raises:
        InputError: limits, numbers or texts that are not possible.
    """

    def __init__(
        self,
        text: str | Path | Sequence[str] = BUILT_IN,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_loss_rise: float | None = None,
        max_kl: float | None = None,
        every: int = 20,
        action: ActionName = "stop",
        factor: float = 0.5,
        probe_accuracy: bool = True,
        max_tokens: int = 2048,
        window: int = 512,
        report: Callable[[Row], None] | None = None,
    ) -> None:
        for name, limit in (("max loss rise", max_loss_rise), ("max KL", max_kl)):
            if limit is not None and not 0 < limit < math.inf:
                raise InputError(
                    f"budget: {name} {limit} is not possible: give nats per token above 0, or leave it out"
                )
        for name, count, least in (("every", every, 1), ("max tokens", max_tokens, 1), ("window", window, 2)):
            if count < least:
                raise InputError(f"budget: {name} {count} is not possible: give {least} or more")
        if action not in ("stop", "lower"):
            raise InputError(f"budget: action {action!r} is unknown: give 'stop' or 'lower'")
        if not 0 < factor < 1:
            raise InputError(f"budget: factor {factor} is not possible: give one between 0 and 1")
        self.texts = read_texts(text, what="budget")
        self.questions: list[Question] = load_probe("evaluation") if probe_accuracy else []
        self.max_loss_rise, self.max_kl = max_loss_rise, max_kl
        self.every, self.action, self.factor = every, action, factor
        self.max_tokens, self.window = max_tokens, window
        self.report = report
        self.tokenizer = tokenizer
        self.history: list[Row] = []
        """One row a measurement; see the class."""
        self._windows: list[torch.Tensor] = []
        self._base: list[torch.Tensor] | None = None

    def as_dict(self) -> dict[str, Any]:
        """What decides the figures and the action, as JSON."""
        names = ("max_loss_rise", "max_kl", "every", "action", "factor", "max_tokens", "window")
        return {
            "texts": digest(self.texts),
            "num_questions": len(self.questions),
            **{name: getattr(self, name) for name in names},
        }

    def report_through(self, trainer: Trainer) -> None:
        """Send every row to the trainer's reporters (TensorBoard, Weights & Biases, …) as `forgetting/<name>`."""
        self.report = reporters_of(trainer, "forgetting")

    def spent(self, row: Mapping[str, float]) -> bool:
        """Whether a row of the history is above a limit."""
        limits = (("loss_rise", self.max_loss_rise), ("kl", self.max_kl))
        # A measure that is not a number is no sign of health.
        return any(limit is not None and not row[name] <= limit for name, limit in limits)

    def has_stopped(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a training with this log history was ended by this budget."""
        rows = [row for row in self.rows_of(history) if row["step"] > 0]
        return self.action == "stop" and any(self.spent(row) for row in rows)

    @staticmethod
    def rows_of(log_history: Sequence[Mapping[str, Any]]) -> list[Row]:
        """The measurements among the rows that a trainer logged."""
        rows = [row for row in log_history if "loss_rise" in row]
        return [{name: row[name] for name in FIELDS if name in row} for row in rows]

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the predictions of a model that is trained as a whole, while it still is its own base."""
        self._prepare(args, **kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the start, or take up the history of an interrupted training."""
        if not self._windows and state.global_step > 0 and not has_adapter(kwargs["model"]):
            raise InputError(
                "the forgetting budget needs the base's predictions, and this training goes on from a checkpoint: "
                "pass the budget in Trainer(callbacks=[…])"
            )
        self._prepare(args, **kwargs)
        self.history = self.rows_of(state.log_history)
        if not self.history:
            self._record(args, state, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure where it is time, and act where the budget is spent."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        row = self._record(args, state, kwargs["model"])
        if not self.spent(row):
            return
        if self.action == "stop":
            control.should_training_stop = True
            done = "training stops"
        elif state.global_step < state.max_steps:
            lower_learning_rate(kwargs["optimizer"], kwargs["lr_scheduler"], self.factor)
            done = f"the learning rate is multiplied by {self.factor}"
        else:
            done = "and training is at its end"
        if state.is_world_process_zero:
            logger.info(f"step {state.global_step}: the forgetting budget is spent, {done}")

    def _measure(self, model: PreTrainedModel) -> Row:
        moved = self._movement(model)
        row: Row = {"loss_rise": moved.loss_rise, "kl": moved.kl}
        if self.questions:
            assert self.tokenizer is not None
            scores, _ = score_questions(model, self.tokenizer, self.questions)
            accuracy = share([score.right for score in scores])
            assert accuracy.standard_error is not None
            row |= {"probe_accuracy": accuracy.value, "probe_standard_error": accuracy.standard_error}
        return row

    def _prepare(
        self, args: TrainingArguments, model: PreTrainedModel, processing_class: Any = None, **_others: Any
    ) -> None:
        if self._windows:
            return
        self.tokenizer = self.tokenizer or processing_class
        if self.tokenizer is None:
            raise InputError("the forgetting budget needs a tokenizer: pass it as tokenizer=…, or to the Trainer")
        self._windows = token_windows(
            self.tokenizer, self.texts, max_tokens=self.max_tokens, window=self.window, what="budget"
        )
        require_own_base(model, "the forgetting budget")
        if not has_adapter(model):
            with measuring(model, args):
                self._base = [_log_probabilities(model, ids_T).half().cpu() for ids_T in self._windows]

    def _record(self, args: TrainingArguments, state: TrainerState, model: PreTrainedModel) -> Row:
        with measuring(model, args):
            row = {"step": state.global_step, **self._measure(model)}
        self.history.append(row)
        state.log_history.append(dict(row))
        if self.report is not None:
            self.report(dict(row))
        if state.is_world_process_zero:
            accuracy = (
                f", probe accuracy {row['probe_accuracy']:.1f} ± {row['probe_standard_error']:.1f} %"
                if "probe_accuracy" in row
                else ""
            )
            logger.info(
                f"step {state.global_step}: per-token loss {row['loss_rise']:+.4f}, KL {row['kl']:.4f} nats{accuracy}"
            )
        return row

    def _movement(self, model: PreTrainedModel) -> Movement:
        loss_rise = divergence = 0.0
        num_tokens = 0
        for index, ids_T in enumerate(self._windows):
            now_TV = _log_probabilities(model, ids_T)
            if self._base is not None:
                base_TV = self._base[index].to(now_TV.device)
            else:
                with adapter_disabled(model):
                    base_TV = _log_probabilities(model, ids_T)
            targets_T = ids_T[1:].to(now_TV.device)
            for start in range(0, len(targets_T), ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                # Float16 that was kept no longer sums to 1; what comes from a model does, to its last digit.
                base = base_TV[rows].float()
                base = base if self._base is None else base.log_softmax(-1)
                now = now_TV[rows]
                chosen = targets_T[rows, None]
                loss_rise += float((base - now).gather(-1, chosen).sum(dtype=torch.float64))
                divergence += float((base.exp() * (base - now)).sum(dtype=torch.float64))
            num_tokens += len(targets_T)
        return Movement(loss_rise / num_tokens, divergence / num_tokens, num_tokens)


def lower_learning_rate(optimizer: Any, lr_scheduler: Any, factor: float) -> None:
    """Multiply the learning rate of this step and of all later ones.

    A scheduler of torch takes it from its `base_lrs`, or from the optimiser's groups; both are in checkpoints.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
        if "initial_lr" in group:
            group["initial_lr"] = group["initial_lr"] * factor
    scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        # What the trainer logs of the next step; there is no public way to set it.
        scheduler._last_lr = [rate * factor for rate in scheduler.get_last_lr()]


def _log_probabilities(model: PreTrainedModel, ids_T: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (T−1, V) in float32 of the tokens after the first."""
    logits_TV: torch.Tensor = model(input_ids=ids_T[None].to(device_of(model)), use_cache=False).logits[0, :-1]
    return logits_TV.float().log_softmax(-1)
