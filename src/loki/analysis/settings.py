"""The settings of Knowledge Vector Attribution (the paper and its releases differ, so each is named), and of the
scores that take a whole text instead of its last position."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import get_args

from loki.choices import EngineName, ModuleName, Objective, RowScoreName, Rule, SiteName
from loki.errors import InputError


@dataclass(frozen=True)
class KVASettings:
    """How attribution is computed; the defaults are those that made the paper's published positions."""

    rule: Rule = "riemann_left"
    """Quadrature rule along the path from zero to the activation."""
    steps: int = 7
    """Nodes of the rule (m in the paper)."""
    objective: Objective = "probability"
    """What is differentiated, for the token that the unmodified model predicts."""
    multiply_by_activation: bool = True
    """Integrated gradients have it; the paper's equation 4 leaves it out."""
    site: SiteName = "auto"
    """Which output is scaled; see `loki.architecture.attribution_sites`."""
    engine: EngineName = "branch"
    """`branch` (fast, exact) or `recompute` (the plain definition)."""
    site_module: ModuleName = "down_proj"
    """Whose rows are attributed: the feed-forward block's output projection, or attention's."""

    def __post_init__(self) -> None:
        for name, value, accepted in (
            ("rule", self.rule, get_args(Rule)),
            ("objective", self.objective, get_args(Objective)),
            ("site", self.site, get_args(SiteName)),
            ("engine", self.engine, get_args(EngineName)),
            ("site_module", self.site_module, get_args(ModuleName)),
        ):
            if value not in accepted:
                raise InputError(f"{name} {value!r} is unknown: choose one of {', '.join(accepted)}")
        least = 2 if self.rule == "riemann_trapezoid" else 1
        if self.steps < least:
            raise InputError(f"steps {self.steps} is too few for the rule {self.rule}: give {least} or more")

    def as_dict(self) -> dict[str, str | int | bool]:
        """Plain JSON form."""
        return asdict(self)


SAMPLING_SCORES: tuple[RowScoreName, ...] = ("damage", "fisher")
"""Scores whose labels are drawn from the model itself."""


@dataclass(frozen=True)
class RowScoreSettings:
    """How rows are scored over all positions of a text; the formulas are in `loki.analysis.row_scores`."""

    score: RowScoreName = "damage"
    """What is computed."""
    seed: int = 0
    """Of the labels that are drawn; other scores draw none."""
    max_tokens: int = 512
    """Longer texts are cut into windows of at most so many tokens, each scored by itself."""
    site_module: ModuleName = "down_proj"
    """Whose rows are scored: the feed-forward block's output projection, or attention's."""

    def __post_init__(self) -> None:
        for name, value, accepted in (
            ("score", self.score, get_args(RowScoreName)),
            ("site_module", self.site_module, get_args(ModuleName)),
        ):
            if value not in accepted:
                raise InputError(f"{name} {value!r} is unknown: choose one of {', '.join(accepted)}")
        if self.seed < 0:
            raise InputError(f"seed {self.seed} is not possible: give 0 or more")
        if self.max_tokens < 2:
            raise InputError(f"max_tokens {self.max_tokens} is not possible: give 2 or more")

    @property
    def samples_labels(self) -> bool:
        """Whether labels are drawn from the model itself."""
        return self.score in SAMPLING_SCORES

    def as_dict(self) -> dict[str, str | int]:
        """Plain JSON form; a score that draws nothing has no seed."""
        values: dict[str, str | int] = asdict(self)
        if not self.samples_labels:
            del values["seed"]
        return values
