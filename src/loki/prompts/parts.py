"""Which half of a data set an item belongs to, so that what is analysed and what is scored never meet.

The half follows from the item's id alone: it is the same in any order, in any sample and on any machine.
"""

from __future__ import annotations

import hashlib
from typing import Literal

PartName = Literal["analysis", "evaluation"]


def part_of(item_id: str) -> PartName:
    """The half of an item, by the last bit of its id's SHA-256."""
    is_odd = hashlib.sha256(item_id.encode()).digest()[-1] & 1
    return "analysis" if is_odd else "evaluation"
