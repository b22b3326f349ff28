"""How long work tells whoever started it how far it is; the library itself never prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Goes through items and shows progress."""

    def __call__(
        self, items: Sequence[T], what: str, *, sizes: Sequence[int] | None = None, unit: str = ""
    ) -> Iterable[T]:
        """The items, one after the other; `what` names the work.

        Where items differ in size, item i counts as `sizes[i]` of `unit`, and the speed is shown in that unit.
        """
        ...


def silent(items: Sequence[T], what: str, *, sizes: Sequence[int] | None = None, unit: str = "") -> Iterable[T]:
    """Shows nothing."""
    del what, sizes, unit
    return items
