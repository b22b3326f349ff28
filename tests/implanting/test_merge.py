"""Merging into an ordinary checkpoint, shard by shard."""

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from loki import LokiConfig
from loki.errors import ArtefactError, InputError, OutputError
from loki.implanting.merge import merge

INPUT_IDS = torch.arange(1, 13).reshape(2, 6)


@pytest.fixture
def sharded_dir(tmp_path):
    """The tiny model in bfloat16, over several shards."""
    directory = tmp_path / "sharded"
    make_model().to(torch.bfloat16).save_pretrained(directory, max_shard_size="5KB")
    make_tokenizer().save_pretrained(directory)
    assert (directory / "model.safetensors.index.json").exists()
    return directory


@pytest.fixture
def adapter_dir(tmp_path, positions):
    directory = tmp_path / "adapter"
    torch.manual_seed(1)
    get_peft_model(make_model(), LokiConfig(positions=positions, init_weights=False)).save_pretrained(directory)
    return directory


def tensors_of(directory):
    found = {}
    for file in directory.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def test_merged_model_equals_the_adapter(tmp_path, model_dir, adapter_dir):
    merge(str(model_dir), adapter_dir, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    wrapped = make_model()
    wrapped.load_adapter(adapter_dir)
    with torch.no_grad():
        expected, found = wrapped(INPUT_IDS).logits, merged(INPUT_IDS).logits
    # The change is added to weights before instead of to outputs after the product: rounding only.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_everything_but_the_selected_rows_is_bit_identical(tmp_path, sharded_dir, adapter_dir, positions):
    merge(str(sharded_dir), adapter_dir, tmp_path / "merged")
    before, after = tensors_of(sharded_dir), tensors_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    for layer, rows in enumerate(positions):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        differs = (before.pop(name) != after[name]).any(dim=1)
        assert differs.nonzero().flatten().tolist() == sorted(rows)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


def test_shards_metadata_and_other_files_are_kept(tmp_path, sharded_dir, adapter_dir):
    (sharded_dir / "modeling_evil.py").write_text("raise SystemExit")
    (sharded_dir / "pytorch_model.bin").write_bytes(b"pickle")
    merge(str(sharded_dir), adapter_dir, tmp_path / "merged")
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert names == {file.name for file in sharded_dir.iterdir()} - {"modeling_evil.py", "pytorch_model.bin"}
    for shard in sharded_dir.glob("*.safetensors"):
        with safe_open(shard, "pt") as a, safe_open(tmp_path / "merged" / shard.name, "pt") as b:
            assert a.metadata() == b.metadata()


def test_report_counts_what_changed_and_what_rounding_took(tmp_path, model_dir, sharded_dir, adapter_dir, positions):
    exact = merge(str(model_dir), adapter_dir, tmp_path / "a")
    rounded = merge(str(sharded_dir), adapter_dir, tmp_path / "b")
    num_parameters = sum(p.numel() for p in make_model().parameters())
    assert exact.num_parameters == rounded.num_parameters == num_parameters
    assert exact.num_changed == sum(map(len, positions)) * 24
    deltas = load_file(adapter_dir / "adapter_model.safetensors").values()
    assert exact.change_norm == pytest.approx(sum(float(d.square().sum()) for d in deltas) ** 0.5)
    assert exact.lost_percent < 1e-3  # float32 rounding of a sum of numbers around 1
    # bfloat16 keeps 8 bits: weights around 0.3 are rounded to steps around 1e-3, changes are around 0.02.
    assert 0.5 < rounded.lost_percent < 10


def test_another_dtype_can_be_stored(tmp_path, sharded_dir, adapter_dir):
    merge(str(sharded_dir), adapter_dir, tmp_path / "merged", dtype=torch.float32)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "merged").values()} == {torch.float32}
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "float32"


def refuse(error, message, base, adapter, tmp_path):
    """An error that leaves nothing behind."""
    names = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(error, match=message):
        merge(str(base), adapter, tmp_path / "merged")
    assert sorted(file.name for file in tmp_path.iterdir()) == names


def test_an_adapter_of_another_method_is_refused(tmp_path, model_dir, adapter_dir):
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    (adapter_dir / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    refuse(ArtefactError, "is of type 'LORA', not 'LOKI'", model_dir, adapter_dir, tmp_path)


def test_an_adapter_of_a_larger_model_is_refused(tmp_path, model_dir, positions):
    wide = make_model(intermediate_size=32)
    get_peft_model(wide, LokiConfig(positions=positions)).save_pretrained(tmp_path / "adapter")
    refuse(ArtefactError, r"does not fit .*down_proj.weight \(20 × 24\)", model_dir, tmp_path / "adapter", tmp_path)


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path, model_dir, positions):
    deep = make_model(num_hidden_layers=4)
    get_peft_model(deep, LokiConfig(positions=[*positions, [1]])).save_pretrained(tmp_path / "adapter")
    refuse(
        ArtefactError, "changes model.layers.3.*which model .* does not have", model_dir, tmp_path / "adapter", tmp_path
    )


def test_positions_that_do_not_match_the_weights_are_refused(tmp_path, model_dir, adapter_dir):
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    config["positions"][0].append(11)
    (adapter_dir / "adapter_config.json").write_text(json.dumps(config))
    refuse(ArtefactError, "has 2 row changes for 3 positions", model_dir, adapter_dir, tmp_path)


def test_damaged_adapter_weights_are_refused(tmp_path, model_dir, adapter_dir):
    path = adapter_dir / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refuse(ArtefactError, "are damaged", model_dir, adapter_dir, tmp_path)


def test_a_missing_shard_is_refused(tmp_path, sharded_dir, adapter_dir):
    next(iter(sorted(sharded_dir.glob("*.safetensors")))).unlink()
    refuse(ArtefactError, "shard .* is missing", sharded_dir, adapter_dir, tmp_path)


def test_a_shard_that_lacks_a_tensor_is_refused(tmp_path, sharded_dir, adapter_dir):
    shard = sorted(sharded_dir.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    tensors.popitem()
    save_file(tensors, shard)
    refuse(ArtefactError, "do not hold what their index says", sharded_dir, adapter_dir, tmp_path)


def test_an_index_that_points_outside_the_folder_is_refused(tmp_path, sharded_dir, adapter_dir):
    index_path = sharded_dir / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    first = next(iter(index["weight_map"]))
    shutil.copyfile(sharded_dir / index["weight_map"][first], tmp_path / "elsewhere.safetensors")
    index["weight_map"][first] = "../elsewhere.safetensors"
    index_path.write_text(json.dumps(index))
    refuse(ArtefactError, "'../elsewhere.safetensors' .* is missing", sharded_dir, adapter_dir, tmp_path)


def test_a_model_without_safetensors_is_refused(tmp_path, model_dir, adapter_dir):
    shutil.copytree(model_dir, tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    refuse(InputError, "has no safetensors weights", tmp_path / "base", adapter_dir, tmp_path)


def test_an_existing_output_is_never_touched(tmp_path, model_dir, adapter_dir):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/precious.txt").write_text("mine")
    refuse(OutputError, "exists already", model_dir, adapter_dir, tmp_path)
    assert (tmp_path / "merged/precious.txt").read_text() == "mine"


def test_an_adapter_of_named_modules_merges_too(tmp_path, model_dir):
    names = {"o_proj": [1], "1.self_attn.o_proj": [2, 3], "mlp.up_proj": [0]}
    get_peft_model(make_model(), LokiConfig(positions=names, init_weights=False)).save_pretrained(tmp_path / "adapter")
    report = merge(str(model_dir), tmp_path / "adapter", tmp_path / "merged")
    wrapped = make_model()
    wrapped.load_adapter(tmp_path / "adapter")
    with torch.no_grad():
        expected = wrapped(INPUT_IDS).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(INPUT_IDS).logits
    assert report.num_changed == 4 * 20 + 3 * 20  # o_proj and up_proj have 20 inputs each
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
