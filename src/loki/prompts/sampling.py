"""Drawing prompts: so many of each subject, so many in all, or sources in given proportions.

Every draw is a seeded order of which a beginning is taken, so that a smaller draw is a part of a larger one.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

from loki.errors import InputError
from loki.prompts.prompt import Prompt


def draw(prompts: Sequence[Prompt], count: int, seed: str) -> list[Prompt]:
    """`count` prompts (all where there are fewer), without replacement, in the order in which they stood."""
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    return [prompts[index] for index in sorted(order[:count])]


def sample_per_subject(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """At most `count` prompts of each subject, in the order in which they stood; those without a subject all stay.

    Each subject has its own generator: adding a subject changes the draw of no other.

    Raises:
        InputError: `count` is below 1.
    """
    if count < 1:
        raise InputError(f"{count} samples per subject are not possible: ask for 1 or more")
    indices: defaultdict[str, list[int]] = defaultdict(list)
    kept = []
    for index, prompt in enumerate(prompts):
        if prompt.subject is None:
            kept.append(index)
        else:
            indices[prompt.subject].append(index)
    for subject, members in indices.items():
        random.Random(f"{seed} {subject}").shuffle(members)
        kept += members[:count]
    return [prompts[index] for index in sorted(kept)]


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to `shares`, by largest remainder (ties: the earlier share).

    Exact: shares count as the decimal numbers they are written as.
    """
    weights = [Fraction(str(share)) for share in shares]
    quotas = [total * weight / sum(weights) for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda index: counts[index] - quotas[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def largest_total(available: Sequence[int], shares: Sequence[float]) -> int:
    """The largest total that `apportion` can share out so that no part exceeds what is available."""
    weights = [Fraction(str(share)) for share in shares]
    # A part is its quota rounded down or up, so no total fits whose quota is `available` + 1 or more.
    total = min(int((number + 1) * sum(weights) / weight) for number, weight in zip(available, weights, strict=True))
    while any(part > number for part, number in zip(apportion(total, shares), available, strict=True)):
        total -= 1
    return total
