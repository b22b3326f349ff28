"""LoKI as a PEFT method: what is trained, how it changes the output, and what stays as it was."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.func import functional_call
from tuned import (
    FORMS,
    INPUT_IDS,
    POSITIONS,
    base_tensors,
    build,
    config,
    dense_changes,
    is_conv1d,
    logits,
    loki_layers,
    loss,
    train_steps,
    wrap,
)

from loki import LokiConfig

every_form = pytest.mark.parametrize("form", FORMS)
NUM_CHANGED_ROWS = sum(map(len, POSITIONS))


@every_form
def test_starts_as_the_unmodified_model(form):
    before = logits(build(form))
    wrapped = wrap(form, init_weights=True)
    assert torch.equal(logits(wrapped), before)
    # With gradients the layer takes another way.
    assert torch.equal(wrapped(input_ids=INPUT_IDS).logits, before)


def test_shapes_and_dtypes_of_what_is_trained():
    shapes = {
        form: {
            name.split(".loki_")[1].removesuffix(".default"): tuple(parameter.shape)
            for name, parameter in wrap(form).named_parameters()
            if parameter.requires_grad and ".2." in name
        }
        for form in FORMS
    }
    # 3 rows in the last layer; 24 inputs of the down-projection (GPT-2: 64), 16 of attention's.
    assert shapes == {
        "rows": {"delta": (3, 24)},
        "rows-of-attention": {"delta": (3, 16)},
        "rows-and-biases": {"delta": (3, 24), "bias": (3,)},
        "rows-of-conv1d": {"delta": (3, 64)},
        "rows-and-biases-of-conv1d": {"delta": (3, 16), "bias": (3,)},
        "rank": {"A": (3, 2), "B": (2, 24)},
        "rank-and-biases": {"A": (3, 2), "B": (2, 24), "bias": (3,)},
        "rank-of-conv1d": {"A": (3, 2), "B": (2, 64)},
    }


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_else_is_trained_and_the_change_is_float32(form, dtype):
    wrapped = wrap(form, dtype)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert {name for name, _ in wrapped.named_parameters() if ".loki_" in name} == set(trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert logits(wrapped).dtype == dtype


def test_low_rank_starts_like_lora():
    """A zero, B Kaiming-uniform with a = √5, which is uniform within ±1/√F."""
    torch.manual_seed(0)
    wrapped = get_peft_model(nn.Sequential(nn.Linear(400, 20)), LokiConfig(positions={"0": list(range(20))}, r=8))
    layer = wrapped.base_model.model[0]
    assert not layer.loki_A["default"].any()
    largest = layer.loki_B["default"].abs().max().item()
    assert 0.99 / 20 < largest <= 1 / 20
    assert layer.loki_B["default"].std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.03)


@every_form
@pytest.mark.parametrize("with_gradients", [False, True])
def test_output_is_that_of_a_densely_changed_base(form, with_gradients):
    wrapped = wrap(form)
    base = build(form).double()
    changed = {name: base.get_parameter(name) + change for name, change in dense_changes(wrapped)}
    expected = functional_call(base, changed, (INPUT_IDS,)).logits
    assert not torch.allclose(base(INPUT_IDS).logits, expected, atol=1e-2)
    with torch.set_grad_enabled(with_gradients):
        found = wrapped(input_ids=INPUT_IDS).logits
    # float32 against float64, over 3 layers
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_output_by_hand():
    """x (W + Δ)ᵀ + b with W = 0, b = (10, 20, 30) and Δ on rows 2 and 0."""
    linear = nn.Linear(2, 3)
    linear.weight.data.zero_()
    linear.bias.data = torch.tensor([10.0, 20.0, 30.0])
    wrapped = get_peft_model(nn.Sequential(linear), LokiConfig(positions={"0": [2, 0]}, bias="rows"))
    layer = wrapped.base_model.model[0]
    layer.loki_delta["default"].data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # rows 0 and 2: sorted
    layer.loki_bias["default"].data = torch.tensor([0.5, 0.25])
    x = torch.tensor([[1.0, 10.0]])
    assert wrapped(x).tolist() == [[10 + 21 + 0.5, 20, 30 + 43 + 0.25]]
    with torch.no_grad():
        assert wrapped(x).tolist() == [[31.5, 20, 73.25]]


def test_low_rank_output_by_hand():
    """lora_alpha / r · A·B with r = 2 and lora_alpha = 6: three times A·B, on row 1."""
    linear = nn.Linear(2, 3, bias=False)
    linear.weight.data.zero_()
    wrapped = get_peft_model(nn.Sequential(linear), LokiConfig(positions={"0": [1]}, r=2, lora_alpha=6))
    layer = wrapped.base_model.model[0]
    layer.loki_A["default"].data = torch.tensor([[1.0, 2.0]])
    layer.loki_B["default"].data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert wrapped(torch.tensor([[1.0, 10.0]])).tolist() == [[0, 3 * 21, 0]]
    assert layer.get_delta_weight("default").tolist() == [[0, 0], [3, 6], [0, 0]]


@pytest.mark.parametrize(("lora_alpha", "expected"), [(None, 2.0), (4, 0.5), (16, 2.0)])
def test_scale_of_low_rank(lora_alpha, expected):
    settings = LokiConfig(positions=[[1]], r=8, lora_alpha=lora_alpha)
    assert settings.scaling == expected
    assert settings.lora_alpha == 8 * expected


@every_form
def test_delta_weight_is_the_dense_change(form):
    wrapped = wrap(form)
    expected = dict(dense_changes(wrapped))
    for name, layer in loki_layers(wrapped).items():
        found = layer.get_delta_weight("default")
        assert found.shape == layer.weight.shape
        torch.testing.assert_close(found.detach().double(), expected[f"{name}.weight"], rtol=1e-6, atol=1e-8)


class DenseChange(nn.Module):
    """A base whose weights are rebuilt from the adapter's own tensors by plain indexing: autograd does the rest."""

    def __init__(self, form, wrapped):
        super().__init__()
        self.base = build(form).requires_grad_(False)
        self.layers = loki_layers(wrapped)
        self.settings = wrapped.peft_config["default"]

    def loss(self):
        changed = {}
        for name, layer in self.layers.items():
            rows = layer.loki_rows["default"].tolist()
            weight = self.base.get_parameter(f"{name}.weight")
            change = torch.zeros(layer.out_features, layer.in_features)
            if self.settings.r:
                scale = self.settings.lora_alpha / self.settings.r
                change[rows] = scale * layer.loki_A["default"] @ layer.loki_B["default"]
            else:
                change[rows] = layer.loki_delta["default"]
            changed[f"{name}.weight"] = weight + (change.T if is_conv1d(layer.get_base_layer()) else change)
            if self.settings.bias == "rows":
                bias = torch.zeros(layer.out_features)
                bias[rows] = layer.loki_bias["default"]
                changed[f"{name}.bias"] = self.base.get_parameter(f"{name}.bias") + bias
        return functional_call(self.base, changed, (), {"input_ids": INPUT_IDS, "labels": INPUT_IDS}).loss


@every_form
@pytest.mark.parametrize("listened_to", [False, True])
def test_gradients_are_those_of_a_dense_weight(form, listened_to):
    """With and without somebody who listens to the base layers, which takes the other way through the layer."""
    wrapped = wrap(form)
    if listened_to:
        for layer in loki_layers(wrapped).values():
            layer.base_layer.register_forward_hook(lambda *_: None)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    expected = torch.autograd.grad(DenseChange(form, wrapped).loss(), trained)
    found = torch.autograd.grad(loss(wrapped), trained)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-4
        # the same float32 sums in another order
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_gradient_reaches_what_comes_before():
    """The input's gradient, at a change that is not zero: x (W + Δ)ᵀ gives (W + Δ)ᵀ g."""
    torch.manual_seed(0)
    wrapped = get_peft_model(nn.Sequential(nn.Linear(4, 5)), LokiConfig(positions={"0": [3, 1]}, init_weights=False))
    layer = wrapped.base_model.model[0]
    x, grad = torch.randn(2, 4, requires_grad=True), torch.randn(2, 5)
    expected = grad @ (layer.base_layer.weight + layer.get_delta_weight("default"))
    torch.testing.assert_close(torch.autograd.grad(wrapped(x), x, grad)[0], expected)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_changes_exactly_the_selected_rows(form, dtype):
    before = base_tensors(build(form, dtype))
    wrapped = wrap(form, dtype, init_weights=True)
    train_steps(wrapped)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(wrapped).items())
    expected = {name: change != 0 for name, change in dense_changes(wrapped)}
    after = base_tensors(wrapped.merge_and_unload())
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        differs = tensor != after[name]
        if name not in expected:
            assert not differs.any(), name
            continue
        assert not differs[~expected[name]].any(), name
        if dtype is torch.float32:
            assert torch.equal(differs, expected[name]), name
        else:
            assert differs.any(), name  # small steps may vanish in bfloat16


def test_small_steps_are_kept_on_a_bfloat16_base():
    """100 steps of 0.0001 on weights of 1, each of which bfloat16 would round away."""
    linear = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    linear.weight.data.fill_(1.0)
    wrapped = get_peft_model(nn.Sequential(linear), LokiConfig(positions={"0": [0]}))
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=1e-4)
    for _ in range(100):
        optimiser.zero_grad()
        wrapped(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimiser.step()
    assert wrapped.base_model.model[0].loki_delta["default"].item() == pytest.approx(-0.01)
    assert linear.weight.item() == 1.0
    assert wrapped.merge_and_unload()[0].weight.item() == pytest.approx(0.99, abs=2**-8)


def test_adapters_may_share_a_layer_with_different_rows_and_ranks():
    wrapped = wrap("rows")
    wrapped.add_adapter("second", config("rank", positions=[[1, 2], [5], []], init_weights=False))
    wrapped.base_model.set_adapter(["default", "second"])
    base = build("rows").double()
    changed = {name: base.get_parameter(name).detach().clone() for name, _ in base.named_parameters()}
    for adapter in ("default", "second"):
        for name, change in dense_changes(wrapped, adapter):
            changed[name] += change
    expected = functional_call(base, changed, (INPUT_IDS,)).logits
    torch.testing.assert_close(logits(wrapped).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wrapped(input_ids=INPUT_IDS).logits.double(), expected, rtol=1e-4, atol=1e-5)


def test_layers_without_rows_are_left_alone():
    wrapped = wrap("rows")
    assert type(wrapped.base_model.model.model.layers[1].mlp.down_proj) is nn.Linear
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == NUM_CHANGED_ROWS * 24


def test_biases_are_trained_where_a_layer_has_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    wrapped = get_peft_model(model, LokiConfig(positions={"0": [1], "1": [0]}, bias="rows"))
    with_bias, without = wrapped.base_model.model
    assert "default" in with_bias.loki_bias
    assert "default" not in without.loki_bias
    assert torch.isfinite(wrapped(torch.randn(2, 3))).all()
