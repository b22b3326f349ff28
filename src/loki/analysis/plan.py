"""Which prompts are computed and saved together, and by whom; it depends on the prompts only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from loki.errors import InputError

PROMPTS_PER_PART = 16


@dataclass(frozen=True)
class Plan:
    """Parts of a log: each is saved when all its batches are computed."""

    parts: list[list[int]]
    """Places of each part's prompts in the prompt set."""
    batch_size: int
    """Prompts that go through the model together."""

    @classmethod
    def of(cls, lengths: Sequence[int], batch_size: int, shard: tuple[int, int] | None = None) -> Plan:
        """Prompts of like length side by side, so that little is padded; for a shard (i, n), its part of them.

        The part with the longest prompts comes first: what memory does not allow, it shows at once. The others
        follow in a fixed random order, so that the time that is left can be told from the time that is gone.

        Raises:
            InputError: a batch size below 1, or more shards than parts.
        """
        if batch_size < 1:
            raise InputError(f"batch size {batch_size} is not possible: give 1 or more")
        size = batch_size * max(1, PROMPTS_PER_PART // batch_size)
        order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        shorter = parts[1:]
        random.Random(0).shuffle(shorter)
        parts = [*parts[:1], *shorter]
        if shard is not None:
            number, count = shard
            if count > len(parts):
                raise InputError(
                    f"{count} shards are more than the {len(parts)} parts of {size} prompts that there are: "
                    f"use at most {len(parts)}"
                )
            parts = parts[number - 1 :: count]
        return cls(parts, batch_size)

    def batches(self, part: int) -> list[list[int]]:
        """One part's prompts in batches."""
        places = self.parts[part]
        return [places[start : start + self.batch_size] for start in range(0, len(places), self.batch_size)]
