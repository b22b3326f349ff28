"""How many rows selections have in common, and how many they would have by chance.

By chance means that every selection draws as many rows as it has in each layer, at random and on its own; for two
selections the number in common is then hypergeometric in each layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

from loki.architecture import Shape
from loki.errors import ArtefactError, InputError
from loki.rows import RowSelection, load_meta, meta_path


@dataclass(frozen=True)
class Chance:
    """How many rows random selections of the same sizes have in common."""

    expected: float
    standard_deviation: float


@dataclass(frozen=True)
class Overlap:
    """What several sets of rows have in common, in one layer or in all."""

    counts: tuple[int, ...]
    """Rows of each set."""
    num_common: int
    """Rows that are in every set."""
    num_union: int
    """Rows that are in any set."""
    chance: Chance | None
    """None where the number of rows in a layer is not known."""

    @property
    def shares_percent(self) -> tuple[float | None, ...]:
        """For each set the share of its rows that all the others have too; None for an empty set."""
        return tuple(100 * self.num_common / count if count else None for count in self.counts)

    @property
    def jaccard(self) -> float | None:
        """Rows in every set over rows in any, 0 to 1; None where all sets are empty."""
        return self.num_common / self.num_union if self.num_union else None

    @property
    def z_score(self) -> float | None:
        """Standard deviations above chance; None without chance, or where chance leaves no choice."""
        if self.chance is None or self.chance.standard_deviation == 0:
            return None
        return (self.num_common - self.chance.expected) / self.chance.standard_deviation

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        chance = self.chance and {
            "expected": self.chance.expected,
            "standard_deviation": self.chance.standard_deviation,
            "z_score": self.z_score,
        }
        return {
            "counts": list(self.counts),
            "num_common": self.num_common,
            "shares_percent": list(self.shares_percent),
            "jaccard": self.jaccard,
            "chance": chance,
        }


@dataclass(frozen=True)
class SelectionOverlap:
    """What several selections have in common."""

    total: Overlap
    """Over all layers; chance draws layer by layer there too."""
    layers: tuple[Overlap, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {"total": self.total.as_dict(), "layers": [layer.as_dict() for layer in self.layers]}


def overlap(selections: Sequence[RowSelection], num_rows: int | None = None) -> SelectionOverlap:
    """Rows that are in every one of two or more selections, per layer and in all.

    `num_rows` is D, the rows of one layer, which chance needs.

    Raises:
        InputError: fewer than two selections, or of different numbers of layers.
        ArtefactError: a row of `num_rows` or more.
    """
    if len(selections) < 2:
        raise InputError(f"an overlap needs two selections or more, not {len(selections)}")
    num_layers = selections[0].num_layers
    for selection in selections:
        if selection.num_layers != num_layers:
            raise InputError(
                f"selections of {num_layers} and {selection.num_layers} layers cannot be compared: "
                "give selections for one model"
            )
        if num_rows is not None:
            selection.require_fit(num_layers=num_layers, num_rows=num_rows)
    layers = []
    mean, variance = Fraction(0), Fraction(0)
    for layer_rows in zip(*(selection.rows for selection in selections), strict=True):
        counts = tuple(map(len, layer_rows))
        sets = [set(rows) for rows in layer_rows]
        chance = None
        if num_rows is not None:
            layer_mean, layer_variance = moments_by_chance(counts, num_rows)
            chance = Chance(float(layer_mean), math.sqrt(layer_variance))
            # Layers are drawn independently, so variances add up as means do.
            mean, variance = mean + layer_mean, variance + layer_variance
        layers.append(Overlap(counts, len(set.intersection(*sets)), len(set.union(*sets)), chance))
    total = Overlap(
        counts=tuple(selection.num_selected for selection in selections),
        num_common=sum(layer.num_common for layer in layers),
        num_union=sum(layer.num_union for layer in layers),
        chance=Chance(float(mean), math.sqrt(variance)) if num_rows is not None else None,
    )
    return SelectionOverlap(total, tuple(layers))


def moments_by_chance(counts: Sequence[int], num_rows: int) -> tuple[Fraction, Fraction]:
    """Mean and variance, exactly, of the rows in every one of several random sets of `counts` out of `num_rows` rows.

    One row is in all sets with probability Π a/D, two given rows are with Π a(a−1)/(D(D−1)). For two sets these are
    the moments of the hypergeometric distribution.
    """
    num_pairs = num_rows * (num_rows - 1)
    mean = Fraction(num_rows)
    # Ordered pairs of different rows that are both in every set; a layer of one row has none.
    pairs = Fraction(num_pairs)
    for count in counts:
        mean *= Fraction(count, num_rows)
        pairs *= Fraction(count * (count - 1), num_pairs or 1)
    return mean, mean + pairs - mean**2


def load_comparable(
    paths: Sequence[Path], *, num_rows: int | None = None, shape: Shape | None = None
) -> tuple[list[RowSelection], int | None]:
    """Read positions files of one model, and find out how many rows a layer has.

    That number is `num_rows`, or the model's whose `shape` is given, or the one in the files' provenance; None where
    nothing tells.

    Raises:
        InputError: fewer than two files, `num_rows` below 1, or both `num_rows` and `shape`.
        ArtefactError: a file that cannot be read, or files of different models.
    """
    if len(paths) < 2:
        raise InputError(f"{len(paths)} positions file given: name two or more to compare")
    if num_rows is not None and shape is not None:
        raise InputError(f"--num-rows {num_rows} and --model exclude each other: give one of them")
    if num_rows is not None and num_rows < 1:
        raise InputError(f"num-rows {num_rows} is not possible: give the rows of one layer (the hidden size)")
    selections = [RowSelection.load(path) for path in paths]
    for path, selection in zip(paths, selections, strict=True):
        if selection.num_layers != selections[0].num_layers:
            raise ArtefactError(
                f"positions file {paths[0]} has {selections[0].num_layers} layers, {path} has {selection.num_layers}: "
                "compare selections for one model"
            )
    known: dict[str, _Origin] = {}
    if shape is not None:
        known["--model"] = _Origin(str(shape), shape.num_rows)
    elif num_rows is not None:
        known["--num-rows"] = _Origin(None, num_rows)
    for path in paths:
        origin = _origin(path)
        if origin is not None:
            known[f"positions file {path}"] = origin
    _require_one_model(known)
    found = next(iter(known.values())).num_rows if known else None
    if found is not None:
        for path, selection in zip(paths, selections, strict=True):
            selection.require_fit(
                num_layers=shape.num_layers if shape else selection.num_layers,
                num_rows=found,
                what=f"positions file {path}",
            )
    return selections, found


@dataclass(frozen=True)
class _Origin:
    """What is known of the rows that positions name."""

    architecture: str | None
    num_rows: int
    site_module: str | None = None
    """Whose output rows they are; a log that does not say has those of the feed-forward block."""

    def __str__(self) -> str:
        return f"{self.architecture + ', ' if self.architecture else ''}{self.num_rows} rows a layer"


def _origin(path: Path) -> _Origin | None:
    """What the provenance of positions tells of their rows."""
    meta = load_meta(path)
    log = meta.get("log") if meta else None
    if log is None:
        return None
    try:
        site_module = str(log.get("settings", {}).get("site_module", "down_proj"))
        return _Origin(log["model"].get("architecture"), int(log["num_rows"]), site_module)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(
            f"positions provenance {meta_path(path)} does not say how many rows a layer has: select again, or remove it"
        ) from error


def _require_one_model(known: dict[str, _Origin]) -> None:
    for (first, one), (second, other) in combinations(known.items(), 2):
        architectures = {one.architecture, other.architecture} - {None}
        if len(architectures) > 1 or one.num_rows != other.num_rows:
            raise ArtefactError(
                f"selections of different models cannot be compared: {first} says {one}; {second} says {other}"
            )
        if len({one.site_module, other.site_module} - {None}) > 1:
            raise ArtefactError(
                f"selections of different projections have no rows in common: {first} is of {one.site_module}, "
                f"{second} of {other.site_module}; compare selections for one of them"
            )
