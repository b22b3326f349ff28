"""Captum as a third opinion: integrated gradients of a function of one layer's output at the last position."""

from typing import get_args

import pytest
import torch
from captum.attr import LayerIntegratedGradients
from families import FAMILY_MODELS, draw_prompts, in_float64
from torch import nn

from loki.analysis.attribution import attribute
from loki.architecture import attribution_sites
from loki.choices import Rule

# All is computed in float64 (1e-15 here).
SAME = 1e-9


class LastPosition(nn.Module):
    """The target's probability as a function of one site's output at the last position, and of nothing else."""

    def __init__(self, model, site, ids_T, target):
        super().__init__()
        self.model, self.site, self.ids_T, self.target = model, site, ids_T, target
        self.value = nn.Identity()

    def forward(self, z_BD):
        value_BD = self.value(z_BD)

        def replace(_module, _inputs, output_BTD):
            return torch.cat([output_BTD[:, :-1], value_BD[:, None]], dim=1)

        with self.site.register_forward_hook(replace):
            logits_BTV = self.model(input_ids=self.ids_T.expand(len(z_BD), -1)).logits
        return logits_BTV[:, -1].softmax(-1)[:, self.target]


def by_captum(model, ids_T, module, rule, steps):
    """Captum's attributions (L, D), with weights that sum to 1, and the predicted token."""
    attributions = []
    for site in attribution_sites(model, "auto", module)[1]:
        seen = []
        with torch.no_grad(), site.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.clone())):
            target = int(model(input_ids=ids_T[None]).logits[0, -1].argmax())
        z_1D = seen[0][:, -1]
        wrapper = LastPosition(model, site, ids_T, target)
        captum = LayerIntegratedGradients(wrapper, wrapper.value)
        attributions.append(
            captum.attribute(
                z_1D, baselines=torch.zeros_like(z_1D), n_steps=steps, method=rule, attribute_to_layer_input=False
            )[0].detach()
        )
    scores_LD = torch.stack(attributions)
    if rule == "riemann_trapezoid":
        scores_LD = scores_LD * steps / (steps - 1)  # Captum's weights sum to 1 − 1/m
    return scores_LD, target


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("llama", "down_proj"),
        ("gpt2", "down_proj"),
        ("gemma2", "down_proj"),
        ("falcon", "down_proj"),
        ("falcon-alibi", "down_proj"),
        ("gemma2", "o_proj"),
        ("gpt2", "o_proj"),
    ],
)
def test_captum_agrees(name, module, rule):
    model, (ids_T,), steps = FAMILY_MODELS[name].build(dtype=torch.float64), draw_prompts((9,)), 5
    with in_float64():
        result = attribute(model, ids_T[None], rule=rule, steps=steps, site_module=module)
        expected_LD, target = by_captum(model, ids_T, module, rule, steps)
    assert result.target_ids.tolist() == [target]
    differences_L = (result.scores[0] - expected_LD).norm(dim=-1) / expected_LD.norm(dim=-1)
    assert differences_L.max() < SAME
