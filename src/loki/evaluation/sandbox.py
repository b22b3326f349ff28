"""Running a program that a model wrote: in a process of its own, with limits, and without a way out.

What is kept from the program: more than its time and memory, other processes, the network, writing files, native code
by ctypes, and the environment's variables. It can read files. That stops the accidents of a model that means no harm;
for anything else run the whole evaluation in a container or a virtual machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from loki.errors import InputError

TIMEOUT_SECONDS = 10.0
MEMORY_BYTES = 1 << 30
GUARD = Path(__file__).with_name("sandbox_guard.py")


def runs_to_its_end(program: str, *, timeout: float = TIMEOUT_SECONDS, memory: int = MEMORY_BYTES) -> bool:
    """Whether a Python program ends without an error, within its limits.

    A program that leaves early, even with exit code 0, has not run to its end. It sees the standard library only.

    Raises:
        InputError: this system cannot limit a process.
    """
    require_sandbox()
    token = secrets.token_hex(16)
    order = json.dumps({"program": program, "token": token, "seconds": int(timeout) + 1, "memory": memory})
    with tempfile.TemporaryDirectory(prefix="loki-sandbox-") as folder:
        # Isolated (-I), without installed packages (-S), with no variables of ours: the same answer everywhere.
        process = subprocess.Popen(  # noqa: S603  # our own interpreter and file
            [sys.executable, "-I", "-S", "-B", str(GUARD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            answer, _ = process.communicate(order.encode(), timeout=timeout)
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return answer == token.encode()


def require_sandbox() -> None:
    """Make sure that processes can be limited here.

    Raises:
        InputError: they cannot, as on Windows.
    """
    if importlib.util.find_spec("resource") is None:
        raise InputError("code can be run on Linux and macOS only: leave out humaneval here")
