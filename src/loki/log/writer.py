"""Writing an attribution log so that no fault can spoil what is done.

Each batch becomes a part file of its own in `<name>.parts/`, written aside and renamed, with its digest in
its name. The HDF5 file is assembled from the parts at the end. A run that stopped goes on behind the parts
that are whole; a run with other settings or prompts is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from loki.errors import ArtefactError, InputError
from loki.log import schema
from loki.log.schema import LogHeader
from loki.provenance import digest, new_file, read_json, require_writable_parent, write_bytes, write_json


@dataclass(frozen=True)
class Batch:
    """Scores of some consecutive prompts."""

    scores_NLD: np.ndarray  # noqa: N815
    """Attribution scores (N, L, D)."""
    target_ids_N: np.ndarray  # noqa: N815
    """Target tokens (N,), int64."""
    num_tokens_N: np.ndarray  # noqa: N815
    """Prompt lengths (N,), int64."""
    completeness_gaps_NL: np.ndarray  # noqa: N815
    """Completeness gaps (N, L), float32; NaN where not known."""


class LogWriter:
    """Collects batches of one log; `finish` makes the HDF5 file and removes the parts."""

    def __init__(self, path: Path, header: LogHeader, prompt_ids: Sequence[str], batch_size: int) -> None:
        """Open a new log or go on with an unfinished one.

        Raises:
            InputError: no prompts, or a batch size below 1.
            ArtefactError: an unfinished log of other settings, prompts or batch size stands there.
            OutputError: the folder cannot be written.
        """
        if not prompt_ids:
            raise InputError("there are no prompts to analyse: give at least one")
        if batch_size < 1:
            raise InputError(f"batch size {batch_size} is not possible: give 1 or more")
        self.path = path
        self.header = header
        self.prompt_ids = list(prompt_ids)
        self.batch_size = batch_size
        self.parts_directory = path.with_name(path.name + ".parts")
        self._manifest = {
            **header.identity(),
            "prompt_ids": digest(self.prompt_ids),
            "num_prompts": len(self.prompt_ids),
            "batch_size": batch_size,
        }
        manifest_path = self.parts_directory / "manifest.json"
        require_writable_parent(path)
        if manifest_path.exists():
            found = read_json(manifest_path, what="manifest of the unfinished log")
            if found != self._manifest:
                changed = sorted(key for key in self._manifest if found.get(key) != self._manifest[key])
                raise ArtefactError(
                    f"{self.parts_directory} holds an unfinished log of other {', '.join(changed)}: "
                    "run with the same settings to finish it, or remove that folder"
                )
        else:
            write_json(manifest_path, self._manifest)

    @property
    def num_batches(self) -> int:
        """Batches of the whole log."""
        return -(-len(self.prompt_ids) // self.batch_size)

    def missing_batches(self) -> list[int]:
        """Batches that have no whole part file yet."""
        return [index for index in range(self.num_batches) if self._read_part(index) is None]

    def batch_slice(self, index: int) -> slice:
        """Which prompts are in a batch; it depends on their order only, never on where a run stopped."""
        return slice(index * self.batch_size, min((index + 1) * self.batch_size, len(self.prompt_ids)))

    def write_batch(self, index: int, batch: Batch) -> None:
        """Keep the scores of one batch.

        Raises:
            InputError: a score is not finite, in the log's own dtype.
            ValueError: not as many prompts as the batch has.
            OutputError: the part cannot be written; parts written before stay whole.
        """
        prompts = self.batch_slice(index)
        if any(len(column) != prompts.stop - prompts.start for column in vars(batch).values()):
            raise ValueError(f"batch {index} has {prompts.stop - prompts.start} prompts, not {len(batch.scores_NLD)}")
        with np.errstate(over="ignore"):
            scores_NLD = np.ascontiguousarray(batch.scores_NLD, dtype=self.header.dtype)
        bad = ~np.isfinite(scores_NLD)
        if bad.any():
            n, layer, row = (int(i) for i in np.argwhere(bad)[0])
            raise InputError(
                f"attribution of prompt {self.prompt_ids[prompts.start + n]!r} is not finite at layer {layer}, "
                f"row {row}: the model's activations overflow in this dtype; use float32 or bfloat16"
            )
        content = save_tensors(
            {
                schema.SCORES: scores_NLD,
                schema.TARGET_IDS: batch.target_ids_N.astype(np.int64),
                schema.NUM_TOKENS: batch.num_tokens_N.astype(np.int64),
                schema.COMPLETENESS_GAPS: batch.completeness_gaps_NL.astype(np.float32),
            }
        )
        write_bytes(self._part_name(index, _checksum(content)), content)

    def finish(self) -> None:
        """Assemble the HDF5 file from all parts, put it in place, remove the parts.

        Raises:
            ArtefactError: a part is missing.
            OutputError: the file cannot be written; the parts stay.
        """
        missing = self.missing_batches()
        if missing:
            raise ArtefactError(
                f"{self.parts_directory} lacks {len(missing)} of {self.num_batches} batches: run the analysis again"
            )
        with new_file(self.path) as temporary:
            _require_room(temporary, self._expected_bytes())
            self._assemble(temporary)
        shutil.rmtree(self.parts_directory)

    def _expected_bytes(self) -> int:
        """More than the HDF5 file will take: scores, columns, the names of prompts, and HDF5's own tables."""
        header, num_prompts = self.header, len(self.prompt_ids)
        scores = np.dtype(header.dtype).itemsize * header.num_layers * header.num_rows
        names = sum(len(name.encode()) for name in self.prompt_ids)
        return num_prompts * (scores + 4 * header.num_layers + 256) + names + 2**18

    def _assemble(self, path: Path) -> None:
        num_prompts, header = len(self.prompt_ids), self.header
        with h5py.File(path, "w") as file:
            scores = file.create_dataset(
                schema.SCORES,
                shape=(num_prompts, header.num_layers, header.num_rows),
                dtype=header.dtype,
                chunks=(1, header.num_layers, header.num_rows),
            )
            columns = {
                schema.TARGET_IDS: file.create_dataset(schema.TARGET_IDS, shape=(num_prompts,), dtype="int64"),
                schema.NUM_TOKENS: file.create_dataset(schema.NUM_TOKENS, shape=(num_prompts,), dtype="int64"),
                schema.COMPLETENESS_GAPS: file.create_dataset(
                    schema.COMPLETENESS_GAPS, shape=(num_prompts, header.num_layers), dtype="float32"
                ),
            }
            file.create_dataset(schema.PROMPT_IDS, data=self.prompt_ids, dtype=h5py.string_dtype())
            for index in range(self.num_batches):
                part = self._read_part(index)
                assert part is not None, "finish() checked that every part is there"
                prompts = self.batch_slice(index)
                scores[prompts] = part[schema.SCORES]
                for name, column in columns.items():
                    column[prompts] = part[name]
            write_header(file, header)

    def _part_name(self, index: int, checksum: str) -> Path:
        return self.parts_directory / f"batch-{index:06d}-{checksum}.safetensors"

    def _read_part(self, index: int) -> dict[str, np.ndarray] | None:
        """A batch's tensors, or None where no part with the right checksum exists."""
        for file in self.parts_directory.glob(f"batch-{index:06d}-*.safetensors"):
            content = file.read_bytes()
            if file == self._part_name(index, _checksum(content)):
                return dict(load_tensors(content))
        return None


def write_header(file: h5py.File, header: LogHeader) -> None:
    """Put the header into an open HDF5 file."""
    file.attrs[schema.HEADER] = json.dumps(header.as_dict(), sort_keys=True)


def _require_room(path: Path, num_bytes: int) -> None:
    """Reserve the space that a file will need, and give it back: HDF5 may crash when a write fails.

    Raises:
        OSError: the disk has no such room.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            file.truncate(0)
    elif shutil.disk_usage(path.parent).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
