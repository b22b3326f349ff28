"""The C library's allocator, set for work that takes and frees the same large blocks again and again."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Keep what is freed for the next prompt, instead of giving it back to the system each time.

    The system fills every page anew when it is asked for again; on a CPU that took a tenth of the time of an
    attribution. It is a setting of the whole process, so commands make it, the library does not. Where there is
    no glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)
