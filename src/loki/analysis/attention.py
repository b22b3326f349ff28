"""Attention of branches: each sees the prefix and itself, and no other branch.

As ordinary attention with a mask it would compute the scores between all branches, only to throw them away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from loki.analysis.prefill import UnsupportedByBranchError
from loki.architecture import text_config

NAME = "loki_branches"


def branch_attention(
    module: nn.Module,
    query_NHBE: torch.Tensor,
    key_NGSE: torch.Tensor,
    value_NGSE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of B branches to S−B keys of the prefix and to their own key, the last B in order.

    H query heads share G key and value heads of E elements. `attention_mask` (N, 1 or H, 1, S−B+1) is the row
    that the model made for the one query at position T. Returns (N, B, H, E), as `transformers` wants it.

    Raises:
        UnsupportedByBranchError: the model asks for a bias or a sink.
    """
    del dropout  # the model is in evaluation mode
    unknown = [name for name in ("position_bias", "s_aux", "cache") if kwargs.get(name) is not None]
    if unknown:
        raise UnsupportedByBranchError(f"{type(module).__name__} asks attention for {', '.join(unknown)}")
    num_prompts, num_heads, num_branches, size = query_NHBE.shape
    num_groups, num_prefix = key_NGSE.shape[1], key_NGSE.shape[2] - num_branches
    rows = num_heads // num_groups * num_branches
    # Heads of one group side by side: (N, G, H/G·B, E) against (N, G, P, E) needs no copies of keys.
    query_NGQE = (query_NHBE * (size**-0.5 if scaling is None else scaling)).reshape(
        num_prompts, num_groups, rows, size
    )
    sizes = [num_prefix, num_branches]
    prefix_key_NGPE, own_key_NGBE = torch.split(key_NGSE, sizes, dim=2)
    prefix_value_NGPE, own_value_NGBE = torch.split(value_NGSE, sizes, dim=2)
    grouped = (num_prompts, num_groups, num_heads // num_groups, num_branches)
    scores_NHBP = query_NGQE @ prefix_key_NGPE.transpose(-1, -2)
    own_NGRB = (query_NGQE.view(*grouped, size) * own_key_NGBE[:, :, None]).sum(-1)
    scores_NHBK = torch.cat(
        [
            scores_NHBP.view(num_prompts, num_heads, num_branches, num_prefix),
            own_NGRB.view(num_prompts, num_heads, num_branches, 1),
        ],
        dim=-1,
    )
    if softcap is not None:
        scores_NHBK = softcap * torch.tanh(scores_NHBK / softcap)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores_NHBK = scores_NHBK.masked_fill(~attention_mask, torch.finfo(scores_NHBK.dtype).min)
        else:
            scores_NHBK = scores_NHBK + attention_mask
    wide = torch.promote_types(scores_NHBK.dtype, torch.float32)
    weights_NHBK = torch.softmax(scores_NHBK, -1, dtype=wide).to(query_NHBE.dtype)
    prefix_weights_NHBP, own_weights_NHB1 = torch.split(weights_NHBK, [num_prefix, 1], dim=-1)
    output_NGQE = prefix_weights_NHBP.reshape(num_prompts, num_groups, rows, num_prefix) @ prefix_value_NGPE
    output_NGRBE = output_NGQE.view(*grouped, size) + own_weights_NHB1.view(*grouped, 1) * own_value_NGBE[:, :, None]
    return output_NGRBE.view(num_prompts, num_heads, num_branches, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, branch_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def takes_branch_attention(model: nn.Module) -> bool:
    """Whether the family's attention goes through the interface of `transformers`."""
    return bool(getattr(model, "_supports_attention_backend", False))


@contextmanager
def attention_for_branches(model: nn.Module) -> Iterator[None]:
    """Attention that keeps branches apart inside the block; what the model had before, afterwards.

    Families whose attention is their own get eager attention, or sdpa, with `BranchMasks`; flash attention
    takes no such masks.
    """
    config = text_config(model.config)
    found = config._attn_implementation
    if takes_branch_attention(model):
        config._attn_implementation = NAME
    elif found not in ("eager", "sdpa"):
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = found
