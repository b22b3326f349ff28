"""Answers item by item that are written down as they come, so that an interrupted evaluation goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from loki.errors import ArtefactError
from loki.progress import Track
from loki.provenance import read_json, write_json

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Store(Generic[T]):
    """What a model got on the items of one task, on disk, with all that decides it."""

    def __init__(self, path: Path, identity: Mapping[str, Any], read_one: Callable[[Any], T]) -> None:
        """`read_one` makes an answer of its JSON form, and raises TypeError or ValueError where it is none."""
        self.path = path
        self.identity = dict(identity)
        self._read_one = read_one

    def read(self) -> dict[str, T]:
        """What is done so far, by item.

        Raises:
            ArtefactError: the file holds something else, or answers of another evaluation.
        """
        if not self.path.exists():
            return {}
        values = read_json(self.path, what="scores")
        if not isinstance(values, dict) or not isinstance(values.get("scores"), dict):
            raise self._no_scores()
        there = values.get("identity")
        if there != self.identity:
            names = [
                name for name in self.identity if not isinstance(there, dict) or there.get(name) != self.identity[name]
            ]
            raise ArtefactError(
                f"{self.path} holds scores of another evaluation (other {', '.join(names)}): remove it or choose "
                "another folder"
            )
        try:
            return {str(id_): self._read_one(answer) for id_, answer in values["scores"].items()}
        except (TypeError, ValueError) as error:
            raise self._no_scores() from error

    def write(self, answers: Mapping[str, T]) -> None:
        """Write what is done so far, the old file whole until the new one is."""
        write_json(self.path, {"identity": self.identity, "scores": dict(answers)})

    def _no_scores(self) -> ArtefactError:
        return ArtefactError(f"{self.path} holds no scores: remove it or choose another folder")


def answer_all(
    name: str,
    ids: Sequence[str],
    answer: Callable[[Sequence[str]], Sequence[T]],
    store: Store[T] | None,
    *,
    at_once: int,
    track: Track,
) -> dict[str, T]:
    """The answers to all items of a task: those that `store` has, and `answer` to the others, some at a time."""
    done = {} if store is None else store.read()
    missing = [id_ for id_ in ids if id_ not in done]
    if done:
        logger.info("%s: %d of %d items were scored already", name, len(done), len(ids))
    chunks = [missing[start : start + at_once] for start in range(0, len(missing), at_once)]
    for chunk in track(chunks, name, sizes=[len(chunk) for chunk in chunks], unit="items"):
        done.update(zip(chunk, answer(chunk), strict=True))
        if store is not None:
            store.write(done)
    return done
