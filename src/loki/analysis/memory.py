"""How many branches fit into a bounded amount of memory."""

from __future__ import annotations

import torch
from torch import nn

from loki.architecture import shape_of, text_config

BRANCH_BYTES = 768 * 2**20
"""Memory for the branches under way at once, beside the model and its pass over the prompt."""


def default_max_branches(model: nn.Module, num_nodes: int, num_prompts: int, num_tokens: int) -> int:
    """As many branches, over all prompts of a batch together, as fit into `BRANCH_BYTES`; at least one a prompt.

    The first group takes most: its branches depart at the first layers and keep what the backward pass needs of
    every layer after. What a layer keeps is estimated from its widths, 8 times the hidden size, 4 times the
    intermediate size and twice the attention weights, which is what Llama's layers keep in float32.
    """
    shape = shape_of(model)
    config = text_config(model.config)
    size = torch.finfo(next(model.parameters()).dtype).bits // 8
    num_heads = getattr(config, "num_attention_heads", 1)
    layer_bytes = size * (8 * shape.num_rows + 4 * shape.num_columns) + 8 * num_heads * num_tokens
    # Logits and probabilities, and the gradients that go back.
    head_bytes = (size + 8) * getattr(config, "vocab_size", 0)
    num_branches, total = 0, 0
    for layer in range(shape.num_layers):
        added = num_nodes * num_prompts * ((shape.num_layers - layer) * layer_bytes + head_bytes)
        if total + added > BRANCH_BYTES:
            share = (BRANCH_BYTES - total) * num_nodes * num_prompts // added
            return max(num_prompts, num_branches + share)
        total += added
        num_branches += num_nodes * num_prompts
    return num_branches + num_prompts
