"""RowSelection: the rows chosen in every layer; the contract between selecting and implanting.

On disk it is a JSON list of L lists of row indices, in any order (the public implementation's form).
Where it came from goes into a sibling `<name>.meta.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from loki.choices import ModuleName
from loki.errors import ArtefactError, InputError
from loki.provenance import read_json, require_writable_parent, write_json


@dataclass(frozen=True)
class RowSelection:
    """Sorted, distinct row indices of each layer's output projection."""

    rows: tuple[tuple[int, ...], ...]
    """One tuple of row indices for each of the L layers, ascending; a layer may have none."""

    @classmethod
    def from_lists(cls, lists: Any, *, what: str = "positions") -> RowSelection:
        """Validate lists of row indices, in any order, and sort them.

        Raises:
            ArtefactError: not a list of lists of distinct non-negative integers, or no row at all.
        """
        if not _is_list(lists) or not all(_is_list(rows) for rows in lists):
            raise ArtefactError(f"{what} must be a list with one list of row indices for each layer")
        for layer, rows in enumerate(lists):
            for row in rows:
                if isinstance(row, bool) or not isinstance(row, int) or row < 0:
                    raise ArtefactError(f"{what}: layer {layer} has {row!r}, which is not a row index (0, 1, 2, …)")
            if len(set(rows)) != len(rows):
                twice = next(row for row in rows if rows.count(row) > 1)
                raise ArtefactError(f"{what}: layer {layer} names row {twice} twice; each row may occur once")
        if not any(lists):
            raise ArtefactError(f"{what} name no row at all; select with a larger quota")
        return cls(tuple(tuple(sorted(rows)) for rows in lists))

    @classmethod
    def load(cls, path: str | Path) -> RowSelection:
        """Read a positions file.

        Raises:
            ArtefactError: missing, not JSON, or as `from_lists`.
        """
        path = Path(path)
        return cls.from_lists(read_json(path, what="positions file"), what=f"positions file {path}")

    def save(self, path: str | Path, *, meta: Mapping[str, Any] | None = None) -> None:
        """Write the positions file, and `<name>.meta.json` beside it when `meta` is given.

        Raises:
            OutputError: the folder cannot be written.
        """
        path = Path(path)
        require_writable_parent(path)
        # Provenance of rows that stood here before must never pass for that of these.
        meta_path(path).unlink(missing_ok=True)
        write_json(path, self.as_lists())
        if meta is not None:
            write_json(meta_path(path), dict(meta))

    def as_lists(self) -> list[list[int]]:
        """Plain lists, ready for JSON."""
        return [list(rows) for rows in self.rows]

    def as_mask(self, num_rows: int) -> np.ndarray:
        """Whether each row is chosen, (L, D) bool; the rows must fit (`require_fit`)."""
        mask_LD = np.zeros((self.num_layers, num_rows), dtype=bool)
        for layer, rows in enumerate(self.rows):
            mask_LD[layer, list(rows)] = True
        return mask_LD

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.rows)

    @property
    def num_selected(self) -> int:
        """Rows chosen over all layers."""
        return sum(map(len, self.rows))

    def require_fit(self, *, num_layers: int, num_rows: int, what: str = "positions") -> None:
        """Make sure that the rows exist in a model of L layers and D rows.

        Raises:
            ArtefactError: another number of layers, or an index of D or more.
        """
        if self.num_layers != num_layers:
            raise ArtefactError(
                f"{what} have {self.num_layers} layers, the model has {num_layers}: "
                "use the positions that were selected for this model"
            )
        for layer, rows in enumerate(self.rows):
            if rows and rows[-1] >= num_rows:
                raise ArtefactError(
                    f"{what}: layer {layer} names row {rows[-1]}, but the model's rows are 0 to {num_rows - 1}: "
                    "use the positions that were selected for this model"
                )


def named_for(module_name: str, names: Iterable[str]) -> str | None:
    """Which of `names` means this module: its full name, or the longest one that ends it after a dot."""
    fitting = [name for name in names if module_name == name or module_name.endswith(f".{name}")]
    return max(fitting, key=len, default=None)


def meta_path(path: Path) -> Path:
    """Where the provenance of a positions file stands."""
    return path.with_name(path.name.removesuffix(".json") + ".meta.json")


def load_meta(path: str | Path) -> dict[str, Any] | None:
    """Provenance of a positions file, or None where it has none (files of the public implementation)."""
    sibling = meta_path(Path(path))
    if not sibling.exists():
        return None
    meta = read_json(sibling, what="positions provenance")
    if not isinstance(meta, dict):
        raise ArtefactError(f"positions provenance {sibling} must be a JSON object")
    return meta


def module_of(path: str | Path, given: ModuleName | None = None) -> ModuleName:
    """The projection whose rows a positions file names: as its provenance says, else `given`, else down_proj.

    Raises:
        InputError: `given` is not the one that its provenance says.
        ArtefactError: damaged provenance.
    """
    ((module, _),) = _by_module([path], given).items()
    return module


def load_by_module(paths: Sequence[str | Path], given: ModuleName | None = None) -> dict[ModuleName, RowSelection]:
    """Positions files by the projection whose rows they name; `given` is that of a file that does not say.

    Raises:
        InputError: two files of the same projection, or none of `given`.
        ArtefactError: a file that `RowSelection.load` refuses, or damaged provenance.
    """
    return {module: RowSelection.load(path) for module, path in _by_module(paths, given).items()}


def _by_module(paths: Sequence[str | Path], given: ModuleName | None) -> dict[ModuleName, str | Path]:
    found: dict[ModuleName, str | Path] = {}
    for path in paths:
        module = _module_said(path) or given or "down_proj"
        if module in found:
            raise InputError(f"positions file {path} names rows of {module}, as another does: give one of them")
        found[module] = path
    if given is not None and given not in found:
        module, path = next(iter(found.items()))
        raise InputError(
            f"positions file {path} names rows of {module}, where {given}'s are wanted: give a file of those"
        )
    return found


def _module_said(path: str | Path) -> ModuleName | None:
    """What the provenance of positions says of whose they are; that of random rows says nothing."""
    meta = load_meta(path)
    log = meta.get("log") if meta else None
    if log is None:
        return None
    settings = log.get("settings", {}) if isinstance(log, dict) else None
    # Logs from before there was a choice do not say.
    said: ModuleName | None = settings.get("site_module", "down_proj") if isinstance(settings, dict) else None
    if said not in get_args(ModuleName):
        raise ArtefactError(
            f"positions provenance {meta_path(Path(path))} does not say whose rows they are: select again, or remove it"
        )
    return said


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
