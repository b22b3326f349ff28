"""Several processes at one analysis, started by `accelerate launch` or `torchrun`.

They meet only to wait for each other, which gloo does on every kind of machine: whatever computes the scores, the
processes may be as many as one likes, and one that waits leaves its device alone.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from loki.errors import InputError, LokiError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

MEETING = timedelta(minutes=10)
"""How long the first processes wait for the last one to start."""
PATIENCE = timedelta(days=7)
"""How long a process that has finished waits for the others."""
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells each process beside `WORLD_SIZE`."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int = 0
    num_ranks: int = 1
    device: str | None = None
    """The device of this process, one each while they last; None without a launcher."""
    group: ProcessGroup | None = field(default=None, repr=False, compare=False)
    """Where the processes wait for each other."""

    @classmethod
    def from_launcher(cls) -> Ranks:
        """Join the processes that a launcher started; a process of its own is alone.

        Raises:
            InputError: the environment speaks of several processes, but not as a launcher does.
        """
        size = os.environ.get("WORLD_SIZE") or "1"
        if size == "1":
            if "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
                logger.warning(
                    "accelerate launch started a single process: without several GPUs it starts more only with "
                    "--multi_gpu (on a CPU too), or use torchrun"
                )
            return cls()
        missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
        if missing or not size.isdecimal():
            raise InputError(
                f"the environment has WORLD_SIZE={size}"
                + (f" but no {', '.join(missing)}" if missing else "")
                + ": start several processes with accelerate launch or torchrun, or unset WORLD_SIZE"
            )
        from torch import distributed

        try:
            distributed.init_process_group("gloo", timeout=MEETING)
            group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            place, reason = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error).partition("\n")[0]
            raise InputError(
                f"the {size} processes cannot meet at {place} ({reason}): start them all, with accelerate launch or "
                "torchrun"
            ) from error
        device = _device(int(os.environ["LOCAL_RANK"]))
        return cls(distributed.get_rank(), distributed.get_world_size(), device, group)

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def wait_for_all(self) -> None:
        """Return when every process has come here.

        Raises:
            LokiError: one has ended before.
        """
        if self.num_ranks > 1:
            from torch import distributed

            try:
                distributed.barrier(self.group)
            except RuntimeError as error:
                raise LokiError(
                    "another process ended before its work was done: see what it said; the same command goes on "
                    "where this one stopped"
                ) from error

    def leave(self) -> None:
        """Part from the others, at the end."""
        if self.num_ranks > 1:
            from torch import distributed

            distributed.destroy_process_group()


def _device(local_rank: int) -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "cpu"
    return f"{accelerator.type}:{local_rank % torch.accelerator.device_count()}"
