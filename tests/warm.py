"""`python -m loki` in processes of their own that need not import torch and transformers first.

Importing takes 5 seconds of processor time, most of what a process on a tiny model costs. A server that
`multiprocessing` keeps imports once and forks each process. What is started is the command line as a user gets it:
a process with its own id, environment, folder and files for what it writes, that signals end.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# Nothing here starts a thread with OMP_NUM_THREADS=1 (conftest.py), so that forking is safe.
IMPORTED = ["transformers.models.llama.modeling_llama", "loki.cli.main", "loki.analysis.run", "loki.training.sft"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(IMPORTED)


def _become(arguments: list[str], variables: dict[str, str], folder: str, written: list[str]) -> None:
    """In the new process: what a shell would have set, then the program."""
    for descriptor, path in enumerate(written, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    assert all(name in sys.modules for name in IMPORTED), "the server imported nothing"
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


class WarmProcess:
    """What `subprocess.Popen([sys.executable, *arguments])` gives, for `-m module …` or `script.py …`."""

    def __init__(self, *arguments: object, env: dict[str, str] | None = None, cwd: str | Path = "/") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="loki-warm-")
        self._written = [Path(self._folder.name) / name for name in ("out", "err")]
        variables = dict(os.environ if env is None else env)
        started = (list(map(str, arguments)), variables, str(cwd), list(map(str, self._written)))
        self._process = SERVER.Process(target=_become, args=started)
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a warm process", timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and standard error, after its end."""
        self.wait(timeout)
        out, err = (path.read_text() if path.exists() else "" for path in self._written)
        return out, err

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> "WarmProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.join()
        self._folder.cleanup()


class WarmRanks:
    """Several processes that find each other, without a launcher that would end one when another dies."""

    def __init__(
        self, num_processes: int, *arguments: object, env: dict[str, str] | None = None, cwd: str | Path = "/"
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        variables = dict(os.environ if env is None else env)
        variables |= {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.processes = [
            WarmProcess(*arguments, env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=cwd)
            for rank in range(num_processes)
        ]

    def poll(self) -> int | None:
        """0 once all have ended well, None while one is running."""
        codes = [process.poll() for process in self.processes]
        return None if None in codes else max(abs(code) for code in codes)

    returncode = property(poll)

    def outputs(self, timeout: float | None = None) -> list[tuple[str, str]]:
        """Standard output and standard error of each, after its end."""
        return [process.communicate(timeout) for process in self.processes]

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Those of all, one after the other."""
        outputs, errors = zip(*self.outputs(timeout), strict=True)
        return "".join(outputs), "".join(errors)

    def __enter__(self) -> "WarmRanks":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.__exit__(*error)
