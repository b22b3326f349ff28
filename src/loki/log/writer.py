"""Writing an attribution log so that no fault can spoil what is done.

Each batch becomes a part file in `<name>.parts/`. The HDF5 file is assembled from the parts at the end. A run
that stopped goes on with the batches that are missing; a run with other settings, prompts or batches is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from loki.errors import ArtefactError, InputError, OutputError
from loki.log import schema
from loki.log.assembly import Piece, sync_folder, write_log
from loki.log.parts import Parts
from loki.log.reader import AttributionLog
from loki.log.schema import LogHeader
from loki.provenance import digest, new_file, require_writable_parent


@dataclass(frozen=True)
class Batch:
    """What attribution computes for the prompts of one batch, in their order; its columns are in `schema.COLUMNS`."""

    scores_NLD: np.ndarray  # noqa: N815
    """Attribution scores (N, L, D)."""
    target_ids_N: np.ndarray  # noqa: N815
    """Target tokens (N,), int64."""
    num_tokens_N: np.ndarray  # noqa: N815
    """Prompt lengths (N,), int64."""
    completeness_gaps_NL: np.ndarray  # noqa: N815
    """Completeness gaps (N, L), float32; NaN where not known."""


class LogWriter:
    """Collects batches of one log; `finish` makes the HDF5 file and removes the parts.

    Several processes may each have a writer of the same log and write different batches of it.
    """

    def __init__(
        self, path: Path, header: LogHeader, prompt_ids: Sequence[str], batches: Sequence[Sequence[int]]
    ) -> None:
        """Open a new log or go on with an unfinished one.

        `prompt_ids` are those of the whole prompt set, also for a shard. `batches` is the plan: for each batch the
        places of its prompts in `prompt_ids`, in the order in which their scores will come. A plan has every prompt
        once, a shard's plan those of the shard; it must not depend on where a run stopped.

        Raises:
            InputError: no prompts.
            ValueError: the plan has an empty batch, a prompt twice, one that is not there, or not all of them.
            ArtefactError: an unfinished log of other settings, prompts or batches stands there.
            OutputError: another file stands at `path`, or the folder cannot be written.
        """
        self.path = path
        self.header = replace(header, num_prompts=len(prompt_ids))
        self.prompt_ids = list(prompt_ids)
        self.batches = [[int(place) for place in batch] for batch in batches]
        self._require_plan()
        self._prompt_index_N = np.sort(np.fromiter(chain(*self.batches), np.int64))
        self.parts_directory = path.with_name(path.name + ".parts")
        self._parts = Parts(
            self.parts_directory,
            {
                **self.header.identity(),
                "shard": header.shard,
                "prompt_ids": digest(self.prompt_ids),
                "batch_size": max(map(len, self.batches)),
                "batches": digest(self.batches),
            },
        )
        require_writable_parent(path)
        unfinished = self._parts.exist()
        self.finished = self._is_in_place()
        """Whether the log is in place already, whole and of equal settings: `finish` has only to tidy up."""
        if not unfinished and not self.finished:
            self._parts.create()

    @property
    def num_batches(self) -> int:
        """Batches of the whole log, of all processes together."""
        return len(self.batches)

    def missing_batches(self, rank: int = 0, num_ranks: int = 1) -> list[int]:
        """Batches that have no whole part file yet, of those that fall to one of several processes.

        Raises:
            ArtefactError: the folder of parts cannot be read.
        """
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank {rank} of {num_ranks} is not possible")
        return [] if self.finished else self._parts.missing(range(rank, self.num_batches, num_ranks))

    def write_batch(self, index: int, batch: Batch) -> None:
        """Keep the scores of one batch.

        Raises:
            InputError: a score is not finite, in the log's own dtype.
            ValueError: no such batch, or a column has not the shape that the plan and the header tell.
            OutputError: the part cannot be written; parts written before stay whole.
        """
        if not 0 <= index < self.num_batches:
            raise ValueError(f"batch {index} is not one of {self.num_batches}")
        tensors = {}
        for column in schema.COLUMNS:
            values = getattr(batch, column.attribute)
            shape = column.shape_in(self.header, len(self.batches[index]))
            if values.shape != shape:
                raise ValueError(f"{column.attribute} of batch {index} has shape {values.shape}, not {shape}")
            with np.errstate(over="ignore"):
                tensors[column.name] = np.ascontiguousarray(values, dtype=column.dtype_in(self.header))
        bad = ~np.isfinite(tensors[schema.SCORES])
        if bad.any():
            n, layer, row = (int(i) for i in np.argwhere(bad)[0])
            raise InputError(
                f"attribution of prompt {self.prompt_ids[self.batches[index][n]]!r} is not finite at layer {layer}, "
                f"row {row}: the model's activations overflow in this dtype; use float32 or bfloat16"
            )
        self._parts.write(index, tensors)

    def finish(self) -> None:
        """Assemble the HDF5 file from all parts, put it in place, remove the parts.

        Of several processes one calls this, when all have written their batches.

        Raises:
            ArtefactError: a part is missing or damaged.
            OutputError: the file cannot be written; the parts stay.
        """
        if not self.finished:
            names = self._parts.names()
            lacking = set(range(self.num_batches)) - names.keys()
            if lacking:
                raise self._lacking(lacking)
            self._parts.clear_unfinished()
            ids = [self.prompt_ids[place] for place in self._prompt_index_N]
            with new_file(self.path, aside=self.parts_directory) as temporary:
                write_log(temporary, self.header, ids, self._prompt_index_N, self._pieces(names))
            self.finished = True
        sync_folder(self.path.parent)
        self._parts.remove()

    def _pieces(self, names: dict[int, list[str]]) -> Iterator[Piece]:
        for index, batch in enumerate(self.batches):
            tensors = self._parts.read(index, names[index])
            if tensors is None:
                raise self._lacking({index})
            yield np.searchsorted(self._prompt_index_N, batch), tensors

    def _lacking(self, known: set[int]) -> ArtefactError:
        num_lacking = len(known.union(self.missing_batches()))
        return ArtefactError(
            f"{self.parts_directory} lacks {num_lacking} of {self.num_batches} batches: "
            "run the analysis again to add them; several processes must share this folder, "
            "those that cannot take --shard and `loki merge-logs`"
        )

    def _require_plan(self) -> None:
        if not self.prompt_ids:
            raise InputError("there are no prompts to analyse: give at least one")
        places = sorted(chain(*self.batches))
        if not places and self.header.shard is not None:
            raise InputError(
                f"shard {self.header.shard} has none of the {len(self.prompt_ids)} prompts: use fewer shards"
            )
        everything = list(range(len(self.prompt_ids)))
        if self.header.shard is None and places != everything:
            raise ValueError(f"the batches are not a partition of {len(everything)} prompts")
        if not all(self.batches) or len(set(places)) < len(places) or not set(places) <= set(everything):
            raise ValueError(f"the batches of shard {self.header.shard} have a prompt twice, an unknown one, or none")

    def _is_in_place(self) -> bool:
        """Whether this very log is at `path`, as after a run that was killed while it removed the parts.

        Raises:
            OutputError: something else is.
        """
        if not self.path.exists():
            return False
        try:
            with AttributionLog(self.path) as log:
                index_N, ids = log.prompts()
                if (
                    log.header is not None
                    and (log.header.identity(), log.header.shard) == (self.header.identity(), self.header.shard)
                    and np.array_equal(index_N, self._prompt_index_N)
                    and ids == [self.prompt_ids[place] for place in index_N]
                ):
                    return True
        except ArtefactError:
            pass
        raise OutputError(f"{self.path} exists already: remove it or choose another output file")
