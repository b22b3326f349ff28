"""Rotary embeddings whose frequencies depend on the length of the prompt (dynamic NTK, LongRoPE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from loki.architecture import text_config

DEPENDENT = ("dynamic", "longrope")


def depends_on_length(model: nn.Module) -> bool:
    """Whether a prompt's positions are scaled by the longest prompt of its batch."""
    parameters = getattr(text_config(getattr(model, "config", None)), "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, Mapping))]
    return any(kind.get("rope_type") in DEPENDENT for kind in kinds)


def batches_of_one_scale(model: nn.Module, prompts: Sequence[torch.Tensor]) -> list[list[int]]:
    """Indices of prompts that may share a batch: all, or those of one length where that scales their positions."""
    if not depends_on_length(model):
        return [list(range(len(prompts)))]
    lengths = [len(ids_T) for ids_T in prompts]
    return [[index for index, found in enumerate(lengths) if found == length] for length in dict.fromkeys(lengths)]


def forget_lengths(model: nn.Module) -> None:
    """Undo what longer prompts before have left: dynamic NTK keeps the frequencies of the longest one seen."""
    for module in model.modules():
        state: dict[str, Any] = vars(module)
        for name in [name for name in state if name.endswith("max_seq_len_cached")]:
            kind = name.removesuffix("max_seq_len_cached")
            original = getattr(module, f"{kind}original_inv_freq", None)
            if isinstance(original, torch.Tensor) and hasattr(module, "original_max_seq_len"):
                setattr(module, name, module.original_max_seq_len)
                setattr(module, f"{kind}inv_freq", original.to(getattr(module, f"{kind}inv_freq").device, copy=True))
