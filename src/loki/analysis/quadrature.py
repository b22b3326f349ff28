"""Quadrature on [0, 1]: a rule's name and number of steps give nodes and weights (LoKI eq. 5).

Every rule's weights sum to 1, so that attributions of different rules are on one scale.
"""

from __future__ import annotations

import numpy as np

from loki.choices import Rule


def nodes_and_weights(rule: Rule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes α and weights w of a rule, each (M,) float64, with M = `steps`.

    `riemann_left` k/m for k = 0…m-1; `riemann_right` k/m for k = 1…m; `riemann_middle` (k+½)/m;
    `riemann_trapezoid` k/(m-1) with halved ends (m ≥ 2); `gausslegendre` mapped from [-1, 1].
    """
    k = np.arange(steps, dtype=np.float64)
    uniform = np.full(steps, 1 / steps)
    match rule:
        case "riemann_left":
            return k / steps, uniform
        case "riemann_right":
            return (k + 1) / steps, uniform
        case "riemann_middle":
            return (k + 0.5) / steps, uniform
        case "riemann_trapezoid":
            weights = np.full(steps, 1 / (steps - 1))
            weights[[0, -1]] /= 2
            return k / (steps - 1), weights
        case "gausslegendre":
            nodes, weights = np.polynomial.legendre.leggauss(steps)
            return (nodes + 1) / 2, weights / 2
