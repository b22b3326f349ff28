"""Three ways to turn a change down, each with one knob from 0 (the base) to 1 (all that is worth having).

- `scale`: everything by the same factor.
- `layers`: each layer by a factor of its own. If layer l gains g_l · s for a scale s and damages d_l · s² (divergence
  is quadratic near the base, where it is least), the most gain for a given damage is had at s_l = c · g_l / d_l, cut
  off at 1: the condition of Lagrange, one ratio of marginal gain to marginal damage in all layers that are not cut off.
- `rows`: each row wholly or not at all; those with the most damage for their gain go first.

Shape suffixes: U units, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import numpy as np

from loki.dialling.shares import Shares
from loki.errors import InputError

WayName = Literal["scale", "layers", "rows"]
Knob = Callable[[float], np.ndarray]
"""From the knob's position in [0, 1] to the scales (U,)."""
HALVINGS = 60


def knobs(shares: Shares, layers_U: np.ndarray) -> Mapping[WayName, Knob]:
    """All ways to turn an adapter with these shares."""
    return {
        "scale": lambda position: np.full(len(layers_U), float(position)),
        "layers": lambda position: layer_scales(shares, layers_U, position),
        "rows": lambda position: row_scales(shares, position),
    }


def parse_ways(names: list[str] | None, *, has_rows: bool) -> tuple[WayName, ...]:
    """Ways by their names, each once; `scale` when there are none.

    Raises:
        InputError: an unknown one, or rows of an adapter without rows.
    """
    possible: tuple[WayName, ...] = get_args(WayName) if has_rows else ("scale", "layers")
    names = names or ["scale"]
    for name in names:
        if name == "rows" and not has_rows:
            raise InputError("--by rows is for LoKI adapters: a LoRA changes every row; give scale or layers")
        if name not in possible:
            raise InputError(f"--by {name} is unknown: give {', '.join(possible)}")
    return tuple(way for way in possible if way in names)


def layer_scales(shares: Shares, layers_U: np.ndarray, position: float) -> np.ndarray:
    """Scales (U,) at which Σ d_l s_l², the damage that is expected, is position² of what it is at most.

    A layer that damages nothing keeps its change; one that gains nothing loses it. The position 1 is c = ∞.
    """
    names, place_U = np.unique(layers_U, return_inverse=True)
    gain_L = np.bincount(place_U, shares.gain_U, len(names))
    damage_L = np.bincount(place_U, shares.damage_U, len(names))
    harmless_L = damage_L <= 0
    useful_L = (gain_L > 0) & ~harmless_L
    ratio_L = np.divide(gain_L, damage_L, out=np.zeros_like(gain_L), where=useful_L)

    def scales(factor: float) -> np.ndarray:
        found_L = np.where(useful_L, np.minimum(1.0, factor * ratio_L), 0.0)
        found_L[harmless_L] = 1.0
        return found_L

    def damage(factor: float) -> float:
        return float((damage_L * scales(factor) ** 2)[useful_L].sum())

    if position <= 0 or not useful_L.any():
        found_L = np.where(harmless_L & (position > 0), 1.0, 0.0)
    else:
        most = 1 / ratio_L[useful_L].min()
        low, high = 0.0, most
        target = position**2 * damage(most)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if damage(middle) < target else (low, middle)
        found_L = scales(most if position >= 1 else high)
    return np.asarray(found_L[place_U])


def row_scales(shares: Shares, position: float) -> np.ndarray:
    """Scales (U,), 0 or 1: the share `position` of all units is kept, those with most gain for their damage.

    The order is that of the angle of (damage, gain), which the ratio of the two decides where both are above 0: what
    gains without damage is kept longest, what damages without gain goes first.
    """
    angle_U = np.arctan2(shares.gain_U, shares.damage_U)
    # Below −90° lie units that lost on both: they go first too.
    order = np.argsort(angle_U, kind="stable")
    scales_U = np.ones(len(order))
    scales_U[order[: len(order) - round(position * len(order))]] = 0.0
    return scales_U
