"""How much forgetting is allowed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from loki.dialling.measure import Measured, perplexity_rise
from loki.errors import InputError


@dataclass(frozen=True)
class Budget:
    """A limit on what one measure of a text may rise to."""

    limit: float
    measure: Literal["perplexity", "kl"]
    """Rise of the perplexity in percent of the base's, or divergence from the base in nats per token."""

    def allows(self, measured: Measured, base: Measured) -> bool:
        """Whether a point is within the budget; what is not a number is not."""
        found = perplexity_rise(measured, base) if self.measure == "perplexity" else measured.kl
        return found <= self.limit

    def __str__(self) -> str:
        return (
            f"{self.limit:g} % of perplexity" if self.measure == "perplexity" else f"{self.limit:g} nats of divergence"
        )


def parse_budget(text: str) -> Budget:
    """`1%` (perplexity) or `0.02` (divergence).

    Raises:
        InputError: anything else, or not above 0.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE]-?[0-9]+)?)\s*(%?)\s*", text)
    limit = float(match[1]) if match else math.nan
    if not match or not 0 < limit < math.inf:
        raise InputError(
            f"--budget {text} is not possible: give a rise of the text's perplexity such as 1%, or a divergence from "
            "the base in nats per token such as 0.02"
        )
    return Budget(limit, "perplexity" if match[2] else "kl")
