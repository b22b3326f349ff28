"""What an attribution log says about itself, and the names under which HDF5 holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from loki.provenance import versions

SCHEMA_VERSION = 1

SCORES = "dataset"
"""(N, L, D) scores; the public implementation's name for it."""
PROMPT_IDS = "prompt_ids"
"""(N,) strings."""
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
    schema_version: int = SCHEMA_VERSION
    versions: Mapping[str, str] = field(default_factory=versions)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """What decides whether a run may go on: everything but package versions."""
        values = self.as_dict()
        del values["versions"]
        return values
