"""Token ids that callers give, as the engines take them."""

from __future__ import annotations

import torch
from torch import nn

from loki.errors import InputError


def strip_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The prompts (T,) of a batch (N, T) without their padding, which the mask marks with 0.

    Raises:
        InputError: empty prompts, or shapes that do not agree.
    """
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise InputError(f"input_ids have shape {tuple(input_ids.shape)}: give (prompts, tokens), both at least 1")
    if attention_mask is None:
        return list(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}: "
            "they must be equal"
        )
    prompts = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    if any(len(prompt) == 0 for prompt in prompts):
        raise InputError("a prompt has no tokens: its attention_mask is all zero")
    return prompts


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go; the hooks of an offloaded model bring them to where its weights will be."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
