"""Completeness at every family's default site, and why there is none at `down_proj` where a norm follows."""

import pytest
import torch
from families import FAMILY_MODELS, draw_prompts, in_float64

from loki.analysis.attribution import attribute
from loki.architecture import FAMILIES, attribution_sites, site_warning

WITH_NORM = [name for name, case in FAMILY_MODELS.items() if FAMILIES[case.model_type].post_norm]
# The norms' epsilon ends the flat part of the path somewhere near 0; here it does so beside 0, for any activation.
SMALL_EPSILON = 1e-9
BOTH_MODULES = pytest.mark.parametrize("module", ["down_proj", "o_proj"])


@pytest.fixture(scope="module")
def prompts():
    return draw_prompts((1, 7))


def changes_and_gaps(model, prompts, rule, steps, **settings):
    """G(z) − G(0), and the sum of scores minus that, each (N, L)."""
    with in_float64():
        results = [
            attribute(model, ids_T[None], rule=rule, steps=steps, completeness=True, **settings) for ids_T in prompts
        ]
    gaps_NL = torch.cat([result.completeness_gap for result in results])
    return torch.cat([result.scores.sum(-1) for result in results]) - gaps_NL, gaps_NL


@pytest.mark.parametrize("rule", ["riemann_left", "riemann_middle"])
@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_the_gap_shrinks_with_steps_at_the_default_site(name, rule, prompts):
    """Four times the steps leave about a quarter of the gap by the left rule, a sixteenth by the middle rule."""
    model = FAMILY_MODELS[name].build(dtype=torch.float64)
    (change_NL, few_NL), (_, some_NL), (_, many_NL) = (
        changes_and_gaps(model, prompts, rule, steps) for steps in (4, 16, 64)
    )
    few, some, many = (float(gap_NL.norm()) for gap_NL in (few_NL, some_NL, many_NL))
    assert change_NL.norm() > 0.01  # taking a layer away changes the prediction: the gap is not 0 by nature
    assert few > 1e-4
    assert some < few / 2
    assert some / many > (3 if rule == "riemann_left" else 12)
    assert many < 0.05 * change_NL.norm()


def small_epsilon_model(name):
    return FAMILY_MODELS[name].build(dtype=torch.float64, rms_norm_eps=SMALL_EPSILON)


@BOTH_MODULES
@pytest.mark.parametrize("name", WITH_NORM)
def test_a_norm_makes_the_path_to_the_projection_flat(name, module, prompts):
    """RMSNorm forgets the scale of its input: G(αz) is the same for all α > 0, and falls to G(0) next to 0."""
    model, ids_1T = small_epsilon_model(name).requires_grad_(False), prompts[1][None]
    cosines = {}
    for site_name in ("down_proj", "after_norm"):
        for site in attribution_sites(model, site_name, module)[1]:
            seen = []
            with in_float64(), site.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out[0, -1])):
                target = model(input_ids=ids_1T).logits[0, -1].argmax()
            for alpha in (0.1, 0.5, 1.0):
                leaf_D = (alpha * seen[0]).requires_grad_()

                def replace(_module, _inputs, output_1TD, leaf_D=leaf_D):
                    return torch.cat([output_1TD[:, :-1], leaf_D[None, None]], dim=1)

                with in_float64(), site.register_forward_hook(replace):
                    probability = model(input_ids=ids_1T).logits[0, -1].softmax(-1)[target]
                (gradient_D,) = torch.autograd.grad(probability, leaf_D)
                cosine = torch.nn.functional.cosine_similarity(seen[0], gradient_D, dim=0)
                cosines.setdefault(site_name, []).append(abs(float(cosine)))
    # z·∇G(αz) = ∂G(αz)/∂α; what is left of it comes from the norm's epsilon.
    assert max(cosines["down_proj"]) < 1e-4
    assert sorted(cosines["after_norm"])[len(cosines["after_norm"]) // 2] > 0.05


@BOTH_MODULES
@pytest.mark.parametrize("name", WITH_NORM)
def test_nothing_converges_at_the_projection_where_a_norm_follows(name, module, prompts):
    """The left rule's sum is what its node at 0 gives, divided by m; the others see no change at all."""
    model = small_epsilon_model(name)
    settings = {"site": "down_proj", "site_module": module}
    change_NL, few_NL = changes_and_gaps(model, prompts, "riemann_middle", 4, **settings)
    _, many_NL = changes_and_gaps(model, prompts, "riemann_middle", 64, **settings)
    for gap_NL in (few_NL, many_NL):
        assert (gap_NL + change_NL).norm() < 0.01 * change_NL.norm()
    with in_float64():
        left, zero = (
            attribute(model, prompts[1][None], rule="riemann_left", steps=steps, **settings).scores for steps in (7, 1)
        )
    assert (left - zero / 7).norm() < 0.01 * left.norm()
    assert site_warning(model, "down_proj", module) is not None
