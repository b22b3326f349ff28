"""What made an artefact, whether it fits, and files that are either whole or absent."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from loki.architecture import shape_of
from loki.errors import ArtefactError, OutputError

if TYPE_CHECKING:
    import torch
    from torch import nn

SAMPLES_PER_TENSOR = 1024
VERSIONED_PACKAGES = ("loki-peft", "torch", "transformers", "peft", "trl", "lm-eval")


def versions() -> dict[str, str]:
    """Installed versions of this package and of those that decide numbers."""
    found = {package: _version(package) for package in VERSIONED_PACKAGES}
    return {package: version for package, version in found.items() if version is not None}


@functools.cache
def _version(package: str) -> str | None:
    """Read once: searching the environment takes milliseconds."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def digest(value: Any) -> str:
    """SHA-256 (first 16 hex digits) of a JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_file(path: Path) -> str:
    """A short hash of a file's bytes.

    Raises:
        ArtefactError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class ModelFingerprint:
    """Which model an artefact was made with."""

    architecture: str
    """Family, layers, rows and columns, as in `llama-30x576x1536`."""
    weights: str
    """Digest of evenly spaced elements of every parameter: a mark of identity, not a proof of equality."""
    dtype: str

    def as_dict(self) -> dict[str, str]:
        """Plain JSON form."""
        return asdict(self)


def fingerprint_model(model: nn.Module) -> ModelFingerprint:
    """Fingerprint of a loaded model, from up to `SAMPLES_PER_TENSOR` elements of each parameter.

    It is the same wherever the weights are, also where `accelerate` has put them aside.
    """
    import torch

    hasher = hashlib.sha256()
    for name, parameter in _parameters(model):
        flat = parameter.detach().reshape(-1)
        step = max(1, -(-flat.numel() // SAMPLES_PER_TENSOR))
        hasher.update(f"{name}:{tuple(parameter.shape)}".encode())
        hasher.update(flat[::step].to("cpu", torch.float32).numpy().tobytes())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return ModelFingerprint(str(shape_of(model)), hasher.hexdigest()[:16], dtype)


def _parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values of every parameter, in the order of `named_parameters`; tied ones once, at their first name.

    Weights on another device, in the main memory or on the disk are fetched for one module at a time.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        yield from model.named_parameters()
        return
    from accelerate.utils import align_module_device

    # Weights put aside are tensors of their own under each name; that they are tied only the model knows.
    sources = getattr(model, "all_tied_weights_keys", {})
    known = set()
    for place, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        with align_module_device(module):
            for own_name, parameter in module.named_parameters(recurse=False):
                name = f"{place}.{own_name}" if place else own_name
                if sources.get(name, name) not in known:
                    known.add(sources.get(name, name))
                    yield name, parameter


def compare_models(found: Mapping[str, str], expected: ModelFingerprint, *, what: str, strict: bool) -> str | None:
    """Compare an artefact's model with the one at hand.

    Returns a warning where the architecture is the same but weights or dtype differ, otherwise None.

    Raises:
        ArtefactError: another architecture, or any difference when `strict`.
    """
    if found.get("architecture") != expected.architecture:
        raise ArtefactError(
            f"{what} was made with a {found.get('architecture')} model, not with this {expected.architecture} one: "
            "use the model it was made with, or make it again"
        )
    if dict(found) == expected.as_dict():
        return None
    difference = ", ".join(
        f"{key} {found.get(key)} there, {value} here"
        for key, value in expected.as_dict().items()
        if found.get(key) != value
    )
    message = f"{what} was made with other weights of the same architecture ({difference})"
    if strict:
        raise ArtefactError(f"{message}: make it again, or leave out --strict")
    return message


def require_writable_parent(path: Path) -> None:
    """Make the folder that will hold `path`, and make sure that a file can be written there.

    Raises:
        OutputError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose another output folder") from error


@contextmanager
def new_file(path: Path, *, aside: Path | None = None) -> Iterator[Path]:
    """Fill a file aside and put it in place of `path` only when the block ends without an error.

    It is filled in the folder of `path`, or in `aside`, a folder of the same file system, made where it is missing.

    Raises:
        OutputError: the folder cannot be written or the disk is full; no partial file is left.
    """
    require_writable_parent(path)
    temporary = None
    try:
        if aside is not None:
            aside.mkdir(exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=aside or path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        os.close(descriptor)
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # the error that led here is the one to report
                temporary.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file aside, flush it to disk and rename it: readers see all of it or the old one.

    Raises:
        OutputError: the folder cannot be written or the disk is full; no partial file is left.
    """
    with new_file(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, indented; NaN and infinity are refused because JSON has none.

    Raises:
        ValueError: a number in `value` is not finite.
        OutputError: as `write_bytes`.
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, *, what: str) -> Any:
    """Read a JSON file.

    Raises:
        ArtefactError: it is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise ArtefactError(f"{what} {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ArtefactError(f"{what} {path} is not JSON: {error}") from error


def require_new_directory(path: Path) -> None:
    """Make sure that `path` can become a new folder, before the work that fills it.

    Raises:
        OutputError: something stands there already, or the place cannot be written to.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise OutputError(f"{path} exists already: remove it or choose another output folder")
    require_writable_parent(path)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Fill a folder aside and rename it to `path` only when the block ends without an error.

    Raises:
        OutputError: as `require_new_directory`, or the disk is full.
    """
    require_new_directory(path)
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
