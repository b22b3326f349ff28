from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny import NUM_COLUMNS, make_model

from loki import LokiConfig
from loki.study.row_damage import DamageAnchor, DamageRates, mean_damage

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


def test_the_mean_is_over_all_texts_of_a_log(tmp_path):
    scores = np.random.default_rng(1).random((5, 3, 20), dtype=np.float32)
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file.create_dataset("dataset", data=scores, chunks=(2, 3, 20))
    assert mean_damage(tmp_path / "d.h5") == pytest.approx(scores.mean(axis=0), rel=1e-6)


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


def test_steps_are_scaled_row_by_row(model):
    damage_LD = DAMAGE_LD.copy()
    damage_LD[0, 1], damage_LD[2, 5] = 1e6, 1e-6
    rates, before = DamageRates(damage_LD), torch.cat([change.detach().clone() for change in changes(model)])
    call(rates, "on_pre_optimizer_step", model)
    with torch.no_grad():
        for change in changes(model):
            change += 1.0
    call(rates, "on_optimizer_step", model)
    steps = torch.cat([change.detach() for change in changes(model)]) - before
    chosen = np.array([1e6, *CHOSEN[1:5], 1e-6])
    # torch's median of six is the third.
    expected = np.clip(np.sqrt(np.sort(chosen)[2] / chosen), 0.25, 4)
    assert (expected[0], expected[-1]) == (0.25, 4)
    assert steps.mean(1).tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert float(steps.std(1).max()) < 1e-4
