from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny import NUM_COLUMNS, make_model

from loki import LokiConfig
from loki.study.row_damage import DamageAnchor

POSITIONS = [[1, 7], [0, 3, 19], [5]]
DAMAGE_LD = np.random.default_rng(0).random((3, 20)) + 0.1
CHOSEN = [DAMAGE_LD[layer, row] for layer, rows in enumerate(POSITIONS) for row in rows]


@pytest.fixture
def model():
    return get_peft_model(make_model(), LokiConfig(positions=POSITIONS, init_weights=False, task_type="CAUSAL_LM"))


def changes(model):
    return [tensor for name, tensor in model.named_parameters() if "loki_delta" in name]


def call(callback, event, model):
    getattr(callback, event)(SimpleNamespace(), SimpleNamespace(), SimpleNamespace(), model=model)


def test_the_anchor_is_the_gradient_of_the_estimated_divergence(model):
    """Against autograd of ½ Σ d_j ‖Δ_j‖² / F, on top of a gradient that is there already."""
    call(DamageAnchor(DAMAGE_LD, 3.0), "on_step_begin", model)
    found = [change.grad.clone() for change in changes(model)]
    rows = torch.cat([change.detach() for change in changes(model)]).requires_grad_()
    penalty = 3.0 * 0.5 * (torch.tensor(CHOSEN) * rows.double().square().sum(1)).sum() / NUM_COLUMNS
    (expected,) = torch.autograd.grad(penalty, rows)
    assert torch.allclose(torch.cat(found), expected, rtol=1e-5)
    call(DamageAnchor(DAMAGE_LD, 3.0), "on_step_begin", model)
    assert torch.allclose(torch.cat([change.grad for change in changes(model)]), 2 * expected, rtol=1e-5)
