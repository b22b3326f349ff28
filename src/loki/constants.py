"""Defaults of the paper's public implementation, under its names; `loki analyse` has its own (docs/migrating.md)."""

from loki.choices import Rule

DEFAULT_IG_METHOD: Rule = "riemann_trapezoid"
DEFAULT_IG_STEPS = 7
