"""Reading attribution logs: ours, and those of the public implementation (scores only)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np

from loki.errors import ArtefactError, InputError
from loki.log import schema
from loki.log.schema import LogHeader

CHUNK_BYTES = 64 * 2**20
READ_BYTES = 2 * 2**20
TORCH_GRAIN = 2**15
"""Numbers that torch's elementwise operations leave to one thread."""


class AttributionLog:
    """An open log; use it as a context manager."""

    def __init__(self, path: str | Path) -> None:
        """Open a log and check its form.

        Raises:
            ArtefactError: missing, not HDF5, truncated, without prompts, or of an unknown schema.
        """
        self.path = Path(path)
        try:
            found = self.path.is_file()
        except OSError as error:
            raise ArtefactError(f"attribution log {self.path} cannot be read: {error.strerror}") from error
        if not found:
            raise ArtefactError(f"attribution log {self.path} does not exist: make it with `loki analyse`")
        try:
            # Without a cache of chunks HDF5 reads to where the scores are wanted; each chunk is read once anyway.
            self._file = h5py.File(self.path, "r", rdcc_nbytes=0)
        except OSError as error:
            raise ArtefactError(f"attribution log {self.path} is damaged or not HDF5: make it again") from error
        try:
            self._scores = self._checked_scores()
            self.header = self._read_header()
        except ArtefactError:
            self._file.close()
            raise
        except (OSError, RuntimeError, KeyError) as error:  # h5py's errors for spoiled tables
            self._file.close()
            raise ArtefactError(f"attribution log {self.path} is damaged: make it again") from error
        self.num_prompts, self.num_layers, self.num_rows = (int(n) for n in self._scores.shape)

    def __enter__(self) -> AttributionLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def chunks(self) -> Iterator[np.ndarray]:
        """Scores in pieces of consecutive prompts (n, L, D) float32, each at most about `CHUNK_BYTES`.

        Raises:
            ArtefactError: a score is NaN or infinite, or the file cannot be read.
        """
        return map(as_float32, self.stored_chunks())

    def stored_chunks(self) -> Iterator[np.ndarray]:
        """The same pieces, in float16 where that is how they are stored.

        Raises:
            ArtefactError: as `chunks`.
        """
        stored, prompt_shape = self._scores.dtype, (self.num_layers, self.num_rows)
        step = max(1, CHUNK_BYTES // (4 * math.prod(prompt_shape)))
        # Few prompts at a time stay in the processor's cache until they are checked.
        few = min(step, self.num_prompts, max(1, READ_BYTES // (4 * math.prod(prompt_shape))))
        dtype = stored if stored in (np.float16, np.float32) else np.dtype(np.float32)
        buffer_NLD = None if dtype == stored else np.empty((few, *prompt_shape), stored)
        for start in range(0, self.num_prompts, step):
            # Read into memory of our own: h5py would fill new memory with zeros for every piece.
            scores_NLD = np.empty((min(step, self.num_prompts - start), *prompt_shape), dtype)
            for first in range(0, len(scores_NLD), few):
                self._read(start + first, buffer_NLD, scores_NLD[first : first + few])
            yield scores_NLD

    def mean_scores(self) -> np.ndarray:
        """Mean of each row's score over all prompts (L, D) float64.

        Raises:
            ArtefactError: as `chunks`.
        """
        total_LD = np.zeros((self.num_layers, self.num_rows))
        for scores_NLD in self.chunks():
            total_LD += scores_NLD.sum(axis=0, dtype=np.float64)
        return total_LD / self.num_prompts

    def _read(self, start: int, buffer_NLD: np.ndarray | None, scores_NLD: np.ndarray) -> None:
        """Fill `scores_NLD` with those of prompt `start` and the ones after it, by way of a buffer to convert from."""
        stored_NLD = scores_NLD if buffer_NLD is None else buffer_NLD[: len(scores_NLD)]
        try:
            self._scores.read_direct(stored_NLD, np.s_[start : start + len(stored_NLD)])
        except OSError as error:
            raise ArtefactError(f"attribution log {self.path} is damaged at prompt {start}: make it again") from error
        if buffer_NLD is not None:
            with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
                scores_NLD[:] = stored_NLD
        if not _all_finite(scores_NLD):
            n, layer, row = (int(i) for i in np.argwhere(~np.isfinite(scores_NLD))[0])
            raise ArtefactError(
                f"attribution log {self.path} has {stored_NLD[n, layer, row]} at prompt {start + n}, "
                f"layer {layer}, row {row}: analyse again in float32 or bfloat16"
            )

    def column(self, name: str) -> np.ndarray | None:
        """A per-prompt column by its name in `schema`, or None where the log has none.

        Raises:
            ArtefactError: the file cannot be read.
        """
        try:
            return self._file[name][:] if name in self._file else None
        except (OSError, RuntimeError) as error:
            raise ArtefactError(f"attribution log {self.path} is damaged in {name!r}: make it again") from error

    def prompts(self) -> tuple[np.ndarray, list[str]]:
        """Of each prompt its place in the whole prompt set, (N,) int64 ascending, and its id.

        Raises:
            ArtefactError: a log of the public implementation, which does not say, or a damaged one.
        """
        if self.header is None:
            raise ArtefactError(
                f"attribution log {self.path} has no header that says what made it, as logs of the public "
                "implementation: make it again with `loki analyse`"
            )
        index_N, ids, whole = self.column(schema.PROMPT_INDEX), self.column(schema.PROMPT_IDS), self.header.num_prompts
        damaged = ArtefactError(f"attribution log {self.path} is damaged in its table of prompts: make it again")
        if index_N is None or ids is None or not isinstance(whole, int):
            raise damaged
        if index_N.dtype != np.int64 or ids.dtype != object or not index_N.shape == ids.shape == (self.num_prompts,):
            raise damaged
        if index_N[0] < 0 or index_N[-1] >= whole or (np.diff(index_N) <= 0).any():
            raise damaged
        try:
            return index_N, [text.decode() for text in ids]
        except UnicodeDecodeError as error:
            raise damaged from error

    def _checked_scores(self) -> h5py.Dataset:
        scores = self._file.get(schema.SCORES)
        if not isinstance(scores, h5py.Dataset) or scores.ndim != 3 or scores.dtype.kind != "f":
            raise ArtefactError(
                f"attribution log {self.path} has no floating-point {schema.SCORES!r} of shape "
                "(prompts, layers, rows): make it with `loki analyse`"
            )
        if 0 in scores.shape:
            raise ArtefactError(f"attribution log {self.path} is empty {scores.shape}: analyse at least one prompt")
        return scores

    def _read_header(self) -> LogHeader | None:
        text = self._file.attrs.get(schema.HEADER)
        if text is None:
            return None
        try:
            values = json.loads(text)
            found = values["schema_version"]
        except (TypeError, ValueError, KeyError) as error:
            raise ArtefactError(f"attribution log {self.path} has a damaged header: make it again") from error
        if found != schema.SCHEMA_VERSION:
            raise ArtefactError(
                f"attribution log {self.path} has schema {found!r}, this version reads {schema.SCHEMA_VERSION}: "
                "make it again"
            )
        try:
            header = LogHeader(**values)
        except (TypeError, InputError) as error:
            raise ArtefactError(f"attribution log {self.path} has a damaged header: make it again") from error
        if (header.num_layers, header.num_rows) != self._scores.shape[1:]:
            raise ArtefactError(
                f"attribution log {self.path} has scores of shape {self._scores.shape}, and a header that speaks of "
                f"{header.num_layers} layers of {header.num_rows} rows: make it again"
            )
        return header


def as_float32(scores: np.ndarray) -> np.ndarray:
    """The same numbers in float32; float32 as it is."""
    if scores.dtype != np.float16:
        return scores.astype(np.float32, copy=False)
    # Several times faster than numpy.
    import torch

    converted = np.empty(scores.shape, np.float32)
    # In parts for which torch starts no threads of its own: those who read ahead have other work for processors.
    target, source = (torch.from_numpy(values.reshape(-1)) for values in (converted, scores))
    for start in range(0, len(target), TORCH_GRAIN):
        target[start : start + TORCH_GRAIN] = source[start : start + TORCH_GRAIN]
    return converted


def _all_finite(scores_NLD: np.ndarray) -> bool:
    if scores_NLD.dtype == np.float16:
        # Half precision has no arithmetic of its own; NaN and infinity have all bits of the exponent set.
        return bool((scores_NLD.view(np.int16) & 0x7FFF).max() < 0x7C00)
    # A sum tells at a quarter of the cost of looking at each; one that overflows says nothing.
    with np.errstate(over="ignore", invalid="ignore"):
        total = scores_NLD.sum()
    return bool(np.isfinite(total)) or bool(np.isfinite(scores_NLD).all())
