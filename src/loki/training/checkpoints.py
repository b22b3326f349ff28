"""Checkpoints of a training that may be interrupted: where they lie, whose they are, and which one is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from loki.errors import ArtefactError, OutputError
from loki.provenance import read_json, write_json

TORCH_WRITER = ("PytorchStreamWriter", "inline_container")
"""What torch's file writer says of itself in the RuntimeError by which it tells of a full disk."""
STATE_FILE = "trainer_state.json"


@contextmanager
def checkpoints_below(folder: Path) -> Iterator[None]:
    """A training that keeps its checkpoints there.

    Raises:
        OutputError: one cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in TORCH_WRITER):
            raise
        raise OutputError(f"cannot write a checkpoint below {folder}: {error}; make room and train on") from error


def last_whole_checkpoint(folder: Path, *, remove_torn: bool = True) -> Path | None:
    """The newest checkpoint that was written to its end; torn ones are removed.

    The Trainer writes its state file last, so a checkpoint without it, or with half of it, is torn.
    """
    newest_first = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in newest_first:
        try:
            json.loads((checkpoint / STATE_FILE).read_bytes())
        except (OSError, ValueError):
            if remove_torn:
                shutil.rmtree(checkpoint)
        else:
            return checkpoint
    return None


def open_unfinished(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder of a training's checkpoints; it may hold those of the same training, interrupted.

    Raises:
        ArtefactError: it holds those of another.
    """
    manifest = folder / "manifest.json"
    if not manifest.exists():
        write_json(manifest, identity)
    else:
        found = read_json(manifest, what="manifest of the unfinished training")
        changed = sorted(key for key in identity.keys() | found.keys() if found.get(key) != identity.get(key))
        if changed:
            raise ArtefactError(
                f"{folder} holds an unfinished training of other {', '.join(changed)}: "
                "train with the same ones to finish it, or remove that folder"
            )
