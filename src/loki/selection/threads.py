"""Two ways to keep all processors busy with one log; numpy and HDF5 let go of Python's lock while they work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_threads(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` of each item, in order, on the processors that this process may use."""
    num_threads = max(1, min(_num_processors(), len(items)))
    # One task for each thread: handing over a task costs as much as the work of some items.
    ends = [len(items) * thread // num_threads for thread in range(num_threads + 1)]
    shares = [items[start:end] for start, end in pairwise(ends)]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(chain.from_iterable(pool.map(lambda share: [work(item) for item in share], shares)))


def read_ahead(pieces: Iterable[T]) -> Iterator[T]:
    """The same pieces, each read while the one before is worked on."""
    iterator = iter(pieces)
    end = object()
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, iterator, end)
        while (piece := following.result()) is not end:
            following = reader.submit(next, iterator, end)
            yield piece  # type: ignore[misc]  # the end marker is no piece


def _num_processors() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
