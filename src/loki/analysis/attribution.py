"""`attribute`: Knowledge Vector Attribution of a batch of prompts, by either engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from loki.analysis import branch, recompute
from loki.analysis.path import Path, PromptAttribution
from loki.analysis.settings import KVASettings
from loki.architecture import attribution_sites
from loki.choices import EngineName, Objective, Rule, SiteName
from loki.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttributionResult:
    """Attribution of N prompts."""

    scores: torch.Tensor
    """(N, L, D) float32 on the CPU: the contribution of every row to the predicted token."""
    target_ids: torch.Tensor
    """(N,) int64: the attributed token of each prompt."""
    completeness_gap: torch.Tensor | None
    """(N, L) float32: sum of scores minus [G(z) − G(0)]; it falls to 0 as steps grow. None where G(0) is unknown."""


def attribute(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    rule: Rule = "riemann_left",
    steps: int = 7,
    objective: Objective = "probability",
    multiply_by_activation: bool = True,
    site: SiteName = "auto",
    engine: EngineName = "branch",
    target_ids: torch.Tensor | None = None,
    completeness: bool = False,
) -> AttributionResult:
    """Attribute each prompt's next-token prediction to the rows of every down-projection (LoKI section 3.1).

    `input_ids` is (N, T) int64; `attention_mask` (N, T) marks real tokens with 1 and padding, on either side,
    with 0. Prompts are attributed one at a time, so padding changes nothing. `target_ids` (N,) chooses the
    tokens to attribute instead of those predicted. With `completeness` the gap is computed for rules that have
    no node at 0 too, at the cost of one more evaluation a layer. The model's mode, gradients and hooks are
    as before afterwards, whatever happens.

    Raises:
        InputError: an unknown setting, empty prompts, or shapes that do not agree.
        ArchitectureError: the model's down-projections cannot be found.
    """
    settings = KVASettings(rule, steps, objective, multiply_by_activation, site, engine)
    prompts = _strip_padding(input_ids, attention_mask)
    if target_ids is not None and target_ids.shape != (len(prompts),):
        raise InputError(
            f"target_ids have shape {tuple(target_ids.shape)}: give one for each of {len(prompts)} prompts"
        )
    targets = [None] * len(prompts) if target_ids is None else [int(t) for t in target_ids]
    results = [
        attribute_prompt(model, ids_T, settings, target_id=target, completeness=completeness)
        for ids_T, target in zip(prompts, targets, strict=True)
    ]
    gaps = [result.completeness_gap_L for result in results]
    return AttributionResult(
        scores=torch.stack([result.scores_LD for result in results]),
        target_ids=torch.tensor([result.target_id for result in results]),
        completeness_gap=torch.stack([gap for gap in gaps if gap is not None]) if gaps[0] is not None else None,
    )


def attribute_prompt(
    model: nn.Module,
    input_ids_T: torch.Tensor,
    settings: KVASettings,
    *,
    target_id: int | None = None,
    completeness: bool = False,
) -> PromptAttribution:
    """Attribution of one prompt (T,) without padding; falls back to `recompute` where branches cannot serve."""
    _, sites = attribution_sites(model, settings.site)
    if target_id is not None:
        _require_token(model, target_id)
    path = Path.of(settings, completeness=completeness)
    ids_T = input_ids_T.to(next(model.parameters()).device)
    with _frozen(model):
        if settings.engine == "branch":
            try:
                return branch.attribute_prompt(model, ids_T, sites, path, settings, target_id)
            except branch.UnsupportedByBranchError as reason:
                logger.warning("the branch engine cannot serve this model: %s; using recompute", reason)
        return recompute.attribute_prompt(model, ids_T, sites, path, settings, target_id)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside the block; every flag put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


def _require_token(model: nn.Module, token_id: int) -> None:
    num_tokens: int = getattr(model.config, "vocab_size")  # noqa: B009  (nn.Module has no typed attributes)
    if not 0 <= token_id < num_tokens:
        raise InputError(f"target token {token_id} does not exist: the model's tokens are 0 to {num_tokens - 1}")


def _strip_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
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
