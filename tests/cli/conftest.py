"""The command line, run in this process."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def loki(monkeypatch, capsys) -> Callable[..., Done]:
    """`loki("train", "--steps", 3)` gives exit code, standard output and standard error."""
    from loki.cli.main import run

    logger = logging.getLogger("loki")
    # The command sets them up for a process of its own.
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    monkeypatch.setattr(logger, "level", logger.level)

    def call(*arguments) -> Done:
        monkeypatch.setattr(sys, "argv", ["loki", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run()
        captured = capsys.readouterr()
        return Done(int(stop.value.code or 0), captured.out, captured.err)

    return call
