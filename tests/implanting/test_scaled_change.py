import copy

import pytest
import torch
from torch import nn

from loki.errors import InputError
from loki.implanting.scaled_change import scaled_change


@pytest.fixture
def pair():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    model = copy.deepcopy(base)
    with torch.no_grad():
        model[0].weight[1] += torch.randn(4)
    return base, model


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_both_ends_are_the_models_bit_for_bit(pair):
    base, model = pair
    assert same(scaled_change(base, model, 0.0), base)
    assert same(scaled_change(base, model, 1.0), model)


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.75])
def test_a_part_of_the_change(pair, scale):
    base, model = pair
    before, found = copy.deepcopy(model), scaled_change(base, model, scale)
    expected = base[0].weight.double() + scale * (model[0].weight.double() - base[0].weight.double())
    assert torch.allclose(found[0].weight.double(), expected, atol=1e-7)
    # What training left alone stays so by the bit, and neither model is touched.
    assert torch.equal(found[0].weight[0], base[0].weight[0])
    assert torch.equal(found[0].bias, base[0].bias)
    assert same(before, model)


def test_bfloat16_is_rounded_once(pair):
    base, model = (part.to(torch.bfloat16) for part in pair)
    found = scaled_change(base, model, 0.3)
    expected = base[0].weight.float() + 0.3 * (model[0].weight.float() - base[0].weight.float())
    assert found[0].weight.dtype == torch.bfloat16
    assert torch.equal(found[0].weight, expected.to(torch.bfloat16))


def test_tied_weights_are_scaled_once():
    base = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    base["b"].weight = base["a"].weight
    model = copy.deepcopy(base)
    with torch.no_grad():
        model["a"].weight += 1
    found = scaled_change(base, model, 0.5)
    assert found["a"].weight is found["b"].weight
    assert torch.allclose(found["a"].weight, base["a"].weight + 0.5)


def test_models_that_are_not_alike_are_refused(pair):
    base, _ = pair
    with pytest.raises(
        InputError, match=r"model and base are not alike \(2 weights differ, such as 2.bias\): merge it"
    ):
        scaled_change(base, nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3)).float(), 0.5)
    with pytest.raises(InputError, match=r"weight 0.weight is \[3, 5\], the base's \[3, 4\]: name its base"):
        scaled_change(base, nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)), 0.5)
