"""Programs that a model wrote: what they may do, and that what they may not is a failure and nothing worse."""

import time

import pytest

from loki.errors import InputError
from loki.evaluation import sandbox
from loki.evaluation.sandbox import runs_to_its_end


@pytest.mark.parametrize(
    "program",
    [
        "x = 1",
        "import collections, functools, hashlib, heapq, itertools, math, random, re, string, typing",
        "print('x' * 10**6)",
        "assert __name__ == '__main__'",
        "import sys\nassert sys.stdin.read() == ''",
        "assert len(bytearray(200 * 1024 * 1024)) > 0",
    ],
)
def test_what_a_program_may_do(program):
    assert runs_to_its_end(program)


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "return",
        "raise BaseException",
        "import sys\nsys.exit(0)",
        "print('0' * 32)\nraise SystemExit",
        "import os\nos._exit(0)",
        "import os\nos.abort()",
        "def f():\n    return f()\nf()",
        "import numpy",
        "bytearray(4 * 1024**3)",
        "import socket\nsocket.socket()",
        "import socket\nsocket.getaddrinfo('localhost', 80)",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true')",
        "import os\nos.fork()",
        "import os\nos.kill(os.getppid(), 0)",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import ctypes\nctypes.CDLL(None)",
        "open('file', 'w')",
        "import os\nos.open('file', os.O_CREAT | os.O_WRONLY)",
        "import os\nos.mkdir('folder')",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (9, 9))",
    ],
)
def test_what_a_program_may_not_do(program):
    assert not runs_to_its_end(program)


@pytest.mark.parametrize("program", ["while True:\n    pass", "import time\ntime.sleep(60)"])
def test_a_program_that_does_not_end(program):
    start = time.monotonic()
    assert not runs_to_its_end(program, timeout=1)
    assert time.monotonic() - start < 10


def test_a_program_sees_nothing_of_ours(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert runs_to_its_end("import os\nassert 'SECRET' not in os.environ and 'HOME' not in os.environ")
    assert runs_to_its_end(f"import os, sys\nassert {str(tmp_path)!r} not in (os.getcwd(), *sys.path)")
    assert runs_to_its_end("import os\nassert os.listdir('.') == []")
    assert not any(tmp_path.iterdir())


def test_systems_that_cannot_limit_a_process(monkeypatch):
    monkeypatch.setattr(sandbox.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="code can be run on Linux and macOS only: leave out humaneval here"):
        runs_to_its_end("x = 1")
