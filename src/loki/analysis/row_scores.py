"""Scores of rows over all positions of a text: what a change of a row would do to the model's predictions.

For a text of T tokens and a projection z_t = W u_t at its position t, let ℓ be the sum of −log p(y_t | x_≤t) over P
positions and g_t its gradient with respect to z_t. Row j's scores are

- `damage`           Σ_t g_tj² ‖u_t‖² / P       labels y_t drawn from the model itself, once, at all P = T positions
- `fisher`           ‖Σ_t g_tj u_t‖² / P        the same labels; the squared gradient of the row (Fisher information)
- `first_order`      |Σ_t g_tj (z_tj − b_j)| / P    labels are the next tokens of the text, P = T − 1: what setting
                     the row to zero does to the loss, to first order (Molchanov et al. 2019)
- `activation_norm`  Σ_t z_tj² / P              no labels, P = T

All layers and rows take one forward and one backward pass. `docs/damage.md` derives what `damage` leaves out.
Shape suffixes: N texts, T positions, P those of all texts together, L layers, D rows, F inputs of the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import nn

from loki.analysis.frozen import frozen
from loki.analysis.hooks import hooked
from loki.analysis.inputs import input_device, strip_padding
from loki.analysis.label_gradients import label_gradients, uniforms
from loki.analysis.length_scaling import batches_of_one_scale, forget_lengths
from loki.analysis.path import PromptAttribution
from loki.analysis.settings import RowScoreSettings
from loki.architecture import attribution_sites
from loki.choices import ModuleName, RowScoreName
from loki.errors import InputError

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

NO_TOKEN = -1
"""In place of a target token where none is predicted."""


def score_rows(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    score: RowScoreName = "damage",
    seed: int = 0,
    site_module: ModuleName = "down_proj",
    batch_size: int = 1,
) -> torch.Tensor:
    """Scores of every row of every down-projection for each text, (N, L, D) float32 on the CPU, 0 or more.

    `input_ids` is (N, T) int64; `attention_mask` (N, T) marks real tokens with 1 and padding, on either side, with
    0. Labels that are drawn depend on `seed` and on the tokens of their own text. `batch_size` texts go through the
    model together, which changes a score by rounding only. The model's mode, gradients and hooks are as before
    afterwards, whatever happens.

    Raises:
        InputError: an unknown setting, empty texts, one of a single token for `first_order`, or shapes that do not
            agree.
        ArchitectureError: the model's projections cannot be found, or it attends to later tokens.
    """
    settings = RowScoreSettings(score, seed, site_module=site_module)
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} is not possible: give 1 or more")
    texts = strip_padding(input_ids, attention_mask)
    for number, ids_T in enumerate(texts):
        require_predictions(f"text {number}", ids_T, settings)
    return torch.stack(
        [
            found.scores_LD
            for start in range(0, len(texts), batch_size)
            for found in score_texts(model, texts[start : start + batch_size], settings)
        ]
    )


def require_predictions(what: str, ids_T: torch.Tensor, settings: RowScoreSettings) -> None:
    """Make sure that a text has what its score takes.

    Raises:
        InputError: a single token, where labels are next tokens.
    """
    if settings.score == "first_order" and len(ids_T) < 2:
        raise InputError(f"{what} has 1 token, first_order needs a next one: give 2 or more, or another score")


def score_texts(model: nn.Module, texts: Sequence[torch.Tensor], settings: RowScoreSettings) -> list[PromptAttribution]:
    """Scores of texts (T,) without padding, as one batch; the target is the last label, or `NO_TOKEN`.

    Raises:
        ArchitectureError: as `attribution_sites`.
    """
    _, sites = attribution_sites(model, "down_proj", settings.site_module)
    results: dict[int, PromptAttribution] = {}
    with frozen(model):
        for batch in batches_of_one_scale(model, texts):
            forget_lengths(model)
            found = _score_batch(model, [texts[index] for index in batch], sites, settings)
            results.update(zip(batch, found, strict=True))
    return [results[index] for index in range(len(texts))]


def _score_batch(
    model: nn.Module, texts: Sequence[torch.Tensor], sites: Sequence[nn.Module], settings: RowScoreSettings
) -> list[PromptAttribution]:
    body: nn.Module = model.base_model  # type: ignore[assignment]  # a property, which torch types as a tensor
    lengths = [len(ids_T) for ids_T in texts]
    # Padded on the right: attention is causal, so a text's own positions see nothing of it, and need no mask.
    ids_NT = nn.utils.rnn.pad_sequence(list(texts), batch_first=True).to(input_device(model))
    totals: dict[int, list[torch.Tensor]] = {}

    def note(layer: int, kept_NTX: torch.Tensor, gradients_NTD: torch.Tensor) -> None:
        totals[layer] = [
            position_sum(settings.score, kept_TX[:length], gradients_TD[:length]).cpu()
            for kept_TX, gradients_TD, length in zip(kept_NTX, gradients_NTD, lengths, strict=True)
        ]

    def observe(layer: int, site: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        kept_NTX = _kept(settings.score, site, inputs[0].detach(), output.detach())
        if settings.score == "activation_norm":
            note(layer, kept_NTX, kept_NTX)
            return output
        if not output.requires_grad:
            # The first one: nothing before it has a gradient. No leaf, because Falcon adds to the output in place.
            output = output.detach().requires_grad_().clone()
        output.register_hook(partial(note, layer, kept_NTX))  # type: ignore[no-untyped-call]  # torch has no types for it
        return output

    with hooked([(site, "after", partial(observe, layer)) for layer, site in enumerate(sites)]):
        if settings.score == "activation_norm":
            with torch.no_grad():
                body(input_ids=ids_NT, use_cache=False)
            targets = [NO_TOKEN] * len(texts)
        else:
            targets = _send_back(model, texts, body(input_ids=ids_NT, use_cache=False), settings)
    counts = [length - (settings.score == "first_order") for length in lengths]
    sums_NLD = [torch.stack([totals[layer][n] for layer in range(len(sites))]) for n in range(len(texts))]
    return [
        PromptAttribution((sums_LD / count).float(), target, None)
        for sums_LD, count, target in zip(sums_NLD, counts, targets, strict=True)
    ]


def _send_back(
    model: nn.Module, texts: Sequence[torch.Tensor], output: ModelOutput, settings: RowScoreSettings
) -> list[int]:
    """Send the gradient of all losses back from the body's hidden states; the last label of each text."""
    hidden_NTD: torch.Tensor = output["last_hidden_state"]
    num_predicted = [len(ids_T) - (not settings.samples_labels) for ids_T in texts]
    rows = torch.cat([torch.full((count,), n) for n, count in enumerate(num_predicted)]).to(hidden_NTD.device)
    columns = torch.cat([torch.arange(count) for count in num_predicted]).to(hidden_NTD.device)
    hidden_PD = hidden_NTD.detach()[rows, columns]
    if settings.samples_labels:
        draws_P = torch.cat([uniforms(ids_T, settings.seed) for ids_T in texts])
        labels_P, gradients_PD = label_gradients(model, output, hidden_PD, None, draws_P)
    else:
        next_ids_P = torch.cat([ids_T[1:] for ids_T in texts])
        labels_P, gradients_PD = label_gradients(model, output, hidden_PD, next_ids_P, None)
    gradients_NTD = torch.zeros_like(hidden_NTD)
    gradients_NTD[rows, columns] = gradients_PD
    torch.autograd.backward(hidden_NTD, gradients_NTD)
    return [int(labels_P[end - 1]) for end in accumulate(num_predicted)]


def _kept(score: RowScoreName, site: nn.Module, inputs_NTF: torch.Tensor, outputs_NTD: torch.Tensor) -> torch.Tensor:
    """What `position_sum` needs of the forward pass, (N, T, X)."""
    match score:
        case "damage":
            return _widened(inputs_NTF).square().sum(-1, keepdim=True)
        case "fisher":
            return inputs_NTF
        case "first_order":
            return _widened(outputs_NTD) - _bias(site, _widened(outputs_NTD))
        case "activation_norm":
            return outputs_NTD


def position_sum(score: RowScoreName, kept_TX: torch.Tensor, gradients_TD: torch.Tensor) -> torch.Tensor:
    """One text's scores of a layer times its number of positions, (D,) in float32 or wider.

    `kept_TX` is ‖u_t‖² (X = 1) for `damage`, u_t (X = F) for `fisher`, z_t − b (X = D) for `first_order` and z_t for
    `activation_norm`, which takes no gradient.
    """
    kept_TX, gradients_TD = _widened(kept_TX), _widened(gradients_TD)
    match score:
        case "damage":
            return (gradients_TD.square() * kept_TX).sum(0)
        case "fisher":
            return (gradients_TD.T @ kept_TX).square().sum(-1)
        case "first_order":
            return (gradients_TD * kept_TX).sum(0).abs()
        case "activation_norm":
            return kept_TX.square().sum(0)


def _bias(site: nn.Module, like: torch.Tensor) -> torch.Tensor:
    """A projection's bias, which zeroing its weights leaves; fetched where it was put aside."""
    from accelerate.utils import align_module_device

    with align_module_device(site):
        bias: torch.Tensor | None = getattr(site, "bias", None)
        return torch.zeros_like(like[0, 0]) if bias is None else bias.detach().to(like, copy=True)


def _widened(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
