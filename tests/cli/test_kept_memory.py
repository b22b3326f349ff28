"""What a process keeps."""

import os

from loki.cli.kept_memory import KERNELS_VARIABLE, NUM_KERNELS, keep_compiled_kernels


def test_more_kernels_are_kept_unless_the_user_says_how_many(monkeypatch):
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    keep_compiled_kernels()
    assert os.environ.pop(KERNELS_VARIABLE) == str(NUM_KERNELS)
    monkeypatch.setenv(KERNELS_VARIABLE, "16")
    keep_compiled_kernels()
    assert os.environ[KERNELS_VARIABLE] == "16"
