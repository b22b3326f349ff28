"""What each part of a change did: its share of what the task gained, and of what the text lost.

Turn all parts up together, from the base to what was trained, and integrate along the way the derivative of a loss
with respect to the scale of part u:

    share_u = ∫₀¹ ∂loss(s) / ∂s_u  at  s = (α, …, α)  dα

These are integrated gradients (Sundararajan, Taly and Yan, 2017, arXiv 1703.01365, equation 1) with the scales as
inputs and the base as baseline, so they add up to what the whole change did: Σ_u share_u = loss(1) − loss(0).

Shape suffixes: U units of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loki.analysis.quadrature import nodes_and_weights
from loki.dialling.adapter import DialledAdapter
from loki.progress import Track, silent

NODES = 3
"""Of Gauss and Legendre's rule, which is exact for losses that are polynomials of degree 6 in the scale."""

Losses = Callable[[], Iterator[torch.Tensor]]
"""The terms of a mean loss, one after the other: scalars that can be differentiated, each already weighted."""


@dataclass(frozen=True)
class Shares:
    """What each unit did, (U,) float64, in nats."""

    gain_U: np.ndarray  # noqa: N815
    """Fall of the task's loss; below 0 where the unit made it worse."""
    damage_U: np.ndarray  # noqa: N815
    """Rise of the divergence from the base on the text; below 0 where the unit undoes what others did."""


def integrated(
    adapter: DialledAdapter,
    losses: Losses,
    *,
    nodes: int = NODES,
    what: str = "sharing",
    track: Track = silent,
) -> np.ndarray:
    """Share of each unit (U,) in the rise of a loss between the base and the trained adapter.

    The adapter is left at scale 1.
    """
    alphas, weights = nodes_and_weights("gausslegendre", nodes)
    total_U = np.zeros(adapter.num_units)
    with adapter.differentiable():
        pairs: Sequence[tuple[float, float]] = list(zip(alphas.tolist(), weights.tolist(), strict=True))
        for alpha, weight in track(pairs, what):
            adapter.set(np.full(adapter.num_units, alpha))
            for part in adapter.parts:
                for tensor in part.tensors:
                    tensor.grad = None
            for loss in losses():
                loss.backward()  # type: ignore[no-untyped-call]
            total_U += weight * adapter.derivatives()
    adapter.set(np.ones(adapter.num_units))
    return total_U
