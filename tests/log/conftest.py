from pathlib import Path

import numpy as np
import pytest

from loki.log.schema import LogHeader
from loki.log.writer import Batch, LogWriter

NUM_LAYERS, NUM_ROWS = 3, 5


def header_with(**changes) -> LogHeader:
    values = {
        "model": {"architecture": "llama-3x5x7", "weights": "00ff", "dtype": "float32"},
        "model_name": "tiny",
        "prompts": "probe 1234",
        "settings": {"rule": "riemann_left", "steps": 7},
        "num_layers": NUM_LAYERS,
        "num_rows": NUM_ROWS,
    }
    return LogHeader(**(values | changes))


class Scores:
    """Random content of a whole log, cut into batches on request."""

    def __init__(self, num_prompts: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.prompt_ids = [f"prompt/{i}é" for i in range(num_prompts)]
        self.scores_NLD = rng.normal(size=(num_prompts, NUM_LAYERS, NUM_ROWS)).astype(np.float32)
        self.target_ids_N = rng.integers(0, 2**40, num_prompts)
        self.num_tokens_N = rng.integers(1, 500, num_prompts)
        self.completeness_gaps_NL = rng.normal(size=(num_prompts, NUM_LAYERS)).astype(np.float32)
        self.completeness_gaps_NL[0, 0] = np.nan  # not known there

    def batch(self, prompts: slice) -> Batch:
        return Batch(
            self.scores_NLD[prompts],
            self.target_ids_N[prompts],
            self.num_tokens_N[prompts],
            self.completeness_gaps_NL[prompts],
        )

    def writer(self, path: Path, *, batch_size: int = 2, **changes) -> LogWriter:
        return LogWriter(path, header_with(**changes), self.prompt_ids, batch_size)

    def write_missing(self, writer: LogWriter) -> list[int]:
        missing = writer.missing_batches()
        for index in missing:
            writer.write_batch(index, self.batch(writer.batch_slice(index)))
        return missing


@pytest.fixture(scope="session")
def make_scores():
    return Scores


@pytest.fixture(scope="session")
def make_header():
    return header_with
