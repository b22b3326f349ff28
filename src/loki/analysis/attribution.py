"""`attribute`: Knowledge Vector Attribution of a batch of prompts, by either engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from loki.analysis import branch, recompute
from loki.analysis.frozen import frozen
from loki.analysis.inputs import input_device, strip_padding
from loki.analysis.length_scaling import batches_of_one_scale, forget_lengths
from loki.analysis.memory import default_max_branches
from loki.analysis.path import Path, PromptAttribution
from loki.analysis.prefill import PaddedPrompts, UnsupportedByBranchError
from loki.analysis.settings import KVASettings
from loki.architecture import attribution_sites, decoder_layers, text_config
from loki.choices import EngineName, ModuleName, Objective, Rule, SiteName
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
    site_module: ModuleName = "down_proj",
    target_ids: torch.Tensor | None = None,
    completeness: bool = False,
    batch_size: int = 1,
    max_branches: int | None = None,
) -> AttributionResult:
    """Attribute each prompt's next-token prediction to the rows of every down-projection (LoKI section 3.1).

    `input_ids` is (N, T) int64; `attention_mask` (N, T) marks real tokens with 1 and padding, on either side,
    with 0. `target_ids` (N,) chooses the tokens to attribute instead of those predicted. With `completeness`
    the gap is computed for rules that have no node at 0 too, at the cost of one more evaluation a layer.
    `batch_size` prompts go through the model together, and at most `max_branches` branches at once (as many as
    fit into `loki.analysis.memory.BRANCH_BYTES` when left out): neither changes a score by more than rounding.
    The model's mode, gradients and hooks are as before afterwards, whatever happens.

    Raises:
        InputError: an unknown setting, empty prompts, or shapes that do not agree.
        ArchitectureError: the model's down-projections cannot be found.
    """
    settings = KVASettings(rule, steps, objective, multiply_by_activation, site, engine, site_module)
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} is not possible: give 1 or more")
    prompts = strip_padding(input_ids, attention_mask)
    if target_ids is not None and target_ids.shape != (len(prompts),):
        raise InputError(
            f"target_ids have shape {tuple(target_ids.shape)}: give one for each of {len(prompts)} prompts"
        )
    targets = [None] * len(prompts) if target_ids is None else [int(t) for t in target_ids]
    results = [
        result
        for start in range(0, len(prompts), batch_size)
        for result in attribute_prompts(
            model,
            prompts[start : start + batch_size],
            settings,
            target_ids=targets[start : start + batch_size],
            completeness=completeness,
            max_branches=max_branches,
        )
    ]
    gaps = [result.completeness_gap_L for result in results]
    return AttributionResult(
        scores=torch.stack([result.scores_LD for result in results]),
        target_ids=torch.tensor([result.target_id for result in results]),
        completeness_gap=torch.stack([gap for gap in gaps if gap is not None]) if gaps[0] is not None else None,
    )


def attribute_prompts(
    model: nn.Module,
    prompts: Sequence[torch.Tensor],
    settings: KVASettings,
    *,
    target_ids: Sequence[int | None] | None = None,
    completeness: bool = False,
    max_branches: int | None = None,
) -> list[PromptAttribution]:
    """Attribution of prompts (T,) without padding, as one batch; `recompute` serves where branches cannot.

    Raises:
        InputError: a target token that the model does not have, or `max_branches` below 1.
        ArchitectureError: as `attribution_sites`.
    """
    layers = list(decoder_layers(model).values())
    _, sites = attribution_sites(model, settings.site, settings.site_module)
    targets: Sequence[int | None] = [None] * len(prompts) if target_ids is None else target_ids
    for target_id in targets:
        _require_token(model, target_id)
    path = Path.of(settings, completeness=completeness)
    if max_branches is not None and max_branches < 1:
        raise InputError(f"max_branches {max_branches} is not possible: give 1 or more")
    results: dict[int, PromptAttribution] = {}
    with frozen(model):
        for batch in batches_of_one_scale(model, prompts):
            forget_lengths(model)
            found = _attribute_batch(
                model,
                [prompts[index].to(input_device(model)) for index in batch],
                layers,
                sites,
                path,
                settings,
                [targets[index] for index in batch],
                max_branches,
            )
            results.update(zip(batch, found, strict=True))
    return [results[index] for index in range(len(prompts))]


def _attribute_batch(
    model: nn.Module,
    prompts: Sequence[torch.Tensor],
    layers: Sequence[nn.Module],
    sites: Sequence[nn.Module],
    path: Path,
    settings: KVASettings,
    target_ids: Sequence[int | None],
    max_branches: int | None,
) -> list[PromptAttribution]:
    if settings.engine == "branch":
        longest = max(len(ids_T) for ids_T in prompts)
        limit = max_branches or default_max_branches(model, len(path.alphas), len(prompts), longest)
        try:
            return branch.attribute_batch(
                model, PaddedPrompts.of(prompts), layers, sites, path, settings, target_ids, limit
            )
        except UnsupportedByBranchError as reason:
            logger.warning("the branch engine cannot serve this model: %s; using recompute", reason)
    return [
        recompute.attribute_prompt(model, ids_T, sites, path, settings, target_id)
        for ids_T, target_id in zip(prompts, target_ids, strict=True)
    ]


def _require_token(model: nn.Module, token_id: int | None) -> None:
    num_tokens: int = text_config(model.config).vocab_size
    if token_id is not None and not 0 <= token_id < num_tokens:
        raise InputError(f"target token {token_id} does not exist: the model's tokens are 0 to {num_tokens - 1}")
