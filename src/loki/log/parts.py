"""The batches of an unfinished log, each a file of its own: whole or absent, whatever happens.

A part is written aside and renamed. Its name has the digest of its content, of its place in the plan and of
the manifest, so that a torn part, a part in another's place and a part of another analysis are all no parts.
Several processes may write into one folder.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from loki.errors import ArtefactError
from loki.log.schema import differences
from loki.provenance import digest, read_json, write_bytes, write_json

MANIFEST = "manifest.json"
PART_NAME = re.compile(r"batch-([0-9]{6,})-[0-9a-f]{16}\.safetensors")

logger = logging.getLogger(__name__)


class Parts:
    """The folder of part files of one log."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        """Name the folder, and the manifest (a JSON value) that decides what belongs into it; nothing is written."""
        self.directory = directory
        self._manifest_path = directory / MANIFEST
        self._manifest = manifest
        self._mark = digest(manifest)
        self._whole: set[str] = set()  # parts that this process wrote, or read and found whole

    def exist(self) -> bool:
        """Whether an unfinished log of this manifest is there.

        Raises:
            ArtefactError: one of another manifest is, or one that cannot be read.
        """
        try:
            if not self._manifest_path.exists():
                return False
        except OSError as error:
            raise ArtefactError(f"{self.directory} cannot be read: {error.strerror}") from error
        try:
            found = read_json(self._manifest_path, what="manifest of the unfinished log")
        except ArtefactError as error:
            raise ArtefactError(f"{error}: remove this file to go on with the batches beside it") from error
        if not isinstance(found, dict):
            raise ArtefactError(f"{self._manifest_path} is no manifest: remove it to go on with the batches beside it")
        if found != self._manifest:
            raise ArtefactError(
                f"{self.directory} holds an unfinished log of other {differences(found, self._manifest)}: "
                "run with the same settings to finish it, or remove that folder"
            )
        return True

    def create(self) -> None:
        """Write the manifest; other processes may do so at the same moment.

        Raises:
            ArtefactError: another process wants another log here.
            OutputError: the folder cannot be written.
        """
        write_json(self._manifest_path, self._manifest)
        self.exist()

    def names(self) -> dict[int, list[str]]:
        """Names of part files by batch, from one look at the folder and none into the files.

        Raises:
            ArtefactError: the folder cannot be read.
        """
        found: dict[int, list[str]] = {}
        for name in sorted(self._listing()):
            match = PART_NAME.fullmatch(name)
            if match is not None:
                found.setdefault(int(match[1]), []).append(name)
        return found

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Which of these batches have no whole part; reads the parts that this process does not know yet.

        Raises:
            ArtefactError: the folder cannot be read.
        """
        names = self.names()
        return [index for index in indices if not self._is_whole(index, names.get(index, []))]

    def write(self, index: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Keep one batch.

        Raises:
            OutputError: the part cannot be written; the others stay whole.
        """
        content = save_tensors(dict(tensors))
        name = self._name(index, content)
        write_bytes(self.directory / name, content)
        self._whole.add(name)

    def read(self, index: int, names: Iterable[str]) -> dict[str, np.ndarray] | None:
        """The tensors of a batch from the first whole one of its files, None where none is whole."""
        for name in names:
            try:
                content = (self.directory / name).read_bytes()
            except OSError:  # a part on a bad block is as good as none: its batch can be computed again
                content = b""
            if name == self._name(index, content):
                self._whole.add(name)
                return dict(load_tensors(content))
            self._whole.discard(name)
        return None

    def clear_unfinished(self) -> None:
        """Remove what killed processes were writing. No other process may be at work in the folder."""
        clear_unfinished(self.directory, "batch-", MANIFEST, self.directory.stem)

    def remove(self) -> None:
        """Remove the files of ours, then the folder; what cannot be removed is warned of."""
        self.clear_unfinished()
        try:
            for name in self._listing():
                if PART_NAME.fullmatch(name):
                    (self.directory / name).unlink(missing_ok=True)
            self._manifest_path.unlink(missing_ok=True)
            self.directory.rmdir()
        except FileNotFoundError:
            pass
        except (OSError, ArtefactError) as error:
            logger.warning("the log is whole, but %s cannot be removed (%s): remove that folder", self.directory, error)

    def _listing(self) -> list[str]:
        try:
            return [entry.name for entry in self.directory.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ArtefactError(f"{self.directory} cannot be read: {error.strerror}") from error

    def _is_whole(self, index: int, names: list[str]) -> bool:
        return not self._whole.isdisjoint(names) or self.read(index, names) is not None

    def _name(self, index: int, content: bytes) -> str:
        checksum = hashlib.sha256(f"{self._mark} {index} ".encode())
        checksum.update(content)
        return f"batch-{index:06d}-{checksum.hexdigest()[:16]}.safetensors"


def clear_unfinished(directory: Path, *names: str) -> None:
    """Remove what killed processes were writing to files whose names begin so; what cannot be removed stays."""
    with suppress(OSError):
        for path in directory.iterdir():
            if path.name.startswith(tuple(f".{name}" for name in names)):
                with suppress(OSError):
                    path.unlink()
