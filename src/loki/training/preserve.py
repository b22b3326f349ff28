"""An anchor on the user's own texts: the base's predictions there are kept while the model learns something else.

To a step's gradient is added that of `weight · KL(base ‖ model)`, the mean over the positions of some windows of the
texts, over the whole vocabulary. It is knowledge distillation from the model as it was (Li & Hoiem, Learning without
Forgetting, arXiv 1606.09282, with texts of the user's in place of the new task's inputs and without its temperature).

A callback does it as each step begins: gradients are zero then, and the trainer adds its own, whatever the number of
batches in a step, and clips the sum. With several processes each leaves its part where DDP adds up what it reduces.

Shape suffixes: N windows, T tokens, D hidden size, V vocabulary, X either of the last two, P positions of all windows.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loki.errors import InputError
from loki.heads import inputs_only, plain_head
from loki.provenance import digest
from loki.training.callbacks import Row, reporters_of
from loki.training.chunked_divergence import chunked_divergence
from loki.training.modes import (
    adapter_disabled,
    device_of,
    has_adapter,
    measuring,
    require_own_base,
    require_unsharded,
    training_precision,
)
from loki.training.texts import read_texts, token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer


class PreservePredictions(TrainerCallback):
    """Keeps the base's predictions on texts while any Hugging Face `Trainer` trains an adapter of any PEFT method.

    `text` is a text file in UTF-8, a JSON Lines file whose rows have `text`, a list of texts, or `probe` (the
    evaluation half of the built-in questions with their right answers). Of these the first `max_tokens` tokens are
    taken, in windows of `window`, each read on its own; special tokens are as the tokenizer sets them. Every `every`
    optimiser steps the gradient of `weight · every · KL(base ‖ model)` is added, in nats per token, over `batch_size`
    windows on each process: `every` changes what a training costs, and not how hard the anchor pulls in the mean.

    The base is the model itself with its adapter disabled, in evaluation mode; a model that is trained as a whole is
    refused. Which windows are read, and what dropout draws, follows from the trainer's seed and the step alone: the
    trainer's own random numbers are not touched, and a training that is resumed ends as one that was not interrupted.
    Every pass adds a row of `step`, `kl` (nats per token, before that step's update, over all processes) and `seconds`
    to `history`, and to the trainer's `log_history` as `preserve_kl` and `preserve_seconds`; `report_through(trainer)`
    sends it to the trainer's reporters too, and `report` to a function of one's own. The trainer's loss stays that of
    the task.

    Raises:
        InputError: numbers or texts that are not possible.
    """

    def __init__(
        self,
        text: str | Path | Sequence[str],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        weight: float = 1.0,
        every: int = 1,
        batch_size: int = 4,
        window: int = 128,
        max_tokens: int = 65_536,
        report: Callable[[Row], None] | None = None,
    ) -> None:
        if not 0 < weight < math.inf:
            raise InputError(f"preserve: weight {weight} is not possible: give a number above 0")
        for name, count, least in (
            *(("every", every, 1), ("batch size", batch_size, 1)),
            *(("window", window, 2), ("max tokens", max_tokens, 1)),
        ):
            if count < least:
                raise InputError(f"preserve: {name} {count} is not possible: give {least} or more")
        self.texts = read_texts(text, what="preserve")
        self.weight, self.every, self.batch_size = weight, every, batch_size
        self.window, self.max_tokens = window, max_tokens
        self.report = report
        self.history: list[Row] = []
        """One row a pass; see the class."""
        self._windows: list[torch.Tensor] = []
        self._row: Row | None = None
        self._began = 0.0
        self._num_steps = 0
        self._seconds_of_steps = self._seconds_of_passes = 0.0
        if tokenizer is not None:
            self.read_with(tokenizer)

    def as_dict(self) -> dict[str, Any]:
        """What decides the gradients, as JSON."""
        names = ("weight", "every", "batch_size", "window", "max_tokens")
        return {"texts": digest(self.texts), **{name: getattr(self, name) for name in names}}

    def read_with(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Cut the texts into windows; a trainer that has a tokenizer does it otherwise.

        Raises:
            InputError: no text has two tokens.
        """
        if not self._windows:
            self._windows = token_windows(
                tokenizer, self.texts, max_tokens=self.max_tokens, window=self.window, what="preserve"
            )

    def require_pass_within(self, num_steps: int) -> None:
        """Make sure that a training of as many steps reads the texts.

        Raises:
            InputError: it ends before the first pass.
        """
        if self.every > num_steps:
            raise InputError(
                f"preserve: every {self.every} is more than the {num_steps} steps of this training: "
                f"give {num_steps} or less"
            )

    def report_through(self, trainer: Trainer) -> None:
        """Send every row to the trainer's reporters (TensorBoard, Weights & Biases, …) as `preserve/<name>`."""
        self.report = reporters_of(trainer, "preserve")

    def record(self) -> dict[str, Any]:
        """Settings, cost and history of a training, as JSON.

        Seconds are means over the steps that this process took itself, with and without the passes; None for none.
        """
        passes = [{name: v if math.isfinite(v) else None for name, v in row.items()} for row in self.history]
        steps = self._num_steps or math.inf
        with_passes, without = (
            self._seconds_of_steps / steps,
            (self._seconds_of_steps - self._seconds_of_passes) / steps,
        )
        return {
            **self.as_dict(),
            "num_tokens": sum(map(len, self._windows)),
            "kl_first": passes[0]["kl"] if passes else None,
            "kl_last": passes[-1]["kl"] if passes else None,
            "seconds_per_step": with_passes or None,
            "seconds_per_step_without": without or None,
            "history": passes,
        }

    @staticmethod
    def rows_of(log_history: Sequence[Mapping[str, Any]]) -> list[Row]:
        """The passes among the rows that a trainer logged."""
        return [
            {"step": row["step"], "kl": row["preserve_kl"], "seconds": row["preserve_seconds"]}
            for row in log_history
            if "preserve_kl" in row
        ]

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse what cannot be trained so before the data is read."""
        self._prepare(**kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start, or take up the history of an interrupted training."""
        require_unsharded("preserve")
        self.require_pass_within(state.max_steps)
        self._prepare(**kwargs)
        self.history = self.rows_of(state.log_history)
        self._num_steps, self._seconds_of_steps, self._seconds_of_passes = 0, 0.0, 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the anchor's gradients where the trainer adds its own."""
        self._began = time.perf_counter()
        self._row = None
        step = state.global_step + 1
        if step % self.every == 0:
            kl = self._add_gradients(args, step // self.every - 1, **kwargs)
            self._row = {"step": step, "kl": kl, "seconds": time.perf_counter() - self._began}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell of the pass and count the step's time."""
        self._num_steps += 1
        self._seconds_of_steps += time.perf_counter() - self._began
        if (row := self._row) is None:
            return
        self._seconds_of_passes += row["seconds"]
        self.history.append(row)
        state.log_history.append({"step": row["step"], "preserve_kl": row["kl"], "preserve_seconds": row["seconds"]})
        if self.report is not None:
            self.report(dict(row))

    def _prepare(self, model: Any, processing_class: Any = None, **_others: Any) -> None:
        if not has_adapter(model):
            raise InputError(
                "preserve needs an adapter, because the base is the model with its adapter off: "
                "train an adapter of any PEFT method, or leave preserve out"
            )
        require_own_base(model, "preserve")
        if not getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            with adapter_disabled(model):
                trained = next((name for name, weight in model.named_parameters() if weight.requires_grad), None)
            if trained is not None:
                raise InputError(
                    f"preserve needs a base that stays as it is, and {trained} is trained outside of the adapter: "
                    "freeze it, or leave preserve out"
                )
        if not self._windows:
            if processing_class is None:
                raise InputError("preserve needs a tokenizer: pass it as tokenizer=…, or to the Trainer")
            self.read_with(processing_class)

    def _add_gradients(
        self, args: TrainingArguments, number: int, model: Any, optimizer: Any = None, **_others: Any
    ) -> float:
        """Add the gradients of a pass; return its KL, the mean over the positions of all processes."""
        chosen = self._chosen(args.seed, number, self.batch_size * args.world_size)
        mine = chosen[args.process_index :: args.world_size]
        num_positions = sum(len(self._windows[index]) for index in chosen)
        total = torch.zeros((), device=device_of(model))
        if mine:
            with _own_random_numbers(args.seed, number, args.process_index):
                divergence = self._divergence(model, args, [self._windows[index] for index in mine])
                # DDP divides the sum over processes by their number.
                loss = divergence * (self.weight * self.every * args.world_size / num_positions)
                # With float16 the trainer's own loss is scaled up, and the sum of both down again.
                scaler = getattr(optimizer, "scaler", None)
                (loss if scaler is None else scaler.scale(loss)).backward()
            total += divergence.detach()
        if args.world_size > 1:
            torch.distributed.all_reduce(total)
        return float(total) / num_positions

    def _chosen(self, seed: int, number: int, count: int) -> list[int]:
        """Windows of a pass: all are read once in an order of their own before any is read again."""
        num_windows = len(self._windows)
        count = min(count, num_windows)
        first = number * count
        rounds = range(first // num_windows, (first + count - 1) // num_windows + 1)
        order = np.concatenate([np.random.default_rng([seed, index]).permutation(num_windows) for index in rounds])
        start = first % num_windows
        return [int(index) for index in order[start : start + count]]

    def _divergence(self, model: Any, args: TrainingArguments, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sum over all positions of KL(base ‖ model)."""
        device = device_of(model)
        ids_NT = pad_sequence(list(windows), batch_first=True).to(device)
        lengths_N = torch.tensor([len(ids_T) for ids_T in windows], device=device)
        is_real_NT = torch.arange(ids_NT.shape[1], device=device) < lengths_N[:, None]
        head = plain_head(model)
        with measuring(model, args), adapter_disabled(model):
            base_PX = _predictions(model, head, ids_NT, is_real_NT)
        # As the trainer does before each batch; the first comes after this.
        model.train()
        with torch.enable_grad(), training_precision(model, args):
            now_PX = _predictions(model, head, ids_NT, is_real_NT)
        return chunked_divergence(base_PX, now_PX, None if head is None else head.weight)


def _predictions(model: Any, head: nn.Linear | None, ids_NT: torch.Tensor, is_real_NT: torch.Tensor) -> torch.Tensor:
    """Hidden states in front of a plain head, or logits, of the positions that are not padding."""
    with contextlib.ExitStack() as stack:
        inputs_of_head = None if head is None else stack.enter_context(inputs_only(head))
        logits_NTV = model(input_ids=ids_NT, attention_mask=is_real_NT.long(), use_cache=False).logits
    outputs_NTX: torch.Tensor = logits_NTV if inputs_of_head is None else inputs_of_head[0]
    # Prompt tuning puts tokens of its own before.
    return outputs_NTX[:, -ids_NT.shape[1] :][is_real_NT]


@contextlib.contextmanager
def _own_random_numbers(*key: int) -> Iterator[None]:
    """Random numbers of torch that follow from `key` alone; afterwards all generators are as before."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(seed))
        yield
