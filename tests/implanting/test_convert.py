"""Making LoKI models and restoring them: names, dtypes, shards, and everything that can be wrong."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion import POSITIONS, create, load, logits, names_of, tensors_of, train, write_positions
from families import FAMILY_MODELS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from loki import create_loki_model, restore_loki_model
from loki.errors import ArchitectureError, ArtefactError, InputError, LokiError, OutputError
from loki.implanting import checkpoint

PROJECTION = "model.layers.{}.mlp.down_proj"


@pytest.fixture
def positions(tmp_path):
    return write_positions(tmp_path / "10.json")


@pytest.fixture
def base(tmp_path):
    """The tiny model in bfloat16, over several shards."""
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="5KB")
    make_tokenizer().save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    return tmp_path / "base"


@pytest.fixture
def split(tmp_path, base, positions):
    return create(base, positions, tmp_path / "loki")


@pytest.fixture
def trained(tmp_path, split):
    return train(split, tmp_path / "trained")


def restore(trained, positions, base, output, **options):
    return restore_loki_model(positions, trained, str(base), output, **options)


def edit(folder: Path, change) -> None:
    """Change the tensors of a checkpoint, wherever they are, into one file."""
    tensors = tensors_of(folder)
    change(tensors)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("block_bytes", [100, checkpoint.BLOCK_BYTES])
def test_the_parts_are_the_rows_in_ascending_order(base, positions, tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", block_bytes)
    before, after = tensors_of(base), tensors_of(create(base, positions, tmp_path / "loki"))
    for layer, rows in enumerate(POSITIONS):
        if not rows:
            continue
        whole = before.pop(f"{PROJECTION.format(layer)}.weight")
        others = [row for row in range(20) if row not in rows]
        parts = {
            part: after.pop(f"{PROJECTION.format(layer)}.{part}")
            for part in ("active.weight", "frozen.weight", "index_map")
        }
        assert torch.equal(parts["active.weight"], whole[sorted(rows)])
        assert torch.equal(parts["frozen.weight"], whole[others])
        together = torch.cat([parts["active.weight"], parts["frozen.weight"]])
        assert torch.equal(together[parts["index_map"]], whole)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_unsorted_and_sorted_positions_make_the_same_model(base, split, tmp_path):
    write_positions(tmp_path / "sorted.json", [sorted(rows) for rows in POSITIONS])
    create(base, tmp_path / "sorted.json", tmp_path / "other")
    assert {name: (split / name).read_bytes() for name in names_of(split)} == {
        name: (tmp_path / "other" / name).read_bytes() for name in names_of(tmp_path / "other")
    }


def test_create_reports_what_is_trainable_and_keeps_shards(base, positions, tmp_path):
    report = create_loki_model(
        model_name=str(base), target_pos_path=positions, save_dir=tmp_path / "loki", torch_dtype="auto"
    )
    assert report.num_parameters == sum(p.numel() for p in make_model().parameters())
    assert report.num_trainable == 7 * 24
    assert set(names_of(tmp_path / "loki")) == {*names_of(base), "modeling_loki.py"}
    index = json.loads((tmp_path / "loki/model.safetensors.index.json").read_text())
    stored = {name: file.name for file in (tmp_path / "loki").glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "loki").values())


def test_biases_of_selected_rows_are_trainable_too(tmp_path, positions):
    FAMILY_MODELS["starcoder2"].build().save_pretrained(tmp_path / "base")
    report = create_loki_model(model_name=str(tmp_path / "base"), target_pos_path=positions, save_dir=tmp_path / "loki")
    model = load(tmp_path / "loki")
    assert report.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) == 7 * (24 + 1)


@pytest.mark.parametrize("dtype", ["float32", "float16", torch.float32])
def test_create_stores_another_dtype(base, positions, tmp_path, dtype):
    create(base, positions, tmp_path / "loki", torch_dtype=dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    tensors = tensors_of(tmp_path / "loki")
    assert {t.dtype for name, t in tensors.items() if "index_map" not in name} == {expected}
    assert json.loads((tmp_path / "loki/config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
    assert load(tmp_path / "loki").dtype == expected


def test_create_has_the_arguments_of_the_public_implementation(tmp_path, positions, model_dir, caplog):
    with caplog.at_level(logging.INFO, logger="loki"):
        create_loki_model(object, object, str(model_dir), str(positions), str(tmp_path / "loki"))
    assert "have no effect" in caplog.text
    # bfloat16 unless told otherwise, as there.
    assert load(tmp_path / "loki").dtype == torch.bfloat16


def test_an_untrained_model_is_restored_bit_for_bit(base, split, positions, tmp_path):
    report = restore(split, positions, base, tmp_path / "restored")
    assert (report.num_changed, report.num_other_tensors) == (0, 0)
    for name in names_of(base):
        if name != "model.safetensors.index.json":
            assert (tmp_path / "restored" / name).read_bytes() == (base / name).read_bytes(), name
    before, after = (
        json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, tmp_path / "restored")
    )
    assert before == after
    assert names_of(base) == names_of(tmp_path / "restored")


def test_a_trained_model_keeps_names_dtypes_shards_and_other_rows(base, trained, positions, tmp_path):
    report = restore(trained, positions, base, tmp_path / "restored")
    assert names_of(base) == names_of(tmp_path / "restored")
    before, after, parts = tensors_of(base), tensors_of(tmp_path / "restored"), tensors_of(trained)
    num_changed = 0
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        layer = next((i for i in range(3) if name == f"{PROJECTION.format(i)}.weight" and POSITIONS[i]), None)
        if layer is None:
            assert torch.equal(after[name], tensor), name
            continue
        expected = tensor.clone()
        expected[sorted(POSITIONS[layer])] = parts[f"{PROJECTION.format(layer)}.active.weight"]
        assert torch.equal(after[name], expected)
        num_changed += int((expected != tensor).sum())
    assert report.num_changed == num_changed > 100
    assert report.num_parameters == sum(tensor.numel() for tensor in before.values())
    for shard in base.glob("*.safetensors"):
        assert list(load_file(shard)) == list(load_file(tmp_path / "restored" / shard.name))


@pytest.mark.parametrize("block_bytes", [100, 1000])
def test_small_blocks_restore_the_same(base, trained, positions, tmp_path, monkeypatch, block_bytes):
    restore(trained, positions, base, tmp_path / "whole")
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", block_bytes)
    restore(trained, positions, base, tmp_path / "blocks")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "blocks" / file.name).read_bytes()


def test_a_model_trained_in_float32_comes_back_in_the_bases_dtype(base, split, positions, tmp_path):
    """LlamaFactory trains and saves in float32 unless told otherwise."""
    train(split, tmp_path / "trained", dtype=torch.float32)
    report = restore(tmp_path / "trained", positions, base, tmp_path / "restored")
    active = tensors_of(tmp_path / "trained")[f"{PROJECTION.format(0)}.active.weight"]
    assert active.dtype == torch.float32
    after = tensors_of(tmp_path / "restored")[f"{PROJECTION.format(0)}.weight"]
    assert torch.equal(after[[1, 7, 15]], active.bfloat16())
    assert report.num_other_tensors == 0


def test_what_training_did_not_move_keeps_the_bases_precision(model_dir, positions, tmp_path):
    """A float32 base, a LoKI model in bfloat16: only elements that moved are rounded."""
    create(model_dir, positions, tmp_path / "loki", torch_dtype="bfloat16")
    name = f"{PROJECTION.format(2)}.active.weight"
    edit(tmp_path / "loki", lambda tensors: tensors[name][0, 3:5].add_(1))
    report = restore(tmp_path / "loki", positions, model_dir, tmp_path / "restored")
    assert report.num_changed == 2
    before, after = tensors_of(model_dir), tensors_of(tmp_path / "restored")
    expected = before[f"{PROJECTION.format(2)}.weight"].clone()
    expected[0, 3:5] = (expected[0, 3:5].bfloat16() + 1).float()
    assert torch.equal(after[f"{PROJECTION.format(2)}.weight"], expected)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_rounding_on_the_way_is_no_other_base(model_dir, positions, tmp_path):
    """A float32 base, split in bfloat16, trained and saved in float32."""
    create(model_dir, positions, tmp_path / "loki", torch_dtype="bfloat16")
    train(tmp_path / "loki", tmp_path / "trained", dtype=torch.float32)
    report = restore(tmp_path / "trained", positions, model_dir, tmp_path / "restored")
    assert report.num_other_tensors == 0
    assert 0 < report.num_changed <= 7 * 24


def test_restore_stores_another_dtype(base, trained, positions, tmp_path):
    restore(trained, positions, base, tmp_path / "restored", torch_dtype=torch.float32)
    assert {t.dtype for t in tensors_of(tmp_path / "restored").values()} == {torch.float32}
    assert json.loads((tmp_path / "restored/config.json").read_text())["dtype"] == "float32"
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "restored")),
        logits(load(trained, dtype=torch.float32)),
        rtol=0,
        atol=1e-5,
    )


def test_other_tensors_that_were_trained_are_kept_and_told(base, trained, positions, tmp_path, caplog):
    edit(trained, lambda tensors: tensors["model.norm.weight"].add_(1))
    with caplog.at_level(logging.WARNING, logger="loki"):
        report = restore(trained, positions, base, tmp_path / "restored")
    assert report.num_other_tensors == 1
    assert "1 tensors besides the selected rows differ from the base, model.norm.weight for one" in caplog.text
    assert torch.equal(tensors_of(tmp_path / "restored")["model.norm.weight"], tensors_of(trained)["model.norm.weight"])


def test_a_stored_head_that_is_tied_is_restored_from_the_embedding(split, positions, tmp_path, base):
    """Older checkpoints store the tied head too; saving the LoKI model leaves it out."""
    edit(base, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    restore(split, positions, base, tmp_path / "restored")
    assert torch.equal(tensors_of(tmp_path / "restored")["lm_head.weight"], tensors_of(base)["lm_head.weight"])
    edit(split, lambda tensors: tensors["model.embed_tokens.weight"].add_(1))
    restore(split, positions, base, tmp_path / "moved")
    moved = tensors_of(tmp_path / "moved")
    assert torch.equal(moved["lm_head.weight"], moved["model.embed_tokens.weight"])


def test_names_without_their_first_part_are_known(tmp_path):
    """GPT-2 on the Hub has `h.0.…`; transformers saves `transformer.h.0.…`."""
    FAMILY_MODELS["gpt2"].build().save_pretrained(tmp_path / "base")
    edit(
        tmp_path / "base",
        lambda tensors: [tensors.update({n.removeprefix("transformer."): tensors.pop(n)}) for n in list(tensors)],
    )
    positions = write_positions(tmp_path / "10.json")
    create(tmp_path / "base", positions, tmp_path / "loki")
    assert "h.0.mlp.c_proj.active.weight" in tensors_of(tmp_path / "loki")
    train(tmp_path / "loki", tmp_path / "trained")
    assert "transformer.h.0.mlp.c_proj.active.weight" in tensors_of(tmp_path / "trained")
    report = restore(tmp_path / "trained", positions, tmp_path / "base", tmp_path / "restored")
    assert (report.num_changed, report.num_other_tensors) == (7 * 65, 0)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "restored")), logits(load(tmp_path / "trained"))
    )


# What is refused: the message, and nothing left behind.


def refuse(error, message, tmp_path, call, *arguments, **options):
    before = {name: (tmp_path / name).stat().st_size for name in names_of(tmp_path)}
    with pytest.raises(error, match=message) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert {name: (tmp_path / name).stat().st_size for name in names_of(tmp_path)} == before


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([[1], [2]], "have 2 layers, the model has 3"),
        ([[1], [2], [20]], "layer 2 names row 20, but the model's rows are 0 to 19"),
        ([[1], [2], [3, 3]], "layer 2 names row 3 twice"),
        ([[], [], []], "name no row at all"),
        ({"0": [1]}, "must be a list with one list of row indices for each layer"),
    ],
)
def test_positions_of_another_model_are_refused(tmp_path, base, split, found, message):
    wrong = write_positions(tmp_path / "wrong.json", found)
    refuse(ArtefactError, message, tmp_path, create, base, wrong, tmp_path / "out")
    with pytest.raises(ArtefactError):
        restore(split, wrong, base, tmp_path / "out")


def test_a_loki_model_is_not_split_again(tmp_path, split, positions):
    refuse(InputError, "is a LoKI model already", tmp_path, create, split, positions, tmp_path / "out")


def test_an_unknown_family_is_refused(tmp_path, positions):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=3, n_head=2, vocab_size=50)).save_pretrained(tmp_path / "bloom")
    refuse(
        ArchitectureError,
        "unknown architecture 'bloom'",
        tmp_path,
        create,
        tmp_path / "bloom",
        positions,
        tmp_path / "o",
    )


def test_a_model_type_that_is_not_the_models_is_refused(tmp_path, base, positions):
    message = "model type 'qwen2' is not that of .*, which is 'llama': leave --model-type out"
    refuse(InputError, message, tmp_path, create, base, positions, tmp_path / "o", model_type="qwen2")
    create(base, positions, tmp_path / "o", model_type="llama")


@pytest.mark.parametrize("dtype", [torch.int8, "int8"])
def test_a_dtype_that_is_none_for_weights_is_refused(tmp_path, base, positions, dtype):
    message = "(weights cannot be stored as torch.int8|dtype 'int8' is unknown): choose"
    refuse(InputError, message, tmp_path, create, base, positions, tmp_path / "o", torch_dtype=dtype)


def test_code_of_the_base_is_not_needed(tmp_path, base, positions):
    """As Phi-3 has it on the Hub: a config class of its own, for a family that transformers knows."""
    code = "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    pass\n"
    (base / "configuration_own.py").write_text(code)
    config = json.loads((base / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (base / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    for trusted in (False, True):
        create(base, positions, tmp_path / f"loki-{trusted}", trust_remote_code=trusted)
        assert type(load(tmp_path / f"loki-{trusted}")).__name__ == "LoKILlamaForCausalLM"
        assert "configuration_own.py" not in names_of(tmp_path / f"loki-{trusted}")


def test_a_base_without_its_projections_is_refused(tmp_path, base, positions):
    edit(base, lambda tensors: tensors.pop(f"{PROJECTION.format(2)}.weight"))
    message = r"has no tensor model.layers.2.mlp.down_proj.weight, which its config speaks of"
    refuse(ArtefactError, message, tmp_path, create, base, positions, tmp_path / "out")


def test_a_base_of_another_shape_than_its_config_is_refused(tmp_path, base, positions):
    name = f"{PROJECTION.format(0)}.weight"
    edit(base, lambda tensors: tensors.update({name: tensors[name][:, :20].contiguous()}))
    message = "down_proj.weight of model .* has 20 × 20 elements, its config says 20 × 24"
    refuse(ArtefactError, message, tmp_path, create, base, positions, tmp_path / "out")


@pytest.mark.parametrize(("dtype", "stored"), [(torch.int8, "I8"), (torch.int64, "I64")])
def test_a_base_of_integers_is_refused(tmp_path, base, positions, dtype, stored):
    name = f"{PROJECTION.format(0)}.weight"
    edit(base, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    message = f"is stored as {stored}, .*: use the model that was not quantised"
    refuse(ArtefactError, message, tmp_path, create, base, positions, tmp_path / "out")


def test_positions_other_than_those_of_the_model_are_refused(tmp_path, base, trained):
    other = write_positions(tmp_path / "other.json", [[7, 1, 14], [], [0, 14, 3, 2]])
    message = "target_pos of model .* and positions file .*other.json differ: give the positions that it was made with"
    refuse(ArtefactError, message, tmp_path, restore, trained, other, base, tmp_path / "out")
    # Nor does it help to change the config.
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps({**config, "target_pos": [[7, 1, 14], [], [0, 14, 3, 2]]}))
    message = "layers.0.mlp.down_proj of model .* was split at other rows than the positions name"
    refuse(ArtefactError, message, tmp_path, restore, trained, other, base, tmp_path / "out")


def test_an_ordinary_model_is_not_restored(tmp_path, base, positions):
    refuse(
        ArtefactError,
        "is no LoKI model: its config.json has no target_pos",
        tmp_path,
        restore,
        base,
        positions,
        base,
        tmp_path / "o",
    )


def test_a_model_that_was_never_split_is_not_restored(tmp_path, base, positions):
    """What the public implementation's create-model leaves before training."""
    shutil.copytree(base, tmp_path / "loki")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "loki/config.json").write_text(json.dumps({**config, "target_pos": POSITIONS}))
    message = (
        "has model.layers.0.mlp.down_proj.weight in one piece: its rows were never split; name the folder that was"
    )
    refuse(ArtefactError, message, tmp_path, restore, tmp_path / "loki", positions, base, tmp_path / "out")


def test_another_base_is_refused(tmp_path, trained, positions):
    make_model(seed=1).to(torch.bfloat16).save_pretrained(tmp_path / "other")
    message = "frozen.weight of model .* differs from the base .*: give the base that it was made from"
    refuse(ArtefactError, message, tmp_path, restore, trained, positions, tmp_path / "other", tmp_path / "out")


def test_one_frozen_element_that_moved_is_refused(tmp_path, base, trained, positions):
    edit(trained, lambda tensors: tensors[f"{PROJECTION.format(2)}.frozen.weight"][-1, -1].add_(1))
    message = "layers.2.mlp.down_proj.frozen.weight of model .* differs from the base"
    refuse(ArtefactError, message, tmp_path, restore, trained, positions, base, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.mlp.down_proj.active.weight", "has no tensor model.layers.0.mlp.down_proj.active.weight"),
        ("model.layers.2.mlp.down_proj.index_map", "has no tensor model.layers.2.mlp.down_proj.index_map"),
        ("model.layers.1.mlp.down_proj.weight", "has no tensor model.layers.1.mlp.down_proj.weight"),
        ("model.norm.weight", "has no tensor model.norm.weight: name a whole LoKI model, and the base"),
    ],
)
def test_a_missing_tensor_is_refused(tmp_path, base, trained, positions, name, message):
    edit(trained, lambda tensors: tensors.pop(name))
    refuse(ArtefactError, message, tmp_path, restore, trained, positions, base, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.extra.weight", "model.layers.1.mlp.down_proj.active.weight"])
def test_an_unknown_tensor_is_refused(tmp_path, base, trained, positions, name):
    edit(trained, lambda tensors: tensors.update({name: torch.ones(2)}))
    refuse(
        ArtefactError,
        f"has the unknown tensor {name}: give the base that it was made from",
        tmp_path,
        restore,
        trained,
        positions,
        base,
        tmp_path / "out",
    )


def test_an_adapter_that_was_not_merged_is_named(tmp_path, base, split, positions):
    wrapped = get_peft_model(load(split), LoraConfig(target_modules=["active"], r=2))
    wrapped.base_model.model.save_pretrained(tmp_path / "unmerged")
    config = json.loads((split / "config.json").read_text())
    (tmp_path / "unmerged/config.json").write_text(json.dumps(config))
    assert any("lora_A" in name for name in tensors_of(tmp_path / "unmerged"))
    message = "unknown tensor .*(lora_|base_layer).*: merge its adapter first, with PEFT's merge_and_unload"
    refuse(ArtefactError, message, tmp_path, restore, tmp_path / "unmerged", positions, base, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.mlp.down_proj.active.weight", r"is \[2, 24\], where base and positions make it \[3, 24\]"),
        ("model.layers.0.mlp.down_proj.frozen.weight", r"is \[16, 24\], where base and positions make it \[17, 24\]"),
        ("model.embed_tokens.weight", r"is \[259, 20\], of the base \[260, 20\]: give the base that it was made from"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(tmp_path, base, trained, positions, name, message):
    edit(trained, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    refuse(ArtefactError, message, tmp_path, restore, trained, positions, base, tmp_path / "out")


def test_rows_that_are_not_finite_are_refused(tmp_path, base, trained, positions):
    edit(trained, lambda tensors: tensors[f"{PROJECTION.format(0)}.active.weight"][0, 0].fill_(float("nan")))
    message = "active.weight of model .* has NaN or infinity: train again"
    refuse(ArtefactError, message, tmp_path, restore, trained, positions, base, tmp_path / "out")


@pytest.mark.parametrize("which", ["base", "trained"])
def test_a_missing_or_damaged_shard_is_refused(tmp_path, base, trained, positions, which):
    folder = {"base": base, "trained": trained}[which]
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    refuse(
        ArtefactError, "is damaged: fetch the model again", tmp_path, restore, trained, positions, base, tmp_path / "o"
    )
    shard.unlink()
    error = ArtefactError if which == "base" else LokiError
    refuse(error, "is missing|no safetensors", tmp_path, restore, trained, positions, base, tmp_path / "o")


def test_an_existing_output_is_never_touched(tmp_path, base, trained, positions):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("mine")
    refuse(OutputError, "exists already", tmp_path, create, base, positions, tmp_path / "out")
    refuse(OutputError, "exists already", tmp_path, restore, trained, positions, base, tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path, base, trained, positions, monkeypatch):
    """The system says that no space is left when the second shard is flushed."""
    flushed = []

    def flush(descriptor):
        flushed.append(descriptor)
        if len(flushed) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", flush)
    refuse(OutputError, "cannot write .*out: No space left", tmp_path, create, base, positions, tmp_path / "out")
    flushed.clear()
    refuse(
        OutputError, "cannot write .*out: No space left", tmp_path, restore, trained, positions, base, tmp_path / "out"
    )


def test_a_killed_process_leaves_a_hidden_folder_only(tmp_path, base, trained, positions):
    program = (
        "import os, signal\n"
        "from loki.implanting import checkpoint\n"
        "from loki import restore_loki_model\n"
        "write, done = checkpoint.write_shard, []\n"
        "def dying(path, tensors, metadata):\n"
        "    write(path, tensors, metadata)\n"
        "    done.append(path)\n"
        "    if len(done) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.write_shard = dying\n"
        f"restore_loki_model({str(positions)!r}, {str(trained)!r}, {str(base)!r}, {str(tmp_path / 'out')!r})\n"
    )
    before = set(tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - before
    assert left.name.startswith(".out.")
    assert not (tmp_path / "out").exists()
    restore(trained, positions, base, tmp_path / "out")  # and it does not stand in the way


def test_the_shape_and_positions_of_qwen2_5_0_5b(tmp_path):
    """24 layers of 896 rows and 4,864 columns; lists of 44 to 268 unsorted rows, as the published ones are."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1000,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.uniform_()
    model.save_pretrained(tmp_path / "base", max_shard_size="200MB")
    counts = [44 + (268 - 44) * layer // 23 for layer in range(24)]
    lists = [torch.randperm(896)[:count].tolist() for count in counts]
    assert any(rows != sorted(rows) for rows in lists)
    positions = write_positions(tmp_path / "mixed.json", lists)
    report = create_loki_model(
        model_name=str(tmp_path / "base"), target_pos_path=positions, save_dir=tmp_path / "loki", torch_dtype="auto"
    )
    assert report.num_trainable == sum(counts) * 4864
    loaded = load(tmp_path / "loki", dtype=torch.bfloat16)
    assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) == report.num_trainable
    weight = model.model.layers[5].mlp.down_proj.weight
    assert torch.equal(loaded.model.layers[5].mlp.down_proj.active.weight, weight[sorted(lists[5])])
    restore(tmp_path / "loki", positions, tmp_path / "base", tmp_path / "restored")
    for shard in (tmp_path / "base").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "restored" / shard.name).read_bytes()
