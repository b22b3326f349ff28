"""What was learned on examples of one's own: the loss of their completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from loki.progress import Track, silent
from loki.prompts.render import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def completion_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    max_length: int | None = 2048,
    track: Track = silent,
) -> list[float]:
    """Mean negative log-likelihood of each example's completion, in nats per token, end token included.

    `examples` are in the form of `loki.training.examples.load_examples`. An example whose prompt alone
    reaches `max_length` counts the tokens that are left of it at the end.
    """
    with torch.no_grad():
        return [
            float(completion_loss(model, tokenizer, example, max_length=max_length))
            for example in track(examples, "reading")
        ]


def completion_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    example: Mapping[str, Any],
    *,
    max_length: int | None = 2048,
) -> torch.Tensor:
    """One example's entry of `completion_losses`, a scalar that can be differentiated."""
    special = tokenizer.chat_template is None
    prompt = tokenizer(render_chat(tokenizer, example["prompt"]), add_special_tokens=special).input_ids
    completion_text = "".join(message["content"] for message in example["completion"])
    completion = [*tokenizer(completion_text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = torch.tensor([*prompt, *completion][-max_length:] if max_length else [*prompt, *completion])
    num_scored = min(len(completion), len(ids) - 1)
    logits_TV = model(input_ids=ids[None].to(model.device)).logits[0].float()
    log_probabilities = logits_TV[-num_scored - 1 : -1].log_softmax(-1)
    chosen = log_probabilities.gather(-1, ids[-num_scored:, None].to(model.device))
    loss: torch.Tensor = -chosen.mean()
    return loss
