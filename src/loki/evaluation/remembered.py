"""A model that is read on the same texts again and again, and computes each of them once.

Shape suffixes: N texts, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from loki.heads import inputs_only, plain_head


class RememberedModel:
    """Reads as `model` does, bit for bit, as long as nobody changes its weights.

    Kept of each text are the hidden states in front of the head, (N, T, D) in the model's dtype and on its device: V/D
    times less than its logits. Where logits are more than the head's product with them, nothing is kept and the model
    is read each time. `reading` is what it is read within, such as `model.disable_adapter`.
    """

    def __init__(self, model: Any, *, reading: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.model = model
        self.device: torch.device = model.device
        self._reading = reading
        self._head = plain_head(model, trained=True)
        self._kept: dict[tuple[torch.Size, bytes], torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        """What has `logits` (N, T, V), without a gradient, of tokens (N, T) that are all real."""
        if self._head is None:
            with self._reading():
                return SimpleNamespace(logits=self.model(input_ids=input_ids, use_cache=use_cache).logits)
        key = (input_ids.shape, input_ids.cpu().numpy().tobytes())
        if key not in self._kept:
            with self._reading(), inputs_only(self._head) as inputs_of_head:
                self.model(input_ids=input_ids, use_cache=use_cache)
            (self._kept[key],) = inputs_of_head
        return SimpleNamespace(logits=self._head(self._kept[key]))
