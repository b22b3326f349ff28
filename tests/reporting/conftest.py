"""A small invented log with subjects, positions selected from it, and what a report shows of them."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from loki.log import schema
from loki.log.assembly import write_header
from loki.log.schema import LogHeader
from loki.reporting.reading import read_log
from loki.selection.run import select_to_file

SUBJECTS = ("anatomy", "astronomy", "virology")
SHAPE = (60, 3, 40)


def make_scores(shape=SHAPE, seed=0):
    """Skewed scores of unequal rows; row 7 of layer 1 is large in the third subject only."""
    rng = np.random.default_rng(seed)
    scale_LD = np.exp(rng.normal(size=shape[1:])) * np.linspace(0.5, 2, shape[1])[:, None] * 1e-3
    scores_NLD = (rng.normal(size=shape) * scale_LD + rng.normal(size=shape[1:]) * scale_LD).astype(np.float32)
    if shape[1] > 1 and shape[2] > 7:
        scores_NLD[2 :: len(SUBJECTS), 1, 7] *= 60
    return scores_NLD


def write_log_file(path: Path, scores_NLD, prompt_ids=None, *, header=True, settings=None) -> Path:
    num_prompts, num_layers, num_rows = scores_NLD.shape
    ids = prompt_ids or [f"{SUBJECTS[n % len(SUBJECTS)]}/test/{n}" for n in range(num_prompts)]
    with h5py.File(path, "w") as file:
        file.create_dataset(schema.SCORES, data=scores_NLD.astype(np.float32))
        if header:
            file.create_dataset(schema.PROMPT_IDS, data=ids, dtype=h5py.string_dtype())
            file[schema.PROMPT_INDEX] = np.arange(num_prompts)
            model = {"architecture": f"llama-{num_layers}x{num_rows}x64"}
            settings = settings or {"rule": "riemann_left", "steps": 7}
            write_header(
                file,
                LogHeader(model, "Tiny (invented)", "made up", settings, num_layers, num_rows, num_prompts=num_prompts),
            )
    return path


def make_damage_log(path: Path, score: str, **settings) -> Path:
    """A log of scores that are never negative, of texts cut into windows."""
    ids = [f"{SUBJECTS[n % len(SUBJECTS)]}/test/{n // 6}#{n % 2 + 1}" for n in range(SHAPE[0])]
    settings = {"score": score, "max_tokens": 512, "site_module": "down_proj", **settings}
    return write_log_file(path, np.abs(make_scores()), ids, settings=settings)


@pytest.fixture
def write_damage_log():
    return make_damage_log


@pytest.fixture
def scores_NLD():  # noqa: N802
    return make_scores()


@pytest.fixture
def write_log():
    return write_log_file


def make_log_in(directory: Path, **options):
    log = write_log_file(directory / "kva.h5", make_scores(), **options)
    paths = [directory / "10.json", directory / "25.json"]
    for path in paths:
        select_to_file(log, path, quota=path.stem)
    return log, paths


@pytest.fixture
def make_log(tmp_path):
    """A log and positions of two quotas, selected from it."""
    return lambda **options: make_log_in(tmp_path, **options)


@pytest.fixture(scope="session")
def reading(tmp_path_factory):
    """What such a log and positions say."""
    return read_log(*make_log_in(tmp_path_factory.mktemp("log")))
