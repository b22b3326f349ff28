from collections.abc import Iterable
from pathlib import Path

import h5py
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

    def plan(self, batch_size: int, places: Iterable[int] | None = None) -> list[list[int]]:
        """Batches of prompts of like length, as a caller forms them: their places are far from consecutive."""
        places = range(len(self.prompt_ids)) if places is None else places
        by_length = sorted(places, key=lambda place: int(self.num_tokens_N[place]))
        return [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]

    def batch(self, places: list[int]) -> Batch:
        return Batch(
            self.scores_NLD[places],
            self.target_ids_N[places],
            self.num_tokens_N[places],
            self.completeness_gaps_NL[places],
        )

    def writer(self, path: Path, *, batch_size: int = 2, places: Iterable[int] | None = None, **changes) -> LogWriter:
        return LogWriter(path, header_with(**changes), self.prompt_ids, self.plan(batch_size, places))

    def write_missing(self, writer: LogWriter, **share) -> list[int]:
        missing = writer.missing_batches(**share)
        for index in missing:
            writer.write_batch(index, self.batch(writer.batches[index]))
        return missing

    def write_log(self, path: Path, **options) -> Path:
        writer = self.writer(path, **options)
        self.write_missing(writer)
        writer.finish()
        return path

    def write_shards(self, directory: Path, total: int, **options) -> list[Path]:
        """Every `total`-th prompt in one log."""
        return [
            self.write_log(
                directory / f"shard-{i}.h5",
                places=range(i - 1, len(self.prompt_ids), total),
                shard=f"{i}/{total}",
                **options,
            )
            for i in range(1, total + 1)
        ]


def datasets(path: Path) -> dict[str, tuple]:
    """All that plain h5py finds in a file: type, shape, chunks and bytes of every dataset, and the attributes."""
    with h5py.File(path) as file:
        found = {}
        for name, dataset in file.items():
            content = b"\0".join(dataset[:]) if dataset.dtype == object else dataset[:].tobytes()
            found[name] = (str(dataset.dtype), dataset.shape, dataset.chunks, content)
        return found | {f"attribute {name}": (value,) for name, value in file.attrs.items()}


@pytest.fixture(scope="session")
def make_scores():
    return Scores


@pytest.fixture(scope="session")
def make_header():
    return header_with


@pytest.fixture(scope="session")
def read_datasets():
    return datasets


@pytest.fixture
def scores():
    """Five prompts: at batch size 2 the last of three batches is short."""
    return Scores(5)
