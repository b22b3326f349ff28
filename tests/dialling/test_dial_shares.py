import numpy as np
import pytest
import torch

from loki.dialling.shares import integrated

KINDS = ["rows", "product", "lora"]


@pytest.mark.parametrize("kind", KINDS)
def test_shares_add_up_to_what_the_whole_did(dialled, yardstick, kind):
    adapter = dialled(kind)
    yard = yardstick(adapter)
    adapter.set(np.zeros(adapter.num_units))
    base = yard.measure()
    adapter.set(np.ones(adapter.num_units))
    whole = yard.measure()
    assert base.kl == pytest.approx(0, abs=1e-9)
    gain = -integrated(adapter, yard.task_losses, nodes=32).sum()
    damage = integrated(adapter, yard.divergences, nodes=32).sum()
    assert gain == pytest.approx(base.task_loss - whole.task_loss, rel=2e-3)
    assert damage == pytest.approx(whole.kl, rel=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_each_share_is_the_integral_of_its_own_derivative(dialled, yardstick, kind):
    """Against central differences of the measured divergence, unit by unit, at the same nodes."""
    adapter = dialled(kind)
    yard = yardstick(adapter)
    found = integrated(adapter, yard.divergences, nodes=2)
    nodes, step = (0.5 - np.sqrt(1 / 12), 0.5 + np.sqrt(1 / 12)), 0.02
    for unit in range(adapter.num_units):
        slopes = []
        for node in nodes:
            ends = []
            for sign in (-1, 1):
                scales = np.full(adapter.num_units, node)
                scales[unit] += sign * step
                adapter.set(scales)
                ends.append(yard.measure().kl)
            slopes.append((ends[1] - ends[0]) / (2 * step))
        assert found[unit] == pytest.approx(np.mean(slopes), rel=0.03, abs=2e-5)


def test_the_adapter_is_left_as_it_was_trained(dialled, yardstick):
    adapter = dialled("rows")
    before = [tensor.clone() for part in adapter.parts for tensor in part.tensors]
    integrated(adapter, yardstick(adapter).task_losses)
    after = [tensor for part in adapter.parts for tensor in part.tensors]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(tensor.grad is None for tensor in after)
