import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from loki.training.chunked_divergence import chunked_divergence

T, D, V = 11, 6, 19


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(T, D), torch.randn(T, D, requires_grad=True), torch.randn(V, D)


def plain(base_TV, now_TV):
    return F.kl_div(now_TV.log_softmax(-1), base_TV.log_softmax(-1), reduction="sum", log_target=True)


def test_a_case_by_hand():
    """Base (1/2, 1/2), model (3/4, 1/4): ½·log(2/3) + ½·log 2, and the difference of the two as gradient."""
    now = torch.tensor([[0.75, 0.25]]).log().requires_grad_()
    found = chunked_divergence(torch.zeros(1, 2), now)
    found.backward()
    assert float(found.detach()) == pytest.approx(0.14384104, rel=1e-6)
    torch.testing.assert_close(now.grad, torch.tensor([[0.25, -0.25]]))


@pytest.mark.parametrize("at_once", [1, 4, 11, 100])
@pytest.mark.parametrize("with_head", [True, False])
def test_parity_with_kl_div(inputs, monkeypatch, at_once, with_head):
    monkeypatch.setattr("loki.training.chunked_divergence.POSITIONS_AT_ONCE", at_once)
    base_TD, now_TD, head_VD = inputs
    expected = plain(base_TD @ head_VD.T, now_TD @ head_VD.T)
    (expected_grad,) = torch.autograd.grad(3 * expected, now_TD)
    if with_head:
        found = chunked_divergence(base_TD, now_TD, head_VD)
    else:
        found = chunked_divergence(base_TD @ head_VD.T, now_TD @ head_VD.T)
    (found_grad,) = torch.autograd.grad(3 * found, now_TD)
    # A few dozen float32 operations in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(found_grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_equal_predictions_have_neither_divergence_nor_gradient(inputs):
    _, now_TD, head_VD = inputs
    found = chunked_divergence(now_TD.detach().clone(), now_TD, head_VD)
    (grad,) = torch.autograd.grad(found, now_TD)
    assert float(found.detach()) == 0
    assert not grad.any()


def test_bfloat16_keeps_its_dtype_and_sums_in_float32(inputs):
    base_TD, now_TD, head_VD = (x.detach().bfloat16() for x in inputs)
    now_TD.requires_grad_()
    found = chunked_divergence(base_TD, now_TD, head_VD)
    found.backward()
    assert (found.dtype, now_TD.grad.dtype) == (torch.float32, torch.bfloat16)
    expected = plain((base_TD @ head_VD.T).float(), (now_TD @ head_VD.T).float())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert not base_TD.requires_grad
