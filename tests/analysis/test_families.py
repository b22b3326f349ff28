"""Every family: branches against recomputation, batches against one prompt alone, and what is refused."""

import functools
import itertools
from typing import get_args

import pytest
import torch
from families import FAMILY_MODELS, NUM_ROWS, NUM_TOKENS, SWITCH, WINDOW, draw_prompts, in_float64
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from loki.analysis.attribution import attribute
from loki.architecture import FAMILIES, attribution_sites
from loki.choices import EngineName, ModuleName, Objective, Rule
from loki.errors import ArchitectureError

# ‖a−b‖/‖b‖ per prompt and layer. In float64 throughout, the same sums in another order differ by 1e-14 here,
# so that 1e-9 leaves nothing but differences of method. In float32 they differ by up to 2e-5 (RMSNorm and
# softmax amplify rounding where numbers cancel).
SAME_FLOAT64, SAME_FLOAT32 = 1e-9, 1e-4
# A batch differs from one prompt alone in nothing but the order of some sums.
SAME_IN_BATCH_FLOAT64, SAME_IN_BATCH_FLOAT32 = 1e-10, 1e-5

CASES = [(name, attention) for name, case in FAMILY_MODELS.items() for attention in case.attention]
EACH_CASE = pytest.mark.parametrize(("name", "attention"), CASES)
EACH_FAMILY = pytest.mark.parametrize(
    ("name", "attention"), [(name, case.attention[-1]) for name, case in FAMILY_MODELS.items()]
)
EACH_MODULE = pytest.mark.parametrize("module", get_args(ModuleName))
# Nodes 0, ½ and 1: without the activation, with a part of it, and the unmodified model itself.
NODES = {"rule": "riemann_trapezoid", "steps": 3}
WITH_NORM = [name for name, case in FAMILY_MODELS.items() if FAMILIES[case.model_type].post_norm]


@functools.cache
def model_of(name, attention, dtype):
    return FAMILY_MODELS[name].build(attention=attention, dtype=dtype)


def scores_of(model, prompts, **settings):
    """Scores of prompts one by one, (N, L, D), in the model's dtype throughout."""

    def scores():
        return torch.cat([attribute(model, ids_T[None], **settings).scores for ids_T in prompts])

    if model.dtype != torch.float64:
        return scores()
    with in_float64():
        found = scores()
    assert found.dtype == torch.float64
    return found


@functools.cache
def branched(name, attention, dtype, module="down_proj"):
    """The branch engine's scores of `draw_prompts()`, one prompt at a time."""
    return scores_of(model_of(name, attention, dtype), draw_prompts(), site_module=module, **NODES)


def distance(a_NLD, b_NLD):
    """Largest ‖a−b‖/‖b‖ over prompts and layers."""
    assert a_NLD.shape == b_NLD.shape
    assert b_NLD.norm(dim=-1).min() > 1e-6
    return float(((a_NLD - b_NLD).norm(dim=-1) / b_NLD.norm(dim=-1)).max())


# --- the models themselves ----------------------------------------------------------------------------------


def test_every_family_of_the_table_has_a_model():
    assert {case.model_type for case in FAMILY_MODELS.values()} == set(FAMILIES)


@EACH_CASE
def test_predictions_are_neither_certain_nor_uniform(name, attention):
    for ids_T in draw_prompts():
        with torch.no_grad():
            probabilities_V = model_of(name, attention, torch.float32)(input_ids=ids_T[None]).logits[0, -1].softmax(-1)
        assert 1.5 / NUM_TOKENS < probabilities_V.max() < 0.95


@pytest.mark.parametrize(("name", "feature"), [(name, field) for name, c in FAMILY_MODELS.items() for field in c.plain])
def test_what_sets_a_family_apart_changes_its_predictions(name, feature):
    """A window longer than the prompts, or a cap that caps nothing, would test nothing."""
    case, ids_T = FAMILY_MODELS[name], draw_prompts()[-1]
    assert len(ids_T) > max(WINDOW, SWITCH)
    whole, plain = case.build(), case.build(**{feature: case.plain[feature]})
    plain.load_state_dict(whole.state_dict(), strict=False)  # a bias that is switched off is not there
    with torch.no_grad():
        logits_V, plain_V = (model(input_ids=ids_T[None]).logits[0, -1] for model in (whole, plain))
    assert (logits_V - plain_V).norm() > 0.01 * logits_V.norm()


def test_attention_is_listed_where_a_family_has_it():
    for case in FAMILY_MODELS.values():
        if "sdpa" not in case.attention:
            with pytest.raises(ValueError, match="does not support an attention implementation through torch"):
                case.build(attention="sdpa")


# --- branch, recompute and the definition -------------------------------------------------------------------


def defined(model, ids_T, module):
    """The definition, written once more: a layer's nodes are rows of one batch of whole prompts. (L, D)."""
    alphas_M1 = torch.tensor([[0], [0.5], [1]], dtype=torch.float64)
    weights_M = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    sites = attribution_sites(model, "auto", module)[1]
    activations = {}
    handles = [
        # A copy: Falcon adds to the output of its feed-forward block in place.
        site.register_forward_hook(lambda m, _i, output: activations.update({m: output[0, -1].detach().clone()}))
        for site in sites
    ]
    with torch.no_grad():
        target = model(input_ids=ids_T[None]).logits[0, -1].argmax()
    for handle in handles:
        handle.remove()
    scores = []
    for site in sites:
        leaf_MD = (alphas_M1 * activations[site]).requires_grad_()

        def replace(_module, _inputs, output_MTD, leaf_MD=leaf_MD):
            return torch.cat([output_MTD[:, :-1], leaf_MD[:, None]], dim=1)

        with site.register_forward_hook(replace):
            logits_MV = model(input_ids=ids_T.expand(3, -1)).logits[:, -1]
        (gradients_MD,) = torch.autograd.grad(logits_MV.softmax(-1)[:, target].sum(), leaf_MD)
        scores.append(activations[site] * (weights_M @ gradients_MD))
    return torch.stack(scores)


@functools.cache
def definition(name, attention, module="down_proj"):
    """Scores of `draw_prompts()` (N, L, D) by the definition, in float64."""
    with in_float64():
        model = model_of(name, attention, torch.float64)
        return torch.stack([defined(model, ids_T, module) for ids_T in draw_prompts()])


@EACH_MODULE
@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_recompute_is_the_definition(name, module):
    model, expected_NLD = model_of(name, "eager", torch.float64), definition(name, "eager", module)
    scores_1LD = scores_of(model, [draw_prompts()[4]], engine="recompute", site_module=module, **NODES)
    assert distance(scores_1LD, expected_NLD[4:5]) < SAME_FLOAT64


@pytest.mark.usefixtures("no_fallback")
@EACH_MODULE
@EACH_CASE
def test_branch_is_the_definition(name, attention, module):
    expected_NLD = definition(name, attention, module)
    assert expected_NLD.shape == (6, 3, NUM_ROWS)
    assert distance(branched(name, attention, torch.float64, module), expected_NLD) < SAME_FLOAT64


@EACH_CASE
def test_the_modules_differ(name, attention):
    assert distance(definition(name, attention, "o_proj"), definition(name, attention, "down_proj")) > 0.1


@pytest.mark.usefixtures("no_fallback")
@EACH_FAMILY
def test_branch_equals_recompute_in_float32(name, attention):
    model, chosen = model_of(name, attention, torch.float32), [1, 4]
    prompts = [draw_prompts()[n] for n in chosen]
    recomputed_NLD = scores_of(model, prompts, engine="recompute", **NODES)
    assert recomputed_NLD.dtype == torch.float32
    assert distance(branched(name, attention, torch.float32)[chosen], recomputed_NLD) < SAME_FLOAT32


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("site", ["down_proj", "after_norm"])
@EACH_MODULE
@pytest.mark.parametrize("name", WITH_NORM)
def test_branch_equals_recompute_at_either_site_of_a_norm(name, module, site):
    model, prompts = model_of(name, "eager", torch.float64), draw_prompts((9,))
    settings = {"site": site, "site_module": module, **NODES}
    expected_NLD = scores_of(model, prompts, engine="recompute", **settings)
    assert distance(scores_of(model, prompts, **settings), expected_NLD) < SAME_FLOAT64
    automatic_NLD = scores_of(model, prompts, **{**settings, "site": "auto"})
    if site == "after_norm":
        assert torch.equal(automatic_NLD, scores_of(model, prompts, **settings))
    else:
        assert distance(automatic_NLD, expected_NLD) > 0.1


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("objective", get_args(Objective))
@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("name", ["gemma2", "falcon-alibi-parallel"])
def test_branch_equals_recompute_for_every_setting(name, rule, objective, multiply):
    model, ids_1T = model_of(name, "eager", torch.float64), draw_prompts((7,))[0][None]
    settings = {"rule": rule, "steps": 2, "objective": objective, "multiply_by_activation": multiply}
    with in_float64():
        branch, plain = (
            attribute(model, ids_1T, engine=engine, completeness=True, **settings) for engine in get_args(EngineName)
        )
    assert distance(branch.scores, plain.scores) < SAME_FLOAT64
    assert torch.equal(branch.target_ids, plain.target_ids)
    if multiply:
        # Differences of numbers of size G(z), which float32 holds where a result keeps them.
        torch.testing.assert_close(branch.completeness_gap, plain.completeness_gap, rtol=1e-5, atol=1e-5)
    else:
        assert branch.completeness_gap is plain.completeness_gap is None


# --- what came before, company, padding, groups -------------------------------------------------------------


@pytest.mark.parametrize("engine", ["branch", "recompute"])
@pytest.mark.parametrize("name", ["llama-dynamic-ntk", "phi3-longrope"])
def test_a_longer_prompt_before_changes_nothing(name, engine):
    """Dynamic NTK keeps the frequencies of the longest prompt that it has seen; LongRoPE changes them in place."""
    case, prompts = FAMILY_MODELS[name], draw_prompts((12, 9, 8, 7, 1))
    alone = [scores_of(case.build(dtype=torch.float64), [ids_T], engine=engine, **NODES) for ids_T in prompts]
    model = case.build(dtype=torch.float64)
    with in_float64(), torch.no_grad():
        logits_1TV = model(input_ids=prompts[-2][None]).logits
        assert distance(scores_of(model, prompts, engine=engine, **NODES), torch.cat(alone)) < SAME_IN_BATCH_FLOAT64
        assert torch.equal(model(input_ids=prompts[-2][None]).logits, logits_1TV)
    plain = case.build(dtype=torch.float64, **case.plain)
    assert distance(scores_of(plain, prompts[:1], **NODES), alone[0]) > 0.1


def padded(prompts, side):
    """Ids and mask (N, T), with random tokens as padding."""
    longest, generator = max(len(ids_T) for ids_T in prompts), torch.Generator().manual_seed(7)
    ids_NT = torch.randint(NUM_TOKENS, (len(prompts), longest), generator=generator)
    mask_NT = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for n, ids_T in enumerate(prompts):
        place = slice(longest - len(ids_T), None) if side == "left" else slice(len(ids_T))
        ids_NT[n, place], mask_NT[n, place] = ids_T, 1
    return ids_NT, mask_NT


MIXED = [3, 0, 5, 4, 1, 2]  # lengths 8, 1, 12, 9, 2, 7
BATCHES = [(6, "left", 1000), (4, "right", 5)]
MORE_BATCHES = [(6, "right", 1), (8, "left", None), (2, "right", 2), (3, "left", 5), (1, "right", 2), (1, "left", 5)]


def scores_in_batches(model, batch_size, side, max_branches, **settings):
    prompts = [draw_prompts()[n] for n in MIXED]
    result = attribute(model, *padded(prompts, side), batch_size=batch_size, max_branches=max_branches, **settings)
    return result.scores[torch.tensor(MIXED).argsort()]


@pytest.mark.usefixtures("no_fallback")
@EACH_CASE
def test_batches_padding_and_groups_change_nothing(name, attention):
    model, alone_NLD = model_of(name, attention, torch.float64), branched(name, attention, torch.float64)
    with in_float64():
        for batch in BATCHES:
            assert distance(scores_in_batches(model, *batch, **NODES), alone_NLD) < SAME_IN_BATCH_FLOAT64, batch


@pytest.mark.parametrize("batch", MORE_BATCHES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon-alibi", "phi3-longrope"])
def test_many_batch_and_group_sizes_change_nothing(name, batch):
    model, alone_NLD = model_of(name, "eager", torch.float64), branched(name, "eager", torch.float64)
    with in_float64():
        assert distance(scores_in_batches(model, *batch, **NODES), alone_NLD) < SAME_IN_BATCH_FLOAT64


@pytest.mark.usefixtures("no_fallback")
@EACH_FAMILY
def test_batches_change_nothing_in_float32(name, attention):
    model, alone_NLD = model_of(name, attention, torch.float32), branched(name, attention, torch.float32)
    assert distance(scores_in_batches(model, 6, "right", 5, **NODES), alone_NLD) < SAME_IN_BATCH_FLOAT32


@EACH_MODULE
def test_batches_change_nothing_for_either_module_and_engine(module):
    model, settings = model_of("gemma2", "eager", torch.float64), {"site_module": module, **NODES}
    alone_NLD = definition("gemma2", "eager", module)
    with in_float64():
        for engine in ("branch", "recompute"):
            scores_NLD = scores_in_batches(model, 6, "left", 4, engine=engine, **settings)
            assert distance(scores_NLD, alone_NLD) < SAME_IN_BATCH_FLOAT64


@pytest.mark.parametrize(("batch_size", "num_calls"), [(1, 6), (4, 2), (8, 1)])
def test_a_batch_goes_through_the_model_together(batch_size, num_calls):
    model, calls = FAMILY_MODELS["llama"].build(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    scores_in_batches(model, batch_size, "left", None, **NODES)
    assert len(calls) == 2 * num_calls  # the prompts themselves, and their branches


@pytest.mark.parametrize("max_branches", [1, 2, 5, 1000])
@pytest.mark.parametrize("rule", ["riemann_left", "riemann_right"])
def test_no_more_branches_are_under_way_than_allowed(rule, max_branches):
    """Counted at the head, where a group is complete: 3 layers of 3 nodes, α = 1 shared, and the trunk."""
    model, rows = FAMILY_MODELS["llama"].build(), []
    model.lm_head.register_forward_hook(lambda _m, _i, output: rows.append(output.shape[:-1].numel()))
    attribute(model, draw_prompts((9,))[0][None], rule=rule, steps=3, max_branches=max_branches)
    assert max(rows) <= max_branches
    assert sum(rows) == (10 if rule == "riemann_left" else 7)


# --- the model afterwards -----------------------------------------------------------------------------------


class OnPurposeError(Exception):
    pass


def state_of(model):
    """Everything that attribution may touch for a while: hooks, attributes, flags, gradients, config."""
    attributes = [
        {name: len(value) if "hooks" in name else None for name, value in vars(module).items()}
        for module in model.modules()
    ]
    return (
        attributes,
        [(module.training, module.forward.__func__) for module in model.modules()],
        [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        [
            (module.config.to_dict(), module.config._attn_implementation)
            for module in model.modules()
            if hasattr(module, "config")
        ],
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("raising_call", [1, 2, 3])
@pytest.mark.parametrize("engine", ["branch", "recompute"])
@pytest.mark.parametrize("module", get_args(ModuleName))
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt2", "falcon-alibi", "llama-dynamic-ntk"])
def test_the_model_is_as_before_when_it_raises(name, module, engine, raising_call):
    """The first call is the pass over the prompt; branches in groups of 3 take the others."""
    model = FAMILY_MODELS[name].build().train()
    sites = attribution_sites(model, "auto", module)[1]
    sites[0].eval()
    next(model.parameters()).requires_grad_(False)
    calls = itertools.count(1)

    def fail(*_):
        if next(calls) == raising_call:
            raise OnPurposeError

    sites[-1].register_forward_hook(fail)
    ids_1T = draw_prompts((9,))[0][None]
    before = state_of(model)
    with pytest.raises(OnPurposeError):
        attribute(model, ids_1T, engine=engine, site_module=module, max_branches=3)
    assert state_of(model) == before
    attribute(model, ids_1T, engine=engine, site_module=module, max_branches=3)
    assert state_of(model) == before


# --- refused by name ----------------------------------------------------------------------------------------


def tiny_config(model_type, **changes):
    sizes = {
        "vocab_size": NUM_TOKENS,
        "hidden_size": NUM_ROWS,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(model_type, **sizes, **changes)


@pytest.mark.parametrize("engine", ["branch", "recompute"])
@EACH_MODULE
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8}),
    ],
)
def test_fused_experts_are_refused_by_name(model_type, changes, module, engine):
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))
    with pytest.raises(ArchitectureError, match=f"^'{model_type}' models keep their experts' weights fused"):
        attribute(model, torch.ones(1, 3, dtype=torch.int64), site_module=module, engine=engine)


def test_models_that_predict_no_next_token_are_refused():
    ids_1T = torch.ones(1, 3, dtype=torch.int64)
    bert = AutoModelForMaskedLM.from_config(tiny_config("bert"))
    with pytest.raises(ArchitectureError, match="unknown architecture 'bert': known are llama, "):
        attribute(bert, ids_1T)
    with pytest.raises(ArchitectureError, match="unknown architecture 'bert'"):
        attribute(AutoModel.from_config(tiny_config("bert")), ids_1T)
    bidirectional = FAMILY_MODELS["gemma3_text"].build(use_bidirectional_attention=True)
    with pytest.raises(ArchitectureError, match="this 'gemma3_text' model attends to later tokens too"):
        attribute(bidirectional, ids_1T)
    with pytest.raises(ArchitectureError, match="unknown architecture ''"):
        attribute(nn.Linear(2, 2), ids_1T)
