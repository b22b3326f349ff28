"""Hidden states in front of a model's head, where the logits are nothing but the head's outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

PLAIN_HEADS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Families whose logits are the head's outputs, neither scaled nor capped."""


def plain_head(model: Any, *, trained: bool = False) -> nn.Linear | None:
    """The matrix that logits come from, where there is nothing else between hidden states and logits.

    A frozen one; with `trained`, for those who want no gradient of it, also one that is not.
    """
    head = model.get_output_embeddings() if model.config.model_type in PLAIN_HEADS else None
    if type(head) is not nn.Linear or getattr(head, "bias", None) is not None:
        return None
    weight: torch.Tensor = head.weight
    # FSDP keeps a weight in parts, which are put together only inside the model's own forward pass.
    if isinstance(weight, DTensor) or (weight.requires_grad and not trained):
        return None
    return head


@contextmanager
def inputs_only(head: nn.Linear) -> Iterator[list[torch.Tensor]]:
    """Collect what the head is given, and let it compute nothing."""
    found: list[torch.Tensor] = []

    def keep(_module: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        found.append(given[0])
        return (given[0][:, :0],)

    handle = head.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
