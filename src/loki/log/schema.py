"""What an attribution log says about itself, and the names under which HDF5 and part files hold it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from loki.errors import InputError
from loki.provenance import versions

SCHEMA_VERSION = 2

SCORES = "dataset"
"""(N, L, D) scores; the public implementation's name for it."""
PROMPT_IDS = "prompt_ids"
"""(N,) strings."""
PROMPT_INDEX = "prompt_index"
"""(N,) int64 place of each prompt in the whole prompt set, ascending; a shard's log has some of them."""
TARGET_IDS = "target_ids"
"""(N,) int64 token ids that the model predicted."""
NUM_TOKENS = "num_tokens"
"""(N,) int64 prompt lengths T."""
COMPLETENESS_GAPS = "completeness_gaps"
"""(N, L) float32 completeness gaps; NaN where they are not known."""
HEADER = "header"
"""Root attribute: the `LogHeader` as JSON."""


@dataclass(frozen=True)
class LogHeader:
    """Everything that has to be equal for two runs to belong to one log."""

    model: Mapping[str, str]
    """`ModelFingerprint.as_dict()`."""
    model_name: str
    prompts: str
    """Name and digest of the prompt set."""
    settings: Mapping[str, Any]
    """All attribution settings by name."""
    num_layers: int
    num_rows: int
    dtype: str = "float32"
    """float32 or float16."""
    num_prompts: int | None = None
    """Prompts of the whole set, of which a shard's log holds some; `LogWriter` fills it in."""
    shard: str | None = None
    """Which part of the prompt set this is, such as `2/4`; None for all of it."""
    schema_version: int = SCHEMA_VERSION
    versions: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        if self.shard is not None:
            parse_shard(self.shard)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """What decides whether logs belong together, as JSON gives it back: all but package versions and shard."""
        values: dict[str, Any] = json.loads(json.dumps(self.as_dict()))
        del values["versions"], values["shard"]
        return values


@dataclass(frozen=True)
class Column:
    """A dataset with one entry for each prompt, which attribution computes."""

    name: str
    """In HDF5 and in part files."""
    attribute: str
    """In `Batch`."""
    dtype: str | None
    """None: the log's own."""
    axes: tuple[str, ...] = ()
    """Dimensions after the prompts', each named by the field of `LogHeader` that has its size."""

    @property
    def is_large(self) -> bool:
        """Whether it is too large to hold for all prompts at once."""
        return "num_rows" in self.axes

    def dtype_in(self, header: LogHeader) -> str:
        """Its dtype in one log."""
        return self.dtype or header.dtype

    def shape_in(self, header: LogHeader, num_prompts: int) -> tuple[int, ...]:
        """Its shape in one log."""
        return (num_prompts, *(getattr(header, axis) for axis in self.axes))


COLUMNS = (
    Column(SCORES, "scores_NLD", None, ("num_layers", "num_rows")),
    Column(TARGET_IDS, "target_ids_N", "int64"),
    Column(NUM_TOKENS, "num_tokens_N", "int64"),
    Column(COMPLETENESS_GAPS, "completeness_gaps_NL", "float32", ("num_layers",)),
)


def parse_shard(text: str) -> tuple[int, int]:
    """Which shard, counted from 1, and of how many.

    Raises:
        InputError: not of the form i/n, or i not from 1 to n.
    """
    match = re.fullmatch(r"([1-9][0-9]*)/([1-9][0-9]*)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise InputError(f"shard {text!r} is not possible: give i/n with i from 1 to n, such as 2/4")
    return int(match[1]), int(match[2])


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Where two identities differ, for a message: `settings (steps: 7, here 5), num_rows (64, here 32)`."""
    return ", ".join(
        f"{key} ({_difference(found.get(key), expected.get(key))})"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    )


def _difference(found: Any, expected: Any) -> str:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        return "; ".join(
            f"{key}: {found.get(key)}, here {expected.get(key)}"
            for key in sorted(found.keys() | expected.keys())
            if found.get(key) != expected.get(key)
        )
    return f"{found}, here {expected}"
