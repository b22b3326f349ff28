"""A part of what training changed: between a model and its base, on the straight line of their weights.

Wortsman et al., Robust fine-tuning of zero-shot models (CVPR 2022, arXiv 2109.01903, section 3) find that models on
that line often keep most of what either end can do.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch

from loki.errors import InputError

Model = TypeVar("Model", bound=torch.nn.Module)


@torch.no_grad()
def scaled_change(base: torch.nn.Module, model: Model, scale: float) -> Model:
    """A copy of `model` with the weights base + scale · (model − base); 0 is the base, 1 the model, bit for bit.

    Computed in float32 (in float64 for weights of that dtype), and rounded to the model's dtypes. Weights that are
    equal in both stay as they are, whatever the scale. `base` may lie on another device.

    Raises:
        InputError: the two have other weights by name or shape.
    """
    before = dict(base.named_parameters())
    after = dict(model.named_parameters())
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise InputError(f"model and base are not alike ({len(odd)} weights differ, such as {odd[0]}): merge it first")
    scaled = copy.deepcopy(model)
    for name, weight in scaled.named_parameters():
        start = before[name].to(weight.device)
        if start.shape != weight.shape:
            raise InputError(f"weight {name} is {list(weight.shape)}, the base's {list(start.shape)}: name its base")
        exact = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(torch.lerp(start.to(exact), weight.to(exact), scale))
    return scaled
