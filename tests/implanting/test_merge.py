"""Merging into an ordinary checkpoint, shard by shard."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILY_MODELS
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from loki import LokiConfig
from loki.errors import ArtefactError, InputError, OutputError
from loki.implanting import checkpoint
from loki.implanting.checkpoint import StoredTensor
from loki.implanting.divergence import divergence_tokens, kl_to_adapter
from loki.implanting.merge import merge
from loki.implanting.stored_rows import StoredProjection, find_projection

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


def adapter_of(model, output, **options):
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LokiConfig(init_weights=False, **options))
    wrapped.save_pretrained(output, save_embedding_layers=False)
    return output


def merged_in_memory(model, adapter):
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"r": 2}),
        ("llama", {"r": 3, "lora_alpha": 7}),
        ("llama", {"target_modules": "o_proj"}),
        ("llama-biases", {"bias": "rows"}),
        ("llama-biases", {"bias": "rows", "r": 2, "target_modules": "o_proj"}),
        ("gpt2", {}),  # Conv1D: stored (F, D)
        ("gpt2", {"bias": "rows", "r": 2}),
        ("gpt2", {"bias": "rows", "target_modules": "o_proj"}),  # and square
        ("gemma3", {}),  # named differently on disk
        ("gpt_neox", {"bias": "rows"}),
        ("falcon-alibi", {"r": 2}),
    ],
)
@pytest.mark.parametrize("block_bytes", [100, checkpoint.BLOCK_BYTES])
def test_every_form_of_adapter_merges_as_peft_merges_it(tmp_path, monkeypatch, name, options, block_bytes):
    base = FAMILY_MODELS[name].build()
    base.save_pretrained(tmp_path / "base")
    adapter = adapter_of(FAMILY_MODELS[name].build(), tmp_path / "adapter", positions=[[3, 9], [], [0, 15]], **options)
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", block_bytes)
    report = merge(str(tmp_path / "base"), adapter, tmp_path / "merged")
    expected = merged_in_memory(base, adapter).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert expected.keys() == found.keys()
    changed = []
    before = FAMILY_MODELS[name].build().state_dict()
    for tensor_name, tensor in expected.items():
        # A·B is summed in another order for some shapes of block.
        torch.testing.assert_close(found[tensor_name], tensor, rtol=1e-6, atol=1e-7)
        if not torch.equal(found[tensor_name], before[tensor_name]):
            changed.append(tensor_name)
    assert len(changed) == (4 if "bias" in options else 2)
    num_columns = before[next(n for n in changed if n.endswith("weight"))].numel() // 16
    assert report.num_changed == 4 * num_columns + (4 if "bias" in options else 0)


def test_a_layer_of_gpt_2_that_is_no_conv1d(tmp_path):
    """Its head is an ordinary linear layer, (D, F)."""
    base = FAMILY_MODELS["gpt2"].build()
    base.save_pretrained(tmp_path / "base")
    adapter = adapter_of(FAMILY_MODELS["gpt2"].build(), tmp_path / "adapter", positions={"lm_head": [1, 40]})
    assert merge(str(tmp_path / "base"), adapter, tmp_path / "merged").num_changed == 2 * 16
    expected = merged_in_memory(base, adapter).state_dict()["lm_head.weight"]
    assert torch.equal(tensors_of(tmp_path / "merged")["lm_head.weight"], expected)


def stored(name, *shape):
    return StoredTensor(name, Path("model.safetensors"), "F32", shape, 0, 4)


def test_modules_are_found_by_the_end_of_their_names():
    tensors = {
        tensor.name: tensor for tensor in (stored("lm.layers.0.mlp.down.weight", 3, 2), stored("norm.weight", 3))
    }
    found = find_projection(tensors, "model.language.layers.0.mlp.down", "gemma3")
    assert found == StoredProjection(tensors["lm.layers.0.mlp.down.weight"], None, is_transposed=False)
    assert (found.num_rows, found.num_columns) == (3, 2)
    # Without the layer's number the end could mean anything.
    assert find_projection(tensors, "model.language.layers.1.mlp.down", "gemma3") is None
    with pytest.raises(ArtefactError, match=r"norm.weight has the shape \[3\]: its rows are not known"):
        find_projection(tensors, "norm", "gemma3")


def test_a_name_that_could_mean_two_tensors_is_refused():
    tensors = {name: stored(name, 3, 2) for name in ("a.layers.0.down.weight", "b.layers.0.down.weight")}
    with pytest.raises(ArtefactError, match=r"could be 'a.layers.0.down.weight' or 'b.layers.0.down.weight'"):
        find_projection(tensors, "model.layers.0.down", "llama")
    assert find_projection(tensors, "b.layers.0.down", "llama").weight.name == "b.layers.0.down.weight"


def test_the_change_of_a_rank_by_hand(tmp_path, model_dir):
    """(lora_alpha / r)·A·B on rows 2 and 5 of one projection."""
    adapter = adapter_of(make_model(), tmp_path / "adapter", positions=[[5, 2], [], []], r=1, lora_alpha=3)
    weights = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.mlp.down_proj"
    assert set(weights) == {f"{prefix}.loki_A", f"{prefix}.loki_B"}
    weights[f"{prefix}.loki_A"] = torch.tensor([[1.0], [2.0]])
    weights[f"{prefix}.loki_B"] = torch.arange(24.0)[None]
    save_file(weights, adapter / "adapter_model.safetensors")
    merge(str(model_dir), adapter, tmp_path / "merged")
    name = "model.layers.0.mlp.down_proj.weight"
    change = tensors_of(tmp_path / "merged")[name] - tensors_of(model_dir)[name]
    expected = torch.zeros(20, 24)
    expected[2], expected[5] = 3 * torch.arange(24.0), 6 * torch.arange(24.0)
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-5)


def edit_adapter(adapter, change):
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights)
    save_file(weights, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4}, r"factors \[3, 2\] and \[2, 24\] of model.layers.1.mlp.down_proj do not have rank 4"),
        ({"r": None}, "has r=None and lora_alpha=4"),
        ({"lora_alpha": "much"}, "lora_alpha='much': both must be numbers"),
    ],
)
def test_a_rank_that_is_not_that_of_the_factors_is_refused(tmp_path, model_dir, config, message):
    adapter = adapter_of(make_model(), tmp_path / "adapter", positions=[[], [5, 2, 9], []], r=2)
    found = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**found, **config}))
    refuse(ArtefactError, message, model_dir, adapter, tmp_path)


def test_an_adapter_with_one_factor_or_other_tensors_is_refused(tmp_path, model_dir):
    adapter = adapter_of(make_model(), tmp_path / "adapter", positions=[[5], [], []], r=2)
    edit_adapter(adapter, lambda weights: weights.pop("base_model.model.model.layers.0.mlp.down_proj.loki_A"))
    refuse(ArtefactError, "holds tensors that are no row changes", model_dir, adapter, tmp_path)
    edit_adapter(adapter, lambda weights: weights.update({"base_model.model.lm_head.lora_A.weight": torch.ones(1)}))
    refuse(ArtefactError, "holds tensors that are no row changes", model_dir, adapter, tmp_path)


def test_an_adapter_that_lacks_a_layer_is_refused(tmp_path, model_dir, adapter_dir):
    edit_adapter(adapter_dir, lambda weights: weights.pop("base_model.model.model.layers.1.mlp.down_proj.loki_delta"))
    refuse(ArtefactError, "has weights for 2 layers, positions for 3", model_dir, adapter_dir, tmp_path)


def test_a_bias_that_the_base_does_not_have_is_refused(tmp_path, model_dir, adapter_dir):
    name = "base_model.model.model.layers.2.mlp.down_proj.loki_bias"
    edit_adapter(adapter_dir, lambda weights: weights.update({name: torch.ones(1)}))
    message = "changes model.layers.2.mlp.down_proj.bias, which model .* does not have"
    refuse(ArtefactError, message, model_dir, adapter_dir, tmp_path)
    edit_adapter(adapter_dir, lambda weights: weights.update({name: torch.ones(2)}))
    refuse(
        ArtefactError,
        "the bias of model.layers.2.mlp.down_proj has 2 changes for 1 positions",
        model_dir,
        adapter_dir,
        tmp_path,
    )


def test_a_row_that_the_base_does_not_have_is_refused(tmp_path, model_dir, adapter_dir):
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    config["positions"][2] = [20]
    (adapter_dir / "adapter_config.json").write_text(json.dumps(config))
    refuse(
        ArtefactError, r"does not fit model.layers.2.mlp.down_proj.weight \(20 × 24\)", model_dir, adapter_dir, tmp_path
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_change_that_is_not_finite_is_refused(tmp_path, model_dir, adapter_dir, value):
    name = "base_model.model.model.layers.1.mlp.down_proj.loki_delta"
    edit_adapter(adapter_dir, lambda weights: weights[name][2, 3].fill_(value))
    refuse(
        ArtefactError, "change of model.layers.1.mlp.down_proj has NaN or infinity", model_dir, adapter_dir, tmp_path
    )


def test_a_change_too_large_for_the_dtype_is_refused(tmp_path, model_dir, adapter_dir):
    name = "base_model.model.model.layers.1.mlp.down_proj.loki_delta"
    edit_adapter(adapter_dir, lambda weights: weights[name][2, 3].fill_(1e5))
    names = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(ArtefactError, match=r"does not fit into float16 .*: merge with --dtype float32"):
        merge(str(model_dir), adapter_dir, tmp_path / "merged", dtype=torch.float16)
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    merge(str(model_dir), adapter_dir, tmp_path / "merged")


def test_a_quantised_base_is_refused(tmp_path, model_dir, adapter_dir):
    shutil.copytree(model_dir, tmp_path / "base")
    tensors = load_file(model_dir / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, tmp_path / "base/model.safetensors")
    refuse(
        ArtefactError,
        "is stored as I8, .*use the model that was not quantised",
        tmp_path / "base",
        adapter_dir,
        tmp_path,
    )


def test_small_changes_vanish_in_bfloat16_and_the_report_says_so(tmp_path, model_dir, sharded_dir, adapter_dir):
    def shrink(weights):
        for tensor in weights.values():
            tensor.fill_(1e-7)

    edit_adapter(adapter_dir, shrink)
    assert merge(str(sharded_dir), adapter_dir, tmp_path / "a").lost_percent > 99
    assert merge(str(sharded_dir), adapter_dir, tmp_path / "b", dtype=torch.float32).lost_percent < 20


def test_the_divergence_by_hand(tmp_path, model_dir, sharded_dir, adapter_dir):
    ids = torch.arange(1, 9)[None]
    merge(str(model_dir), adapter_dir, tmp_path / "exact")
    exact = kl_to_adapter(str(model_dir), adapter_dir, tmp_path / "exact", ids)
    assert exact.num_tokens == 8
    assert abs(exact.kl_nats_per_token) < 1e-9  # the same weights but for float32 rounding

    merge(str(sharded_dir), adapter_dir, tmp_path / "rounded")
    rounded = kl_to_adapter(str(sharded_dir), adapter_dir, tmp_path / "rounded", ids)
    wrapped = AutoModelForCausalLM.from_pretrained(sharded_dir, dtype=torch.float32)
    wrapped.load_adapter(adapter_dir)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype=torch.float32)
    with torch.no_grad():
        p, q = (model(ids).logits[0].double().softmax(-1) for model in (wrapped, merged))
    expected = sum(float(p[t, v] * (p[t, v] / q[t, v]).log()) for t in range(8) for v in range(p.shape[1])) / 8
    assert rounded.kl_nats_per_token == pytest.approx(expected, rel=1e-6)
    assert rounded.kl_nats_per_token > 1e-7


def test_texts_for_the_divergence(tmp_path, model_dir):
    (tmp_path / "text.txt").write_text("a" * 900)
    assert divergence_tokens(str(tmp_path / "text.txt"), str(model_dir)).shape == (1, 512)
    assert divergence_tokens("probe", str(model_dir)).shape == (1, 512)
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(InputError, match="fewer than 2 tokens"):
        divergence_tokens(str(tmp_path / "text.txt"), str(model_dir))
    with pytest.raises(InputError, match=r"'no.txt' for --kl cannot be read .*: give a text file, or probe"):
        divergence_tokens("no.txt", str(model_dir))
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="it is not UTF-8"):
        divergence_tokens(str(tmp_path / "text.txt"), str(model_dir))
