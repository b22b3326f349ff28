"""The unmodified pass over whole prompts, for the keys and values that the branches will see."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer


class UnsupportedByBranchError(Exception):
    """This model cannot be attributed by branches; `recompute` can."""


@dataclass(frozen=True)
class PaddedPrompts:
    """Prompts of one batch, padded on the left, so that every last token stands in the last column."""

    ids_NT: torch.Tensor  # noqa: N815
    """Token ids, int64."""
    mask_NT: torch.Tensor | None  # noqa: N815
    """1 for tokens and 0 for padding, int64; None where nothing is padded."""
    position_ids_NT: torch.Tensor  # noqa: N815
    """Each token's place in its own prompt, from 0; 0 for padding."""

    @classmethod
    def of(cls, prompts: Sequence[torch.Tensor]) -> PaddedPrompts:
        """Pad prompts (T,) of one device to the longest of them."""
        lengths = [len(ids_T) for ids_T in prompts]
        longest, device = max(lengths), prompts[0].device
        ids_NT = torch.stack([nn.functional.pad(ids_T, (longest - len(ids_T), 0)) for ids_T in prompts])
        padding_N1 = longest - torch.tensor(lengths, device=device)[:, None]
        position_ids_NT = torch.arange(longest, device=device)[None] - padding_N1
        mask_NT = (position_ids_NT >= 0).long()
        return cls(
            ids_NT,
            mask_NT if min(lengths) < longest else None,
            position_ids_NT.clamp(min=0),
        )


class _PrefixLayer(DynamicLayer):
    """Keys and values of one layer that queries see together with their own, and that stay as they are."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _LastLayer(DynamicLayer):
    """Takes the keys and values of the last layer and ends the pass: nothing after them is needed."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        super().update(*args, **kwargs)
        raise _PrefillDone


class _PrefillDone(Exception):  # noqa: N818  (no error: it leaves the model's forward pass)
    pass


def prefill(model: nn.Module, prompts: PaddedPrompts, num_layers: int) -> DynamicCache:
    """Run whole prompts once, for the keys and values of all columns but the last; using them changes nothing.

    All T positions are run, because position scaling may depend on the length of the prompt.

    Raises:
        UnsupportedByBranchError: the model takes no cache, or keeps something else than keys and values.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UnsupportedByBranchError("its forward pass takes no past_key_values")
    # Made without a config it keeps every position, also where a layer's window is shorter than the prompt.
    cache = DynamicCache()
    cache.layers = [*(DynamicLayer() for _ in range(num_layers - 1)), _LastLayer()]
    masks = {} if prompts.mask_NT is None else {"attention_mask": prompts.mask_NT}
    try:
        with torch.no_grad():
            model(
                input_ids=prompts.ids_NT,
                position_ids=prompts.position_ids_NT,
                past_key_values=cache,
                use_cache=True,
                **masks,
            )
    except _PrefillDone:
        pass
    if any(layer.get_seq_length() != prompts.ids_NT.shape[1] for layer in cache.layers):
        raise UnsupportedByBranchError("its layers keep something else than keys and values of every position")
    prefix = DynamicCache()
    for layer in cache.layers:
        kept = _PrefixLayer()
        kept.lazy_initialization(layer.keys, layer.values)
        kept.keys, kept.values = layer.keys[..., :-1, :], layer.values[..., :-1, :]
        prefix.layers.append(kept)
    return prefix
