"""Suppressed rows are zero, and everything else is bit-identical."""

import json

import pytest
import torch
from conversion import INPUT_IDS, POSITIONS, create, names_of, tensors_of, write_positions
from families import FAMILY_MODELS
from transformers import AutoModelForCausalLM

from loki.architecture import FAMILIES, projections
from loki.errors import ArtefactError, OutputError
from loki.implanting import checkpoint
from loki.implanting.suppress import suppress


@pytest.fixture
def positions(tmp_path):
    return write_positions(tmp_path / "1.json")


@pytest.mark.parametrize("block_bytes", [100, checkpoint.BLOCK_BYTES])
@pytest.mark.parametrize("module", ["down_proj", "o_proj"])
@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "gemma3", "falcon", "starcoder2"])
def test_output_nodes_are_zero_whatever_comes_in(tmp_path, positions, monkeypatch, name, module, block_bytes):
    FAMILY_MODELS[name].build().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", block_bytes)
    report = suppress(str(tmp_path / "base"), positions, tmp_path / "out", module=module)
    suppressed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    num_changed = 0
    for rows, was, now in zip(
        POSITIONS, projections(before, module).values(), projections(suppressed, module).values(), strict=True
    ):
        x = torch.randn(5, now.weight.shape[0] if name == "gpt2" else now.weight.shape[1])
        others = [row for row in range(16) if row not in rows]
        assert not now(x)[:, rows].any()
        torch.testing.assert_close(now(x)[:, others], was(x)[:, others], rtol=0, atol=0)
        num_changed += int((was.weight != now.weight).sum())
        num_changed += int((was.bias != now.bias).sum()) if getattr(was, "bias", None) is not None else 0
    assert report.num_changed == num_changed > 0
    assert report.num_suppressed_rows == 7
    assert report.num_parameters == sum(tensor.numel() for tensor in tensors_of(tmp_path / "base").values())
    changed = [
        n for n, t in tensors_of(tmp_path / "base").items() if not torch.equal(t, tensors_of(tmp_path / "out")[n])
    ]
    path = FAMILIES[before.config.model_type].projection(module)
    assert all(f".{path}." in changed_name for changed_name in changed)
    assert len(changed) == (4 if getattr(was, "bias", None) is not None else 2)
    with torch.no_grad():
        assert not torch.equal(before(INPUT_IDS).logits, suppressed(INPUT_IDS).logits)


def refuse(error, message, tmp_path, *arguments):
    before = names_of(tmp_path)
    with pytest.raises(error, match=message):
        suppress(*arguments)
    assert names_of(tmp_path) == before


def test_what_does_not_fit_is_refused(tmp_path, model_dir, positions):
    wrong = write_positions(tmp_path / "wrong.json", [[1], [2]])
    refuse(ArtefactError, "have 2 layers, the model has 3", tmp_path, str(model_dir), wrong, tmp_path / "out")
    wrong = write_positions(tmp_path / "wrong.json", [[1], [2], [20]])
    message = r"\(for the down-projection\): layer 2 names row 20, but the model's rows are 0 to 19"
    refuse(ArtefactError, message, tmp_path, str(model_dir), wrong, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    refuse(OutputError, "exists already", tmp_path, str(model_dir), positions, tmp_path / "out")
    create(model_dir, positions, tmp_path / "loki")
    refuse(ArtefactError, "is a LoKI model", tmp_path, str(tmp_path / "loki"), positions, tmp_path / "new")


def test_a_config_of_another_size_is_refused(tmp_path, positions):
    FAMILY_MODELS["llama"].build().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "hidden_size": 20}))
    message = "has 16 rows, its config says 20: fetch the model again"
    refuse(ArtefactError, message, tmp_path, str(tmp_path / "base"), positions, tmp_path / "out")
