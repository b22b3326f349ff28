"""What a process keeps for work that does much the same again and again: freed memory, compiled kernels."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""
NEVER = 2**31 - 1
KERNELS_VARIABLE, NUM_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", 4096
"""oneDNN's own number is 1,024. One takes 0.4 MB in an attribution (mean of 1,642)."""


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


def keep_compiled_kernels() -> None:
    """Let oneDNN keep more of the kernels that it compiles for every shape of a product in reduced precision on a CPU.

    An attribution's shapes go with the layer and the prompt's length, several hundred a batch; prompts of one length
    come in a few batches. Call it before the first product; a number that the user has set stays.
    """
    os.environ.setdefault(KERNELS_VARIABLE, str(NUM_KERNELS))
