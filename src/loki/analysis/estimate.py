"""What an analysis will cost, from a few prompts that are timed."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from loki.analysis.run import Analysis

NUM_TIMED = 3
UNITS = ((9, "GB"), (6, "MB"), (3, "kB"))


@dataclass(frozen=True)
class Estimate:
    """Size and duration of an analysis."""

    num_prompts: int
    num_tokens: int
    log_bytes: int
    """Of the scores; names and lengths of prompts add little."""
    seconds: float
    """In this one process."""

    def __str__(self) -> str:
        hours, seconds = divmod(round(self.seconds), 3600)
        return (
            f"{self.num_prompts:,} prompts, {self.num_tokens:,} tokens, a log of {_size(self.log_bytes)}, about "
            f"{hours} h {seconds // 60:02} min {seconds % 60:02} s ({self.num_prompts / self.seconds:.2f} prompts/s)"
        )


def estimate(analysis: Analysis) -> Estimate:
    """Time batches of the shortest, the middle and the greatest length, after one to warm up."""
    batches = [batch for part in range(len(analysis.plan.parts)) for batch in analysis.plan.batches(part)]
    lengths = [len(tokens.ids_T) for tokens in analysis.encoded]
    columns = np.array([len(batch) * max(lengths[place] for place in batch) for batch in batches])
    order = np.argsort(columns, kind="stable")
    timed = sorted({int(order[round(at * (len(order) - 1) / (NUM_TIMED - 1))]) for at in range(NUM_TIMED)})
    analysis.attribute(batches[timed[0]])
    seconds = {}
    for index in timed:
        start = time.perf_counter()
        analysis.attribute(batches[index])
        seconds[int(columns[index])] = time.perf_counter() - start
    known = sorted(seconds)
    header = analysis.header
    return Estimate(
        num_prompts=analysis.num_prompts,
        num_tokens=sum(lengths[place] for batch in batches for place in batch),
        log_bytes=analysis.num_prompts * header.num_layers * header.num_rows * np.dtype(header.dtype).itemsize,
        seconds=float(np.interp(columns, known, [seconds[at] for at in known]).sum()),
    )


def _size(num_bytes: int) -> str:
    size, unit = next(((10**power, unit) for power, unit in UNITS if num_bytes >= 10**power), (1, "bytes"))
    return f"{num_bytes / size:,.1f} {unit}" if size > 1 else f"{num_bytes} {unit}"
