"""Several examples in one sequence: whether a model keeps them apart.

TRL packs whole examples (best fit decreasing) and numbers each one's positions from 0. From these `transformers`
makes an attention mask in which an example sees itself only, and flash attention its sequence bounds; a family that
makes its mask otherwise would let examples read each other, so it is asked before training starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loki.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_LENGTH = 4
"""Tokens of each of the two examples that are packed to find out."""


@torch.no_grad()
def require_kept_apart(model: PreTrainedModel) -> None:
    """Make sure that a packed example's predictions do not depend on the example before it.

    The outputs of the second example must be the same whatever the first one says: an example that is not attended
    to has weight 0 exactly.

    Raises:
        InputError: they do.
    """
    second = torch.arange(1, PROBE_LENGTH + 1)
    positions = torch.arange(PROBE_LENGTH).repeat(2)[None].to(model.device)
    outputs = [
        model(
            input_ids=torch.cat([second.new_full((PROBE_LENGTH,), token), second])[None].to(model.device),
            position_ids=positions,
            use_cache=False,
        ).logits[0, PROBE_LENGTH:]
        for token in (5, 6)
    ]
    if not torch.equal(*outputs):
        raise InputError(
            f"packing is not possible with this {model.config.model_type!r} model: its attention lets packed examples "
            "see each other; leave packing out"
        )
