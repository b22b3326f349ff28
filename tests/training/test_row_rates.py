"""Steps by damage: the factors by hand, with a real optimiser, and through a whole training."""

import json
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from loki import LokiConfig, RowRates
from loki.errors import ArtefactError, InputError
from loki.provenance import fingerprint_model
from loki.rows import RowSelection
from loki.training.row_rates import rates_of
from loki.training.settings import TrainSettings
from loki.training.sft import load_record, train

POSITIONS = [[1, 7], [0, 3, 19], [5]]
DAMAGE_LD = np.random.default_rng(0).random((3, 20)).astype(np.float32) + 0.1
DAMAGE_LD[0, 1], DAMAGE_LD[2, 5] = 1e6, 1e-6
CHOSEN = np.array([DAMAGE_LD[layer, row] for layer, rows in enumerate(POSITIONS) for row in rows], dtype=np.float64)
# torch's median of six is the third.
RATES = np.clip(np.sqrt(np.sort(CHOSEN)[2] / CHOSEN), 0.25, 4)
MODEL = fingerprint_model(make_model()).as_dict()
EXAMPLES = [
    {"prompt": [{"role": "user", "content": f"say {word}"}], "completion": [{"role": "assistant", "content": word}]}
    for word in ("one", "two", "three", "four", "five")
]
SETTINGS = TrainSettings(
    learning_rate=1e-2, steps=1, batch_size=2, save_every=1, log_every=1, scale_learning_rate=False
)


@pytest.fixture(autouse=True)
def accelerator():
    """A trainer has made one before training begins."""
    Accelerator()


@pytest.fixture
def write_log(tmp_path):
    """Writes a log of two texts with this mean score."""

    def write(score="damage", mean_LD=DAMAGE_LD, name="damage.h5", model=MODEL, **more):
        from loki.log.schema import HEADER, LogHeader

        settings = {} if score is None else {"score": score, **more}
        header = LogHeader(model, "tiny", "texts", settings, *mean_LD.shape)
        with h5py.File(tmp_path / name, "w") as file:
            file.create_dataset("dataset", data=np.stack([0.5 * mean_LD, 1.5 * mean_LD]), chunks=(1, *mean_LD.shape))
            file.attrs[HEADER] = json.dumps(header.as_dict())
        return tmp_path / name

    return write


def adapted(**options):
    config = LokiConfig(positions=POSITIONS, init_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(make_model(), config)


def trained_rows(model, what="loki_delta"):
    return [tensor for name, tensor in model.named_parameters() if what in name]


def call(callback, event, model):
    return getattr(callback, event)(SimpleNamespace(), SimpleNamespace(), SimpleNamespace(), model=model)


def test_factors_by_hand():
    found = rates_of(torch.tensor([4.0, 1.0, 0.25, 1e9, 1e-9, 0.0]), torch.tensor(1.0))
    assert found.tolist() == [0.5, 1.0, 2.0, 0.25, 4.0, 4.0]
    # Nothing to compare with: what has any damage moves least.
    assert rates_of(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(0.0)).tolist() == [4.0, 4.0, 0.25]


def test_steps_are_scaled_row_by_row_and_biases_with_them(write_log):
    model, rates = adapted(), RowRates(write_log())
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "loki_bias"):
                module.loki_bias["default"] = torch.nn.Parameter(torch.zeros(len(module.loki_rows["default"])))
    before = [tensor.detach().clone() for tensor in trained_rows(model)]
    call(rates, "on_train_begin", model)
    call(rates, "on_pre_optimizer_step", model)
    with torch.no_grad():
        for tensor in trained_rows(model) + trained_rows(model, "loki_bias"):
            tensor += 1.0
    call(rates, "on_optimizer_step", model)
    steps = torch.cat([now.detach() - then for now, then in zip(trained_rows(model), before, strict=True)])
    assert (RATES[0], RATES[-1]) == (0.25, 4)
    assert steps.mean(1).tolist() == pytest.approx(RATES.tolist(), rel=1e-4)
    assert float(steps.std(1).max()) < 1e-4
    assert torch.cat(trained_rows(model, "loki_bias")).tolist() == pytest.approx(RATES.tolist(), rel=1e-6)


def test_a_training_takes_such_steps(write_log, tmp_path):
    """One step of AdamW from zero: each row's change is that of a plain training, times its rate."""
    for name, rates in (("plain", None), ("scaled", RowRates(write_log()))):
        train(
            make_model(),
            make_tokenizer(),
            RowSelection.from_lists(POSITIONS),
            EXAMPLES,
            SETTINGS,
            tmp_path / name,
            row_rates=rates,
        )
    plain, scaled = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "scaled"))
    place = 0
    for name, change in plain.items():
        assert change.any()
        expected = torch.from_numpy(RATES[place : place + len(change)]).float()[:, None] * change
        assert torch.allclose(scaled[name], expected, rtol=1e-4, atol=1e-9), name
        place += len(change)
    assert place == len(RATES)
    assert load_record(tmp_path / "scaled")["row_rates"] == RowRates(write_log()).as_dict()
    assert "row_rates" not in load_record(tmp_path / "plain")


def test_an_interrupted_training_ends_with_the_same_bits_and_no_others_rates(write_log, tmp_path):
    def run(name, rates, **more):
        settings = replace(SETTINGS, steps=4)
        chosen = RowSelection.from_lists(POSITIONS)
        train(make_model(), make_tokenizer(), chosen, EXAMPLES, settings, tmp_path / name, row_rates=rates, **more)
        return load_file(tmp_path / name / "adapter_model.safetensors")

    def interrupt(steps, _what):
        for number, step in enumerate(steps):
            if number == 2:
                raise KeyboardInterrupt
            yield step

    whole = run("whole", RowRates(write_log()))
    with pytest.raises(KeyboardInterrupt):
        run("cut", RowRates(write_log()), track=interrupt)
    other = RowRates(write_log(mean_LD=2 * DAMAGE_LD, name="other.h5"))
    for rates in (None, other):
        with pytest.raises(ArtefactError, match="unfinished training of other row_rates"):
            run("cut", rates)
    again = run("cut", RowRates(write_log()))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("score", ["kva", "first_order", "activation_norm", None])
def test_other_scores_are_refused(write_log, score):
    with pytest.raises(InputError, match=rf"damage.h5 has scores of kind '{score or 'kva'}': give a log of `loki ana"):
        RowRates(write_log(score))
    assert RowRates(write_log("fisher")).mean_LD.shape == DAMAGE_LD.shape


@pytest.mark.parametrize("shape", [(2, 20), (3, 19), (4, 21)])
def test_a_log_of_another_model_is_refused(write_log, shape):
    rates = RowRates(write_log(mean_LD=np.ones(shape, np.float32)))
    with pytest.raises(InputError, match=rf"the log has {shape[0]} layers of {shape[1]} rows, and .* has 20: analyse"):
        call(rates, "on_train_begin", adapted())


def test_a_log_of_another_architecture_is_refused_and_other_weights_are_told(write_log, tmp_path, caplog):
    def run(model):
        rates = RowRates(write_log(model={**MODEL, **model}))
        chosen = RowSelection.from_lists(POSITIONS)
        train(make_model(), make_tokenizer(), chosen, EXAMPLES, SETTINGS, tmp_path / "a", row_rates=rates)

    with pytest.raises(ArtefactError, match=r"row rates: log .* was made with a other model, not with this"):
        run({"architecture": "other"})
    assert not list(tmp_path.glob("a*"))
    run({"weights": "0"})
    assert "row rates: log" in caplog.text


def test_a_log_of_other_modules_is_refused(write_log):
    rates = RowRates(write_log(site_module="o_proj"))
    with pytest.raises(InputError, match=r"scores rows of self_attn.o_proj, and the adapter changes .*down_proj"):
        call(rates, "on_train_begin", adapted())
    call(rates, "on_train_begin", adapted(target_modules="o_proj"))


def test_what_has_no_rows_of_its_own_is_refused(write_log):
    rates = RowRates(write_log())
    with pytest.raises(InputError, match=r"LoKI\* \(--rank\) trains a product: leave one of them out"):
        call(rates, "on_train_begin", adapted(r=2))
    lora = get_peft_model(make_model(), LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="row rates are for rows of a LoKI adapter, and this one has none"):
        call(rates, "on_train_begin", lora)
