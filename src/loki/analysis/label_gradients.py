"""The loss of labels at every position, and its gradient at the hidden states, few positions at a time.

With 49,152 tokens the logits of 2,048 positions take 400 MB in float32; log-probabilities and gradient as much again.
Shape suffixes: P positions, D hidden size, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loki.analysis.inputs import input_device
from loki.architecture import text_config
from loki.provenance import digest

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

LOGIT_BYTES = 192 * 2**20
"""Memory for the logits of one piece, their log-probabilities and the gradients of both, in float32."""


def label_gradients(
    model: nn.Module,
    output: ModelOutput,
    hidden_PD: torch.Tensor,
    labels_P: torch.Tensor | None,
    uniforms_P: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (P,) int64 and the gradient (P, D) of the sum of their losses −log p, from the body's hidden states.

    Labels are those given, or drawn with `uniforms_P`, numbers in [0, 1). The head is the model's own, whatever it
    does to its logits: the model runs with a body that returns these hidden states, in the form of `output`, which
    is what the body itself has returned.
    """
    body: nn.Module = model.base_model  # type: ignore[assignment]  # a property, which torch types as a tensor
    step = max(1, LOGIT_BYTES // (4 * 4 * int(text_config(model.config).vocab_size)))
    no_ids = torch.zeros(1, 1, dtype=torch.int64, device=input_device(model))
    chosen, gradients = [], []
    for start in range(0, len(hidden_PD), step):
        piece = slice(start, start + step)
        leaf_PD = hidden_PD[piece].detach().requires_grad_()
        with _returning(body, type(output)(**{**output, "last_hidden_state": leaf_PD[None]})):
            logits_PV = model(input_ids=no_ids, use_cache=False).logits[0].float()
        log_p_PV = logits_PV.log_softmax(-1)
        if labels_P is None:
            assert uniforms_P is not None, "labels are given or drawn"
            piece_labels = sample(log_p_PV.detach().exp(), uniforms_P[piece].to(log_p_PV))
        else:
            piece_labels = labels_P[piece].to(log_p_PV.device)
        loss = -log_p_PV.gather(-1, piece_labels[:, None]).sum()
        gradients.append(torch.autograd.grad(loss, leaf_PD)[0])
        chosen.append(piece_labels)
    return torch.cat(chosen), torch.cat(gradients)


def sample(probabilities_PV: torch.Tensor, uniforms_P: torch.Tensor) -> torch.Tensor:
    """One token for each distribution, by inverting its cumulative sum; never one of probability 0."""
    cumulative_PV = probabilities_PV.cumsum(-1)
    totals_P1 = cumulative_PV[:, -1:].contiguous()
    drawn_P1 = torch.searchsorted(cumulative_PV, uniforms_P[:, None] * totals_P1, right=True)
    # A product that rounds up to the total would lie after the last token that has a probability, and NaN after all.
    last_P1 = torch.searchsorted(cumulative_PV, totals_P1).clamp(max=cumulative_PV.shape[-1] - 1)
    return torch.minimum(drawn_P1, last_P1).squeeze(-1)


def uniforms(ids_T: torch.Tensor, seed: int) -> torch.Tensor:
    """Numbers in [0, 1), (T,) float64 on the CPU, that depend on the seed and the tokens of a text only.

    So labels are the same in every batch, process and resumed run.
    """
    generator = torch.Generator().manual_seed(int(digest([seed, ids_T.tolist()]), 16))
    return torch.rand(len(ids_T), generator=generator, dtype=torch.float64)


@contextmanager
def _returning(body: nn.Module, output: ModelOutput) -> Iterator[None]:
    """Inside, `body` computes nothing and returns this."""
    state: dict[str, Any] = vars(body)
    own = state.get("forward")  # offloading keeps a forward of its own there
    state["forward"] = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        del state["forward"]
        if own is not None:
            state["forward"] = own
