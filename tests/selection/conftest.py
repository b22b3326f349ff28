import h5py
import numpy as np
import pytest

from loki.log.schema import SCORES


@pytest.fixture
def write_log(tmp_path):
    """Writes scores (N, L, D) as a log of the public implementation: scores only."""

    def write(scores_NLD, name="scores.h5", dtype=np.float32):
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            file.create_dataset(SCORES, data=np.asarray(scores_NLD, dtype=dtype))
        return path

    return write
