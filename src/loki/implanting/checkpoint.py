"""Checkpoints on disk, read and written by blocks: memory does not grow with the model, nor with a shard.

A checkpoint is a folder of `safetensors` shards. What is not changed is copied byte for byte. The library's own
writer wants a whole shard in memory, twice; so this module reads tensors by byte range and writes the format itself
(8 bytes of length, a JSON header, the tensors' bytes).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from loki.errors import ArtefactError, InputError
from loki.models import locate_model
from loki.progress import Track, silent
from loki.provenance import read_json, write_json

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
CARRIED_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")
"""Copied along with the weights: configuration, tokenizer, chat template, licence; no code, no pickles."""
FLOATS: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
"""Dtypes of weights that can be changed, by the name that the format gives them."""
INTEGERS: Mapping[str, torch.dtype] = MappingProxyType({"I64": torch.int64})
"""Dtypes of the index maps in LoKI checkpoints."""
BLOCK_BYTES = 16 << 20
"""How much is in memory at once, or one row where that is more."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor stands on disk."""

    name: str
    path: Path
    dtype_name: str
    """As in the file: `BF16`."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in torch.

        Raises:
            ArtefactError: as `require_float`, for what is no index map either.
        """
        if self.dtype_name in INTEGERS:
            return INTEGERS[self.dtype_name]
        self.require_float()
        return FLOATS[self.dtype_name]

    def require_float(self) -> None:
        """Make sure that its values can be changed.

        Raises:
            ArtefactError: integers, or one of the small dtypes of quantised models.
        """
        if not self.is_float:
            raise ArtefactError(
                f"{self.name} of {self.path} is stored as {self.dtype_name}, of {', '.join(FLOATS)} none: "
                "use the model that was not quantised"
            )

    @property
    def is_float(self) -> bool:
        """Whether it can be stored in another dtype."""
        return self.dtype_name in FLOATS

    @property
    def block_length(self) -> int:
        """Entries along the first dimension that make up a block."""
        entry_bytes = self.num_bytes // self.shape[0] if self.shape and self.shape[0] else 0
        return max(1, BLOCK_BYTES // entry_bytes) if entry_bytes else 1

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The tensor, or its entries from `first` up to `last` along the first dimension."""
        if not self.shape:
            return self._values(self.start, self.num_bytes).reshape(())
        last = self.shape[0] if last is None else last
        entry_bytes = self.num_bytes // self.shape[0] if self.shape[0] else 0
        values = self._values(self.start + first * entry_bytes, (last - first) * entry_bytes)
        return values.reshape(last - first, *self.shape[1:])

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The tensor in blocks, each with the index of its first entry."""
        if not self.shape:
            yield 0, self.read()
            return
        for first in range(0, self.shape[0], self.block_length):
            yield first, self.read(first, min(first + self.block_length, self.shape[0]))

    def raw(self) -> Iterator[bytes]:
        """Its bytes, in pieces."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.num_bytes
            while left:
                piece = file.read(min(left, BLOCK_BYTES))
                if not piece:
                    raise ArtefactError(f"{self.path} ended early while it was read: fetch it again")
                left -= len(piece)
                yield piece

    def _values(self, start: int, num_bytes: int) -> torch.Tensor:
        buffer = bytearray(num_bytes)
        with self.path.open("rb") as file:
            file.seek(start)
            if file.readinto(buffer) != num_bytes:
                raise ArtefactError(f"{self.path} ended early while it was read: fetch it again")
        return torch.frombuffer(buffer, dtype=self.dtype) if num_bytes else torch.empty(0, dtype=self.dtype)


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: what the header says, and its content in blocks."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    num_bytes: int
    blocks: Callable[[], Iterable[bytes | torch.Tensor]]


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint."""

    tensors: tuple[StoredTensor, ...]
    """In the order in which they stand in the file."""
    metadata: Mapping[str, str] | None


@dataclass(frozen=True)
class Checkpoint:
    """A model folder with `safetensors` weights."""

    folder: Path
    shards: Mapping[str, Shard]
    """By file name."""
    index: Mapping[str, Any] | None
    """Content of the shard index; None for a checkpoint of one file."""

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name."""
        return {tensor.name: tensor for shard in self.shards.values() for tensor in shard.tensors}

    def config(self) -> dict[str, Any]:
        """Content of `config.json`.

        Raises:
            ArtefactError: missing or damaged.
        """
        config = read_json(self.folder / "config.json", what="model config")
        if not isinstance(config, dict):
            raise ArtefactError(f"model config {self.folder / 'config.json'} must be a JSON object")
        return config


def find_folder(model: str) -> Path:
    """The folder of a model: the user's own, the embedded model's, or one fetched from the Hub.

    Raises:
        InputError: not found.
    """
    source = locate_model(model)
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", *CARRIED_FILES]))
    except Exception as error:  # the Hub's errors have no common class but this
        raise InputError(f"model {model!r} cannot be fetched: {str(error).splitlines()[0]}") from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find every tensor of a checkpoint, and make sure that all of them are there.

    Raises:
        InputError: no safetensors in the folder.
        ArtefactError: a shard that the index names is missing, damaged or elsewhere, or lacks tensors.
    """
    if (folder / SINGLE_FILE).exists():  # where both are, transformers reads this one
        return Checkpoint(folder, {SINGLE_FILE: _read_shard(folder, SINGLE_FILE)}, None)
    if not (folder / INDEX_FILE).exists():
        raise InputError(f"model folder {folder} has no safetensors weights: save it with safe_serialization")
    index = read_json(folder / INDEX_FILE, what="shard index")
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ArtefactError(f"shard index {folder / INDEX_FILE} names no shards: fetch the model again")
    shards = {file: _read_shard(folder, file) for file in sorted(set(places.values()))}
    found = [(tensor.name, file) for file, shard in shards.items() for tensor in shard.tensors]
    if len(found) != len(places) or dict(found) != places:
        wrong = next((name for name, _ in set(found) ^ set(places.items())), found[0][0])
        raise ArtefactError(
            f"shards of model {folder} do not hold what their index says ({wrong!r}, for one): fetch the model again"
        )
    return Checkpoint(folder, shards, index)


def _read_shard(folder: Path, file: str) -> Shard:
    path = folder / file
    if Path(file).name != file or not path.is_file():
        raise ArtefactError(f"shard {file!r} of model {folder} is missing: fetch the model again")
    try:
        with safe_open(path, framework="pt"):  # the library checks header, offsets and length
            pass
        with path.open("rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(header_bytes))
    except SafetensorError as error:
        raise ArtefactError(f"shard {file!r} of model {folder} is damaged: fetch the model again") from error
    except OSError as error:
        raise ArtefactError(f"shard {file!r} of model {folder} cannot be read: {error.strerror or error}") from error
    metadata = header.pop("__metadata__", None)
    tensors = [
        StoredTensor(
            name=name,
            path=path,
            dtype_name=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=8 + header_bytes + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    ]
    return Shard(tuple(sorted(tensors, key=lambda tensor: (tensor.start, tensor.num_bytes))), metadata)


def new_tensor(
    name: str, dtype: torch.dtype, shape: Sequence[int], blocks: Callable[[], Iterable[torch.Tensor]]
) -> NewTensor:
    """A tensor to be written whose content is computed."""
    dtype_name = next(known for known, value in {**FLOATS, **INTEGERS}.items() if value == dtype)
    return NewTensor(name, dtype_name, tuple(shape), math.prod(shape) * dtype.itemsize, blocks)


def unchanged(stored: StoredTensor, dtype: torch.dtype | None = None) -> NewTensor:
    """A tensor to be written as it is, byte for byte, or in another dtype where it is floating-point."""
    if dtype is None or not stored.is_float or stored.dtype == dtype:
        return NewTensor(stored.name, stored.dtype_name, stored.shape, stored.num_bytes, stored.raw)
    return new_tensor(stored.name, dtype, stored.shape, lambda: (block.to(dtype) for _, block in stored.blocks()))


def rewrite(
    source: Checkpoint,
    directory: Path,
    change: Callable[[StoredTensor], Sequence[NewTensor]],
    *,
    track: Track = silent,
) -> None:
    """Write a checkpoint of the same shards, with what `change` makes of each tensor, into an existing folder.

    Raises:
        OSError: the disk is full, for one.
    """
    places: dict[str, str] = {}
    num_bytes = 0
    for file in track(list(source.shards), "shards"):
        shard = source.shards[file]
        tensors = [new for stored in shard.tensors for new in change(stored)]
        write_shard(directory / file, tensors, shard.metadata)
        places.update(dict.fromkeys((tensor.name for tensor in tensors), file))
        num_bytes += sum(tensor.num_bytes for tensor in tensors)
    if source.index is not None:
        metadata = {**(source.index.get("metadata") or {}), "total_size": num_bytes}
        weight_map = dict(sorted(places.items()))
        write_json(directory / INDEX_FILE, {**source.index, "metadata": metadata, "weight_map": weight_map})


def write_shard(path: Path, tensors: Iterable[NewTensor], metadata: Mapping[str, str] | None) -> None:
    """Write one `safetensors` file, block by block, and flush it to the disk."""
    # Readers map tensors into memory, so those with the widest elements come first, as the library has it.
    ordered = sorted(tensors, key=lambda tensor: -_width(tensor.dtype_name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for tensor in ordered:
        assert tensor.name not in header, f"two tensors are named {tensor.name}"
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype_name, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            written = 0
            for block in tensor.blocks():
                written += file.write(block if isinstance(block, bytes) else _bytes_of(block))
            assert written == tensor.num_bytes, f"{tensor.name}: {written} bytes of {tensor.num_bytes}"
        file.flush()
        os.fsync(file.fileno())


def _width(dtype_name: str) -> int:
    """Bits of one element, as in the dtype's name: BF16, F8_E4M3, BOOL."""
    number = re.search(r"\d+", dtype_name)
    return int(number[0]) if number else 8


def _bytes_of(block: torch.Tensor) -> memoryview:
    return block.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def copy_companions(source: Path, directory: Path) -> None:
    """Copy what belongs to a model besides its weights, without the shard index and without what is ours."""
    for pattern in CARRIED_FILES:
        for file in source.glob(pattern):
            if file.is_file() and file.name != INDEX_FILE and not file.name.startswith(("loki_", "adapter_")):
                shutil.copyfile(file, directory / file.name)


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A model config that says in which dtype its weights are stored; configs inside it as well."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            continue
        nested = isinstance(value, Mapping) and ("dtype" in value or "torch_dtype" in value)
        changed[key] = with_dtype(value, dtype) if nested else value
    return {**changed, "dtype": str(dtype).removeprefix("torch.")}
