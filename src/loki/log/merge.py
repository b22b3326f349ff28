"""Making one log of the logs of shards, equal to that of a single run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loki.errors import ArtefactError, InputError, OutputError
from loki.log import schema
from loki.log.assembly import Piece, sync_folder, write_log
from loki.log.parts import clear_unfinished
from loki.log.reader import AttributionLog
from loki.log.schema import LogHeader, differences, parse_shard
from loki.progress import Track, silent
from loki.provenance import new_file


@dataclass(frozen=True)
class _Shard:
    path: Path
    header: LogHeader
    prompt_index_N: np.ndarray  # noqa: N815
    prompt_ids: list[str]


def merge_logs(paths: Sequence[Path], output: Path, *, force: bool = False, track: Track = silent) -> int:
    """Merge logs that together have every prompt once; they may come in any order, and stay.

    The result has the datasets and the header that a run without shards writes; package versions that differ
    between the logs are listed. Memory is bounded, one log is open at a time. Returns the number of prompts.

    Raises:
        InputError: no logs.
        ArtefactError: a log is damaged, has no header or belongs to another analysis; prompts are missing or twice.
        OutputError: `output` exists (unless `force`), is one of the logs, or cannot be written.
    """
    if not paths:
        raise InputError("there are no logs to merge: give the log of each shard")
    _require_free(output, paths, force=force)
    shards = [_read(path) for path in paths]
    _require_equal_identity(shards)
    prompt_ids = _prompt_ids(shards)
    header = replace(shards[0].header, shard=None, versions=_versions(shards))

    aside = output.with_name(output.name + ".merging")
    clear_unfinished(aside, output.name)
    try:
        with new_file(output, aside=aside) as temporary:
            index_N = np.arange(len(prompt_ids))
            write_log(temporary, header, prompt_ids, index_N, _pieces(track(shards, "merging")))
    finally:
        _remove_if_empty(aside)
    sync_folder(output.parent)
    return len(prompt_ids)


def _require_free(output: Path, paths: Sequence[Path], *, force: bool) -> None:
    try:
        if not output.exists():
            return
        is_input = any(path.exists() and output.samefile(path) for path in paths)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror}; choose another output file") from error
    if is_input:
        raise OutputError(f"{output} is one of the logs to merge: choose another output file")
    if not force:
        raise OutputError(f"{output} exists already: remove it, choose another output file, or add --force")


def _read(path: Path) -> _Shard:
    with AttributionLog(path) as log:
        index_N, ids = log.prompts()
        assert log.header is not None, "prompts() refuses logs without header"
        return _Shard(path, log.header, index_N, ids)


def _require_equal_identity(shards: Sequence[_Shard]) -> None:
    expected = shards[0].header.identity()
    for shard in shards[1:]:
        found = shard.header.identity()
        if found != expected:
            raise ArtefactError(
                f"attribution log {shard.path} is of other {differences(found, expected)} than {shards[0].path}: "
                "merge shards of one analysis only"
            )


def _prompt_ids(shards: Sequence[_Shard]) -> list[str]:
    """Ids of all prompts in order.

    Raises:
        ArtefactError: a prompt is in two logs, or in none.
    """
    num_prompts = shards[0].header.num_prompts
    assert num_prompts is not None, "prompts() refuses logs that do not say"
    ids, owner_N = np.empty(num_prompts, dtype=object), np.full(num_prompts, -1)
    for number, shard in enumerate(shards):
        twice = shard.prompt_index_N[owner_N[shard.prompt_index_N] >= 0]
        if len(twice):
            other = owner_N[twice[0]]
            num_common = int((owner_N[twice] == other).sum())
            raise ArtefactError(
                f"{shards[other].path} and {shard.path} both have prompt {ids[twice[0]]!r} ({num_common} in common): "
                "give the log of each shard once"
            )
        owner_N[shard.prompt_index_N] = number
        ids[shard.prompt_index_N] = shard.prompt_ids
    num_missing = int((owner_N < 0).sum())
    if num_missing:
        raise ArtefactError(
            f"the logs lack {num_missing} of {num_prompts} prompts: {_what_is_missing(shards)}; "
            "give the logs of all shards"
        )
    return list(ids)


def _what_is_missing(shards: Sequence[_Shard]) -> str:
    known = {parse_shard(shard.header.shard) for shard in shards if shard.header.shard is not None}
    totals = {total for _, total in known}
    if len(totals) == 1:
        (total,) = totals
        absent = [f"{i}/{total}" for i in range(1, total + 1) if (i, total) not in known]
        if absent:
            return f"shard {absent[0]} is missing" if len(absent) == 1 else f"shards {', '.join(absent)} are missing"
    return ", ".join(f"{shard.path} has {len(shard.prompt_ids)}" for shard in shards)


def _versions(shards: Sequence[_Shard]) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for shard in shards:
        for package, version in shard.header.versions.items():
            found.setdefault(package, set()).add(version)
    return {package: ", ".join(sorted(versions)) for package, versions in found.items()}


def _pieces(shards: Iterable[_Shard]) -> Iterator[Piece]:
    for shard in shards:
        with AttributionLog(shard.path) as log:
            columns = {column.name: log.column(column.name) for column in schema.COLUMNS if not column.is_large}
            start = 0
            for scores_NLD in log.chunks():
                stop = start + len(scores_NLD)
                piece = {schema.SCORES: scores_NLD}
                for name, values in columns.items():
                    if values is None or len(values) != log.num_prompts:
                        raise ArtefactError(f"attribution log {shard.path} is damaged in {name!r}: make it again")
                    piece[name] = values[start:stop]
                yield shard.prompt_index_N[start:stop], piece
                start = stop


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return
