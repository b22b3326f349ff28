"""Assembling the HDF5 file of a log: in bounded memory, and without harm from a write that fails.

HDF5 tries to write again what it could not write, and crashes the process when that fails at its end. So it
writes into an object that keeps the first error to itself and swallows what comes after; the error is raised
once HDF5 has let go of the file.
"""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from loki.errors import OutputError
from loki.log import schema
from loki.log.schema import LogHeader

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

Piece = tuple[np.ndarray, Mapping[str, np.ndarray]]
"""Rows (n,) in the log, and by name the n entries of every column that belong there."""


def write_log(
    path: Path, header: LogHeader, prompt_ids: Sequence[str], prompt_index_N: np.ndarray, pieces: Iterable[Piece]
) -> None:
    """Write a log from pieces in any order, which together fill every row once; one piece is in memory at a time.

    `path` is a temporary file: a fault leaves it half-written. It is on disk, not only in the system's memory,
    when this returns.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("wb+", buffering=0) as file:
        spool = _Spool(file)
        try:
            with h5py.File(spool, "w") as log:
                _fill(log, header, prompt_ids, prompt_index_N, pieces, spool)
        finally:
            spool.raise_error()
        os.fsync(file.fileno())


def write_header(file: h5py.File, header: LogHeader) -> None:
    """Put the header into an open HDF5 file."""
    file.attrs[schema.HEADER] = json.dumps(header.as_dict(), sort_keys=True)


def sync_folder(path: Path) -> None:
    """Make a renaming in this folder last through a loss of power, where the file system can.

    Raises:
        OutputError: the disk reports an error.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EACCES}:  # not known here: nothing to be done
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _fill(
    log: h5py.File,
    header: LogHeader,
    prompt_ids: Sequence[str],
    prompt_index_N: np.ndarray,
    pieces: Iterable[Piece],
    spool: _Spool,
) -> None:
    num_prompts = len(prompt_ids)
    large, small = {}, {}
    for column in schema.COLUMNS:
        shape, dtype = column.shape_in(header, num_prompts), column.dtype_in(header)
        if column.is_large:
            large[column.name] = log.create_dataset(column.name, shape=shape, dtype=dtype, chunks=(1, *shape[1:]))
        else:
            small[column.name] = np.empty(shape, dtype)
    filled_N = np.zeros(num_prompts, dtype=bool)
    for rows, columns in pieces:
        assert not filled_N[rows].any(), "no row is filled twice"
        filled_N[rows] = True
        for name, values in small.items():
            values[rows] = columns[name]
        for name, dataset in large.items():
            for row, value in zip(rows, columns[name], strict=True):
                dataset[row] = value
                spool.raise_error()
    assert filled_N.all(), "every row is filled"
    for name, values in small.items():
        log.create_dataset(name, data=values)
    log.create_dataset(schema.PROMPT_INDEX, data=prompt_index_N.astype(np.int64))
    log.create_dataset(schema.PROMPT_IDS, data=list(prompt_ids), dtype=h5py.string_dtype())
    write_header(log, header)


class _Spool(io.RawIOBase):
    """A file for HDF5 to write into, which seems to succeed always."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self._error: BaseException | None = None

    def raise_error(self) -> None:
        """Raise the first error there was."""
        if self._error is not None:
            raise self._error

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Bytes that cannot be read, or that a swallowed write should have left, read as zeros."""
        view = memoryview(buffer).cast("B")
        content = b""
        try:
            content = self._file.read(len(view)) or b""
        except BaseException as error:
            self._error = self._error or error
        view[:] = content.ljust(len(view), b"\0")
        return len(view)

    def write(self, content: ReadableBuffer, /) -> int:
        """Write all of it, or remember why not."""
        view = memoryview(content).cast("B")
        num_bytes = len(view)
        try:
            while view and self._error is None:
                view = view[self._file.write(view) or 0 :]
        except BaseException as error:  # an interrupt too: HDF5 must not be left by an exception
            self._error = error
        return num_bytes

    def truncate(self, size: int | None = None, /) -> int:
        try:
            if self._error is None:
                self._file.truncate(size)
        except BaseException as error:
            self._error = error
        return size or 0
