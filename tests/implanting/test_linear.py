"""LoKILinear: a linear layer in two parts gives what the whole one gives, and trains one part."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import loki
from loki import LoKILinear

ROWS = [4, 0, 2]


def test_it_is_a_public_name():
    assert loki.LoKILinear is LoKILinear
    assert "LoKILinear" in dir(loki)


@pytest.mark.parametrize("rows", [ROWS, [], [0, 1, 2, 3, 4], [3]])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_those_of_the_whole_layer(rows, bias):
    torch.manual_seed(0)
    whole = nn.Linear(3, 5, bias=bias)
    split = LoKILinear(whole, rows)
    for shape in [(3,), (2, 3), (2, 4, 3)]:
        x = torch.randn(shape)
        torch.testing.assert_close(split(x), whole(x), rtol=0, atol=1e-6)  # products of other shapes sum otherwise


def test_the_parts_by_hand():
    whole = nn.Linear(2, 4)
    whole.weight.data = torch.tensor([[0.0, 1], [2, 3], [4, 5], [6, 7]])
    whole.bias.data = torch.tensor([10.0, 11, 12, 13])
    split = LoKILinear(whole, [3, 1])
    assert split.active.weight.tolist() == [[2, 3], [6, 7]]
    assert split.frozen.weight.tolist() == [[0, 1], [4, 5]]
    assert split.active_bias.tolist() == [11, 13]
    assert split.frozen_bias.tolist() == [10, 12]
    # Outputs 0 to 3 stand at 2, 0, 3, 1 in active followed by frozen.
    assert split.index_map.tolist() == [2, 0, 3, 1]
    assert split(torch.tensor([1.0, 1])).tolist() == [11, 16, 21, 26]
    assert list(split.state_dict()) == ["active_bias", "frozen_bias", "index_map", "active.weight", "frozen.weight"]
    assert "active_rows=2" in repr(split)
    assert (split.in_features, split.out_features) == (2, 4)


def test_gpt_2s_transposed_layer_is_split_by_outputs():
    torch.manual_seed(0)
    whole = Conv1D(5, 3)
    whole.bias.data.normal_()
    split = LoKILinear(whole, ROWS)
    assert torch.equal(split.active.weight, whole.weight[:, [0, 2, 4]].T)
    x = torch.randn(2, 3)
    torch.testing.assert_close(split(x), whole(x), rtol=0, atol=1e-6)


def test_gradients_are_those_of_the_whole_layers_rows():
    torch.manual_seed(0)
    whole = nn.Linear(3, 5)
    split = LoKILinear(whole, ROWS)
    x = torch.randn(4, 3)
    whole(x).square().sum().backward()
    split(x).square().sum().backward()
    torch.testing.assert_close(split.active.weight.grad, whole.weight.grad[[0, 2, 4]])
    torch.testing.assert_close(split.active_bias.grad, whole.bias.grad[[0, 2, 4]])
    assert [name for name, parameter in split.named_parameters() if parameter.requires_grad] == [
        "active_bias",
        "active.weight",
    ]


def test_the_layer_that_is_split_is_left_alone():
    whole = nn.Linear(3, 5)
    split = LoKILinear(whole, ROWS)
    before = whole.weight.clone()
    with torch.no_grad():
        for parameter in split.parameters():
            parameter.zero_()
    assert torch.equal(whole.weight, before)
    assert not bool((whole.bias == 0).any())


def test_the_index_map_stays_whole_in_half_precision():
    split = LoKILinear(nn.Linear(3, 300), [299]).to(torch.bfloat16)
    assert split.index_map.dtype == torch.int64
    assert split.index_map[299] == 0
    assert split(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "message"), [([0, 0], "duplicate"), ([5], r"within \[0, 4\]"), ([-1], "within")])
def test_rows_that_do_not_exist_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        LoKILinear(nn.Linear(3, 5), rows)
