"""What a training costs: seconds a step, and the peak of memory."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
STEP_SECONDS = "step_seconds"
RESET_PEAK = "5"
"""What proc(5) takes for: forget the peak of resident memory."""


class StepClock(TrainerCallback):
    """Times every optimiser step, in the trainer's log too, so that a training that goes on knows of those before."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what an interrupted training has timed."""
        self.seconds = [row[STEP_SECONDS] for row in state.log_history if STEP_SECONDS in row]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self._start)
        state.log_history.append({"step": state.global_step, STEP_SECONDS: self.seconds[-1]})

    @property
    def median(self) -> float | None:
        """Median over the steps, the first left out where there are more: it prepares what the others find."""
        return median(self.seconds[1:] or self.seconds) if self.seconds else None


def forget_peak_memory() -> None:
    """Let the peak of memory start from now, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text(RESET_PEAK)


def peak_memory_mib() -> float:
    """The peak of this process: of a GPU's memory where there is one, else of resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if STATUS.exists():
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
