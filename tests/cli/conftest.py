"""The command line, run in this process."""

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

    def call(*arguments) -> Done:
        monkeypatch.setattr(sys, "argv", ["loki", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run()
        captured = capsys.readouterr()
        return Done(int(stop.value.code or 0), captured.out, captured.err)

    return call
