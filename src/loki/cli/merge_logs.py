"""`loki merge-logs`: the logs of shards into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.cli.options import ForceOption


def merge_logs(
    shards: Annotated[list[Path], typer.Argument(help="Attribution logs that `loki analyse --shard` wrote.")],
    output: Annotated[Path, typer.Option(help="Attribution log to write.")] = Path("kva.h5"),
    force: ForceOption = False,
) -> None:
    """Merge the logs of shards into the log that a single run would have written.

    Example: loki merge-logs kva-1.h5 kva-2.h5 --output kva.h5
    """
    from loki.cli.show import notes, track
    from loki.log.merge import merge_logs as run_merge

    num_prompts = run_merge(shards, output, force=force, track=track)
    notes.print(f"wrote {output}: {num_prompts:,} prompts from {len(shards)} log{'s' if len(shards) > 1 else ''}")
