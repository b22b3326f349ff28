"""The other side of `sandbox`: limits its own process, then runs the program that it is given. Run as a file.

It imports the standard library only, and everything that it needs before the limits hold.
"""

import contextlib
import json
import os
import resource
import sys
from typing import Any

REFUSED = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "shutil.",
    "tempfile.",
    "urllib.",
    "ftplib.",
    "smtplib.",
    "pty.",
    "webbrowser.",
    "signal.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.kill",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.chflags",
    "os.setxattr",
    "os.removexattr",
    "os.utime",
    "os.lockf",
    "resource.",
    "fcntl.",
    "mmap.",
    "sqlite3.",
)
"""Audit events (their beginnings) that end in an error: whatever reaches out of the process."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Read the order, run its program, and answer with its token if the program came to its end."""
    order = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    program, token = order["program"], order["token"].encode()
    _limit(order["seconds"], order["memory"])
    sys.addaudithook(_refuse)
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})  # noqa: S102  # what this file is for
    os.write(answer, token)


def _limit(seconds: int, memory: int) -> None:
    limits = {"CPU": seconds, "AS": memory, "FSIZE": 0, "CORE": 0, "NPROC": 0, "NOFILE": 64}
    for name, value in limits.items():
        # macOS has no limit of address space, and not every system knows every other.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        _path, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & WRITING):
            raise PermissionError("writing is not allowed here")
    elif event.startswith(REFUSED):
        raise PermissionError(f"{event} is not allowed here")


if __name__ == "__main__":
    main()
