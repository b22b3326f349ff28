"""Several processes at one training, started by `accelerate launch` or `torchrun`."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)


def num_launched() -> int:
    """How many processes a launcher started; 1 without one."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


def is_first_process() -> bool:
    """Whether this process does what is done once."""
    return num_launched() == 1 or os.environ.get("RANK", "0") == "0"


def process_device() -> str | None:
    """The device of this process, which joins the others; None for a process of its own."""
    if num_launched() == 1:
        if "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
            logger.warning(
                "accelerate launch started a single process: without several GPUs it starts more only with "
                "--multi_gpu (on a CPU too), or use torchrun"
            )
        return None
    from accelerate import PartialState

    return str(PartialState().device)
