import itertools
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from captum.attr import LayerIntegratedGradients
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loki.analysis.attribution import attribute
from loki.analysis.path import Path, combine
from loki.analysis.quadrature import Rule
from loki.analysis.settings import KVASettings, Objective
from loki.architecture import attribution_sites
from loki.errors import ArchitectureError, InputError

# Both engines add up the same float32 numbers in another order; 1e-4 of a layer's norm is far above that
# (about 1e-6 here) and far below the effect of a wrong position, mask or node (some per cent and more).
SAME = 1e-4


def distance(a_NLD: torch.Tensor, b_NLD: torch.Tensor) -> float:
    """Largest ‖a−b‖/‖b‖ over prompts and layers."""
    assert a_NLD.shape == b_NLD.shape
    assert b_NLD.norm(dim=-1).min() > 0
    return float(((a_NLD - b_NLD).norm(dim=-1) / b_NLD.norm(dim=-1)).max())


def assert_engines_agree(model, ids, **settings):
    branched = attribute(model, ids, engine="branch", **settings)
    recomputed = attribute(model, ids, engine="recompute", **settings)
    assert distance(branched.scores, recomputed.scores) < SAME
    assert torch.equal(branched.target_ids, recomputed.target_ids)
    if recomputed.completeness_gap is None:
        assert branched.completeness_gap is None
    else:
        # Differences of numbers of size G(z): compared on that scale.
        torch.testing.assert_close(branched.completeness_gap, recomputed.completeness_gap, rtol=SAME, atol=SAME)
    return branched


# --- branch against recompute -------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("family", ["llama", "olmo2"])
@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("objective", get_args(Objective))
@pytest.mark.parametrize("multiply", [True, False])
def test_branch_equals_recompute_for_every_setting(tiny_model, random_ids, family, rule, objective, multiply):
    assert_engines_agree(
        tiny_model(family),
        random_ids(1, 6),
        rule=rule,
        steps=3,
        objective=objective,
        multiply_by_activation=multiply,
        completeness=True,
    )


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize(("family", "site"), [("llama", "down_proj"), ("olmo2", "down_proj"), ("olmo2", "after_norm")])
def test_branch_equals_recompute_at_every_site(tiny_model, random_ids, family, site):
    assert_engines_agree(tiny_model(family), random_ids(2, 6), site=site)


def test_sites_of_olmo2_differ_and_auto_is_after_norm(tiny_model, random_ids):
    model, ids = tiny_model("olmo2"), random_ids(1, 6)
    auto, after, down = (attribute(model, ids, site=site).scores for site in ("auto", "after_norm", "down_proj"))
    assert torch.equal(auto, after)
    assert distance(down, auto) > 0.1


def test_a_model_without_a_cache_falls_back_to_recompute(caplog):
    ids = torch.tensor([[1, 1]])
    branched = attribute(Toy(), ids).scores
    (record,) = caplog.records
    assert "its forward pass takes no past_key_values; using recompute" in record.message
    assert torch.equal(branched, attribute(Toy(), ids, engine="recompute").scores)


@pytest.mark.usefixtures("no_fallback")
def test_positions_scaled_by_length_agree(tiny_model, random_ids):
    """Dynamic NTK changes the frequencies with the prompt's length, here beyond 8 positions."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    for tokens in (6, 12):
        model = tiny_model(rope_parameters=rope, max_position_embeddings=8)
        assert_engines_agree(model, random_ids(1, tokens))


@pytest.mark.usefixtures("no_fallback")
def test_bfloat16_engines_agree_to_its_own_precision(tiny_model, random_ids):
    model = tiny_model().to(torch.bfloat16)
    ids = random_ids(2, 6)
    branched, recomputed = (attribute(model, ids, engine=engine) for engine in ("branch", "recompute"))
    assert branched.scores.dtype == torch.float32
    # bfloat16 keeps 8 bits; rounding of activations and of α through three layers adds up to a few per cent.
    assert distance(branched.scores, recomputed.scores) < 0.1


@pytest.mark.usefixtures("no_fallback")
def test_another_kernel_serves_the_prompt_and_is_back_afterwards(tiny_model, random_ids):
    """As flash attention does, which takes no mask of ours."""
    calls = []

    def kernel(module, query, *args, **kwargs):
        calls.append(query.shape[2])
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("a_kernel", kernel)
    AttentionMaskInterface.register("a_kernel", sdpa_mask)
    model, ids = tiny_model(), random_ids(2, 6)
    expected = attribute(model, ids).scores
    model.set_attn_implementation("a_kernel")
    assert distance(attribute(model, ids, batch_size=2).scores, expected) < SAME
    assert calls == [6] * 2  # the last of three layers ends the pass before its attention
    assert model.config._attn_implementation == "a_kernel"


def test_layers_that_take_something_else_fall_back_to_recompute(tiny_model, random_ids, caplog, monkeypatch):
    model, ids = tiny_model(), random_ids(1, 5)
    expected = attribute(model, ids, engine="recompute").scores
    kind = type(model.model.layers[0])
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs))
    assert torch.equal(attribute(model, ids).scores, expected)
    assert "does not name its input hidden_states; using recompute" in caplog.text


# --- cases computed by hand ---------------------------------------------------------------------------------


class Toy(nn.Module):
    """One layer, two rows; logits = C·(running sum of z)², so that both G and its path are polynomials."""

    def __init__(self):
        super().__init__()
        down_proj = nn.Linear(1, 2, bias=False)
        down_proj.weight.data = torch.tensor([[1.0], [2.0]])
        layer = nn.ModuleDict({"mlp": nn.ModuleDict({"down_proj": down_proj})})
        self.model = nn.ModuleDict({"layers": nn.ModuleList([layer])})
        self.config = SimpleNamespace(model_type="llama", vocab_size=3)
        self.head = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))

    def forward(self, input_ids, use_cache=False):
        z_BTD = self.model["layers"][0]["mlp"]["down_proj"](input_ids[..., None].float())
        return SimpleNamespace(logits=z_BTD.cumsum(1).square() @ self.head.T)


# Prompt [1, 1]: z = (1, 2) at both positions, logits (4, 16, 20), so y = 2 and G(v) = ‖z + v‖².
# ∇G(αz) = 2(1+α)z and G(z) − G(0) = 20 − 5 = 15. Σ_k w_k·2(1+α_k) is the factor below; Attr = factor·(1, 4).
FACTORS = [
    ("riemann_left", 1, 2.0),
    ("riemann_left", 2, 2.5),
    ("riemann_right", 1, 4.0),
    ("riemann_right", 2, 3.5),
    ("riemann_middle", 1, 3.0),
    ("riemann_middle", 2, 3.0),
    ("riemann_trapezoid", 2, 3.0),
    ("gausslegendre", 1, 3.0),
]


@pytest.mark.parametrize(("rule", "steps", "factor"), FACTORS)
def test_a_toy_computed_by_hand(rule, steps, factor):
    settings = {"rule": rule, "steps": steps, "objective": "logit", "engine": "recompute"}
    result = attribute(Toy(), torch.tensor([[1, 1]]), completeness=True, **settings)
    # Small integers and halves in float32: exact up to the nodes' and weights' last place.
    torch.testing.assert_close(result.scores, factor * torch.tensor([[[1.0, 4.0]]]))
    torch.testing.assert_close(result.completeness_gap, torch.tensor([[5 * factor - 15]]), rtol=0, atol=1e-4)
    assert result.target_ids.tolist() == [2]
    plain = attribute(Toy(), torch.tensor([[1, 1]]), multiply_by_activation=False, completeness=True, **settings)
    torch.testing.assert_close(plain.scores, factor * torch.tensor([[[1.0, 2.0]]]))
    assert plain.completeness_gap is None


@pytest.mark.parametrize(
    ("objective", "factor"),
    # Prompt [0, 1]: logits (v1², v2², v1²+v2²), y = 2. At α = 1, v = (1, 2): logits (1, 4, 5),
    # p = e^(1,4,5)/Z; ∂log p/∂v = 2v·(1−p_other): row 1 loses p1+p3, row 2 loses p2+p3.
    [("log_probability", lambda _p: 1.0), ("probability", lambda p: p[2])],
)
def test_softmax_objectives_computed_by_hand(objective, factor):
    result = attribute(
        Toy(), torch.tensor([[0, 1]]), rule="riemann_right", steps=1, objective=objective, engine="recompute"
    )
    p = torch.tensor([1.0, 4.0, 5.0]).exp()
    p = (p / p.sum()).tolist()
    expected = torch.tensor([[[2 * (1 - p[0] - p[2]), 8 * (1 - p[1] - p[2])]]]) * factor(p)
    torch.testing.assert_close(result.scores, expected)


def test_combine_weighs_nodes_multiplies_and_takes_the_gap_at_zero():
    gradients_LMD = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [-2.0, 5.0]]])
    values_LM = torch.tensor([[10.0, 0.5], [20.0, 1.5]])
    activations_LD = torch.tensor([[2.0, -1.0], [0.5, 4.0]])
    path = Path(alphas=(1.0, 0.0), weights=(0.25, 0.75), zero_index=1)

    result = combine(gradients_LMD, values_LM, activations_LD, 3.0, path, KVASettings(), 7)
    # Layer 0: ¼(1, 2) + ¾(3, 4) = (2.5, 3.5); times z = (5, −3.5). Layer 1: (−1.5, 4) → (−0.75, 16).
    assert result.scores_LD.tolist() == [[5.0, -3.5], [-0.75, 16.0]]
    # 1.5 − (3 − 0.5) and 15.25 − (3 − 1.5).
    assert result.completeness_gap_L.tolist() == [-1.0, 13.75]
    assert result.target_id == 7

    plain = combine(gradients_LMD, values_LM, activations_LD, 3.0, path, KVASettings(multiply_by_activation=False), 7)
    assert plain.scores_LD.tolist() == [[2.5, 3.5], [-1.5, 4.0]]
    assert plain.completeness_gap_L is None


def test_zero_is_added_to_a_path_only_where_asked_for_and_missing():
    def path(rule, *, completeness):
        return Path.of(KVASettings(rule, 2), completeness=completeness)

    assert path("riemann_right", completeness=False) == Path((0.5, 1.0), (0.5, 0.5), None)
    assert path("riemann_right", completeness=True) == Path((0.5, 1.0, 0.0), (0.5, 0.5, 0.0), 2)
    for completeness in (True, False):
        assert path("riemann_left", completeness=completeness) == Path((0.0, 0.5), (0.5, 0.5), 0)


def test_asking_for_completeness_changes_no_score(tiny_model, random_ids):
    model, ids = tiny_model(), random_ids(2, 5)
    without = attribute(model, ids, rule="riemann_middle")
    with_gap = attribute(model, ids, rule="riemann_middle", completeness=True)
    assert without.completeness_gap is None
    assert with_gap.completeness_gap.shape == (2, 3)
    assert distance(with_gap.scores, without.scores) < SAME


# --- Captum as a third opinion ------------------------------------------------------------------------------


class LastPosition(nn.Module):
    """The target's probability as a function of one layer's output at the last position, and of nothing else."""

    def __init__(self, model, layer, ids_T, target):
        super().__init__()
        self.model, self.site, self.ids_T, self.target = (
            model,
            attribution_sites(model, "auto")[1][layer],
            ids_T,
            target,
        )
        self.value = nn.Identity()

    def forward(self, z_BD):
        value_BD = self.value(z_BD)

        def replace(_module, _inputs, output_BTD):
            return torch.cat([output_BTD[:, :-1], value_BD[:, None]], dim=1)

        handle = self.site.register_forward_hook(replace)
        try:
            logits_BTV = self.model(self.ids_T.expand(len(z_BD), -1)).logits
        finally:
            handle.remove()
        return logits_BTV[:, -1].softmax(-1)[:, self.target]


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_captum_agrees(tiny_model, random_ids, family, rule):
    model, ids, steps = tiny_model(family), random_ids(1, 6), 5
    result = attribute(model, ids, rule=rule, steps=steps)
    outputs = []
    handles = [
        site.register_forward_hook(lambda _m, _i, output: outputs.append(output[:, -1].detach()))
        for site in attribution_sites(model, "auto")[1]
    ]
    model(ids)
    for handle in handles:
        handle.remove()

    expected = []
    for layer, z_1D in enumerate(outputs):
        wrapper = LastPosition(model, layer, ids, int(result.target_ids[0]))
        captum = LayerIntegratedGradients(wrapper, wrapper.value)
        expected.append(
            captum.attribute(
                z_1D, baselines=torch.zeros_like(z_1D), n_steps=steps, method=rule, attribute_to_layer_input=False
            )[0].detach()
        )
    expected_NLD = torch.stack(expected)[None]
    if rule == "riemann_trapezoid":
        expected_NLD = expected_NLD * steps / (steps - 1)  # Captum's weights sum to 1 − 1/m
    assert distance(result.scores, expected_NLD) < SAME


# --- completeness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "olmo2"])
@pytest.mark.parametrize("rule", get_args(Rule))
def test_the_completeness_gap_falls_as_steps_grow(tiny_model, random_ids, family, rule):
    model, ids = tiny_model(family), random_ids(2, 6)
    few, many = (attribute(model, ids, rule=rule, steps=steps, completeness=True) for steps in (2, 64))
    change_NL = (many.scores.sum(-1) - many.completeness_gap).abs()
    assert change_NL.max() > 0.05  # taking a layer away changes the prediction, so the gap is not trivially 0
    assert few.completeness_gap.abs().max() > 1e-3  # rounding is about 1e-6
    assert many.completeness_gap.abs().max() < few.completeness_gap.abs().max() / 8


def test_the_gap_compares_with_the_model_without_that_layers_output(tiny_model, random_ids):
    """G(z) and G(0) measured from outside: with no hook, and with the last position's output set to zero."""
    model, ids = tiny_model(), random_ids(1, 6)
    result = attribute(model, ids)
    target = int(result.target_ids[0])

    def probability():
        with torch.no_grad():
            return float(model(ids).logits[0, -1].softmax(-1)[target])

    def silence(_module, _inputs, output):
        output = output.clone()
        output[:, -1] = 0
        return output

    whole = probability()
    for layer, block in enumerate(model.model.layers):
        handle = block.mlp.down_proj.register_forward_hook(silence)
        gap = float(result.scores[0, layer].sum()) - (whole - probability())
        handle.remove()
        assert float(result.completeness_gap[0, layer]) == pytest.approx(gap, abs=1e-5)


# --- padding and batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["branch", "recompute"])
def test_padding_on_either_side_and_company_change_nothing(tiny_model, engine):
    model = tiny_model()
    prompts = [[5, 7, 9, 11, 3], [8, 2], [1, 1, 4]]
    alone = torch.cat([attribute(model, torch.tensor([p]), engine=engine).scores for p in prompts])
    for side, padding in itertools.product(("left", "right"), (0, 39)):
        rows, masks = [], []
        for prompt in prompts:
            pad = [padding] * (6 - len(prompt))
            rows.append(pad + prompt if side == "left" else prompt + pad)
            mask = [1] * len(prompt)
            masks.append([0] * len(pad) + mask if side == "left" else mask + [0] * len(pad))
        batch = attribute(model, torch.tensor(rows), torch.tensor(masks), engine=engine)
        assert torch.equal(batch.scores, alone)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_a_mask_of_ones_is_no_mask(tiny_model, random_ids, dtype):
    model, ids = tiny_model(), random_ids(2, 5)
    assert torch.equal(attribute(model, ids, torch.ones(2, 5, dtype=dtype)).scores, attribute(model, ids).scores)


# --- targets and bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["branch", "recompute"])
def test_targets_are_those_predicted_or_those_given(tiny_model, random_ids, engine):
    model, ids = tiny_model(), random_ids(3, 5)
    predicted = attribute(model, ids, engine=engine)
    with torch.no_grad():
        assert predicted.target_ids.tolist() == model(ids).logits[:, -1].argmax(-1).tolist()
    same = attribute(model, ids, engine=engine, target_ids=predicted.target_ids)
    assert torch.equal(same.scores, predicted.scores)
    others = (predicted.target_ids + 1) % 40
    given = attribute(model, ids, engine=engine, target_ids=others)
    assert torch.equal(given.target_ids, others)
    assert distance(given.scores, predicted.scores) > 0.1


def test_another_target_agrees_between_engines(tiny_model, random_ids):
    assert_engines_agree(tiny_model(), random_ids(2, 5), target_ids=torch.tensor([3, 17]))


@pytest.mark.parametrize("target", [40, -1])
@pytest.mark.parametrize("engine", ["branch", "recompute"])
def test_a_target_outside_the_vocabulary_is_refused(tiny_model, random_ids, engine, target):
    """−1 would silently mean the last token."""
    with pytest.raises(InputError, match=f"target.* {target}"):
        attribute(tiny_model(), random_ids(1, 3), target_ids=torch.tensor([target]), engine=engine)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0), (1, 2, 3)])
def test_input_ids_of_another_shape_are_refused(tiny_model, shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(InputError, match=r"input_ids have shape \(.*\): give \(prompts, tokens\), both at least 1"):
        attribute(tiny_model(), ids)


def test_masks_and_targets_that_do_not_fit_are_refused(tiny_model, random_ids):
    model, ids = tiny_model(), random_ids(2, 5)
    with pytest.raises(InputError, match=r"attention_mask has shape \(2, 4\), input_ids \(2, 5\): they must be equal"):
        attribute(model, ids, torch.ones(2, 4))
    with pytest.raises(InputError, match="a prompt has no tokens: its attention_mask is all zero"):
        attribute(model, ids, torch.tensor([[1] * 5, [0] * 5]))
    for targets in (torch.tensor([1]), torch.tensor([[1, 2]]), torch.tensor(1)):
        with pytest.raises(InputError, match=r"target_ids have shape .*: give one for each of 2 prompts"):
            attribute(model, ids, target_ids=targets)


def test_unknown_settings_and_models_are_refused(tiny_model, random_ids):
    ids = random_ids(1, 3)
    with pytest.raises(InputError, match="rule 'simpson' is unknown"):
        attribute(tiny_model(), ids, rule="simpson")
    with pytest.raises(InputError, match="'after_norm' does not exist in 'llama' models"):
        attribute(tiny_model(), ids, site="after_norm")
    with pytest.raises(ArchitectureError, match="unknown architecture ''"):
        attribute(nn.Linear(2, 2), ids)


# --- the model afterwards -----------------------------------------------------------------------------------


class OnPurposeError(Exception):
    pass


def raise_at_call(number):
    calls = itertools.count(1)

    def hook(*_):
        if next(calls) == number:
            raise OnPurposeError

    return hook


def state_of(model):
    """Everything that attribution touches for a while."""
    return (
        [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training)
            for m in model.modules()
        ],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        torch.is_grad_enabled(),
    )


# The head serves groups of branches, or the whole prompt and then each node; a layer serves the prompt first.
@pytest.mark.parametrize("raising_call", [None, 1, 2])
@pytest.mark.parametrize("engine", ["branch", "recompute"])
@pytest.mark.parametrize("place", ["head", "layer"])
def test_the_model_is_as_before_even_when_it_raises(tiny_model, random_ids, engine, raising_call, place):
    model = tiny_model().train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    if raising_call is not None:
        module = model.lm_head if place == "head" else model.model.layers[1].mlp.down_proj
        module.register_forward_hook(raise_at_call(raising_call))
    before = state_of(model)
    with torch.no_grad():
        if raising_call is None:
            attribute(model, random_ids(1, 5), engine=engine, max_branches=3)
        else:
            with pytest.raises(OnPurposeError):
                attribute(model, random_ids(1, 5), engine=engine, max_branches=3)
        assert not torch.is_grad_enabled()
    assert state_of(model) == before


def test_the_model_is_as_before_when_the_backward_pass_raises(tiny_model, random_ids):
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(_context, x):
            return x.clone()

        @staticmethod
        def backward(_context, _gradient):
            raise OnPurposeError

    model = tiny_model().train()
    model.lm_head.register_forward_pre_hook(lambda _m, inputs: (NoBackward.apply(inputs[0]),))
    before = state_of(model)
    for engine in ("branch", "recompute"):
        with pytest.raises(OnPurposeError):
            attribute(model, random_ids(1, 5), engine=engine)
        assert state_of(model) == before


def test_dropout_does_not_act(tiny_model, random_ids):
    model, ids = tiny_model(attention_dropout=0.5), random_ids(1, 5)
    calm = attribute(model.eval(), ids).scores
    assert torch.equal(attribute(model.train(), ids).scores, calm)


@pytest.mark.parametrize("engine", ["branch", "recompute"])
def test_parameters_do_not_change(tiny_model, random_ids, engine):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attribute(model, random_ids(1, 5), engine=engine)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
