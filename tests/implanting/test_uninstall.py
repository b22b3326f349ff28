"""Uninstalling one of two skills: its rows are the base's, everything else is the merged model's, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conversion import create, names_of, tensors_of, write_positions
from families import FAMILY_MODELS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from loki import LokiConfig
from loki.errors import ArtefactError, InputError, OutputError
from loki.implanting import checkpoint
from loki.implanting.merge import merge
from loki.implanting.uninstall import uninstall

FIRST, SECOND = [[7, 1], [], [0, 15, 3]], [[2, 0, 14], [5], [4, 1]]
"""Disjoint rows of the models in `families`, unsorted and between each other."""


def make_adapter(model, folder, positions, seed, **options):
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LokiConfig(positions=positions, init_weights=False, **options))
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def bits_of(folder):
    """Every tensor's bytes: equal floats may differ in the sign of zero."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors_of(folder).items()
    }


@pytest.fixture
def base(tmp_path):
    """A Llama of several shards, with a tokenizer."""
    model = FAMILY_MODELS["llama"].build(eos_token_id=0)
    model.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    make_tokenizer().save_pretrained(tmp_path / "base")
    assert (tmp_path / "base/model.safetensors.index.json").exists()
    return tmp_path / "base"


@pytest.fixture
def first(tmp_path):
    return make_adapter(FAMILY_MODELS["llama"].build(), tmp_path / "first", FIRST, 1)


@pytest.fixture
def second(tmp_path):
    return make_adapter(FAMILY_MODELS["llama"].build(), tmp_path / "second", SECOND, 2)


@pytest.fixture
def both(tmp_path, base, first, second):
    """The base with both skills."""
    merge(str(base), [first, second], tmp_path / "both")
    return tmp_path / "both"


def edit(folder, change):
    """Change the tensors of a checkpoint's first shard that has a down-projection of layer 0."""
    name = "model.layers.0.mlp.down_proj.weight"
    (shard,) = [file for file in folder.glob("*.safetensors") if name in load_file(file)]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", ({}, {})),
        ("llama", ({"r": 2, "lora_alpha": 3}, {})),
        ("llama", ({"target_modules": "o_proj"}, {"target_modules": "o_proj", "r": 2})),
        ("llama-biases", ({"bias": "rows"}, {"bias": "rows"})),
        ("llama-biases", ({}, {"bias": "rows", "r": 2})),
        ("gpt2", ({}, {"bias": "rows", "r": 2})),  # Conv1D: stored (F, D)
        ("gpt2", ({"bias": "rows", "target_modules": "o_proj"}, {})),  # and square
        ("gemma3", ({}, {})),  # named differently on disk
        ("gpt_neox", ({"bias": "rows"}, {"r": 2})),
        ("falcon-alibi", ({"r": 2}, {})),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_bytes", [100, checkpoint.BLOCK_BYTES])
def test_both_minus_one_is_the_other(tmp_path, monkeypatch, caplog, name, options, dtype, block_bytes):
    FAMILY_MODELS[name].build(dtype=dtype).save_pretrained(tmp_path / "base")
    adapters = [
        make_adapter(FAMILY_MODELS[name].build(), tmp_path / f"adapter{seed}", positions, seed, **chosen)
        for seed, (positions, chosen) in enumerate(zip((FIRST, SECOND), options, strict=True))
    ]
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", block_bytes)
    base = str(tmp_path / "base")
    merge(base, adapters, tmp_path / "both")
    alone = []
    for number, adapter in enumerate(adapters):
        merge(base, adapter, tmp_path / f"alone{number}")
        alone.append(bits_of(tmp_path / f"alone{number}"))
    both = tensors_of(tmp_path / "both")
    for number, adapter in enumerate(adapters):
        report = uninstall(adapter, str(tmp_path / "both"), base, tmp_path / f"without{number}", strict=True)
        assert bits_of(tmp_path / f"without{number}") == alone[1 - number]
        without = tensors_of(tmp_path / f"without{number}")
        assert report.num_changed == sum(int((without[name] != both[name]).sum()) for name in both) > 0
        assert report.num_parameters == sum(tensor.numel() for tensor in both.values())
        assert report.num_rows == sum(map(len, (FIRST, SECOND)[number]))
        assert (report.num_absent, report.num_altered) == (0, 0)
    # And the other one after it: the base.
    uninstall(adapters[1], str(tmp_path / "without0"), base, tmp_path / "nothing", strict=True)
    assert bits_of(tmp_path / "nothing") == bits_of(tmp_path / "base")
    assert not caplog.records
    AutoModelForCausalLM.from_pretrained(tmp_path / "without0")


def test_the_rows_by_hand(tmp_path, base, first, both):
    """Rows of the first adapter are the base's, all other rows the merged model's."""
    uninstall(first, str(both), str(base), tmp_path / "out")
    before, merged, after = tensors_of(base), tensors_of(both), tensors_of(tmp_path / "out")
    assert after.keys() == merged.keys()
    for name, tensor in after.items():
        expected = merged[name].clone()
        if name.endswith("down_proj.weight"):
            rows = FIRST[int(name.split(".")[2])]
            expected[rows] = before[name][rows]
        assert torch.equal(tensor, expected), name


def test_shards_tokenizer_and_config_are_the_merged_models(tmp_path, base, first, both):
    (both / "chat_template.jinja").write_text("changed after merging")
    config = json.loads((both / "config.json").read_text())
    (both / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    (both / "modeling_evil.py").write_text("raise SystemExit")
    uninstall(first, str(both), str(base), tmp_path / "out")
    assert names_of(tmp_path / "out") == [name for name in names_of(both) if name != "modeling_evil.py"]
    assert (tmp_path / "out/chat_template.jinja").read_text() == "changed after merging"
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 7


def test_the_merged_models_dtype_is_kept(tmp_path, base, first, second):
    """The base's rows are rounded to it: what merging nothing into them would have stored."""
    merge(str(base), [first, second], tmp_path / "half", dtype=torch.bfloat16)
    merge(str(base), second, tmp_path / "alone", dtype=torch.bfloat16)
    report = uninstall(first, str(tmp_path / "half"), str(base), tmp_path / "out", strict=True)
    assert bits_of(tmp_path / "out") == bits_of(tmp_path / "alone")
    assert report.num_altered == 0


def test_a_wider_merged_model_gets_the_bases_values(tmp_path, base, first, second):
    FAMILY_MODELS["llama"].build(dtype=torch.bfloat16).save_pretrained(tmp_path / "halved")
    merge(str(tmp_path / "halved"), [first, second], tmp_path / "wide", dtype=torch.float32)
    uninstall(first, str(tmp_path / "wide"), str(tmp_path / "halved"), tmp_path / "out", strict=True)
    merge(str(tmp_path / "halved"), second, tmp_path / "alone", dtype=torch.float32)
    assert bits_of(tmp_path / "out") == bits_of(tmp_path / "alone")


@pytest.mark.parametrize("way", ["other first", "rounded after", "rounded and widened", "peft"])
@pytest.mark.parametrize("rank", [0, 2])
def test_rounding_on_the_way_is_no_other_change(tmp_path, base, second, way, rank):
    first = make_adapter(FAMILY_MODELS["llama"].build(), tmp_path / "first", FIRST, 1, r=rank)
    if way == "other first":
        merge(str(base), second, tmp_path / "step", dtype=torch.bfloat16)
        merge(str(tmp_path / "step"), first, tmp_path / "both")
    elif way == "peft":
        wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first)
        wrapped.merge_and_unload().save_pretrained(tmp_path / "both")
    else:
        merge(str(base), [first, second], tmp_path / "step")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "step").to(torch.bfloat16)
        model = model.float() if way == "rounded and widened" else model
        model.save_pretrained(tmp_path / "both")
    report = uninstall(first, str(tmp_path / "both"), str(base), tmp_path / "out", strict=True)
    assert (report.num_absent, report.num_altered) == (0, 0)


def test_positions_of_the_rows_will_do(tmp_path, base, first, second, both):
    report = uninstall(write_positions(tmp_path / "1.json", FIRST), str(both), str(base), tmp_path / "out")
    merge(str(base), second, tmp_path / "alone")
    assert bits_of(tmp_path / "out") == bits_of(tmp_path / "alone")
    assert (report.num_rows, report.num_changed, report.num_absent, report.num_altered) == (5, 5 * 24, 0, None)


@pytest.mark.parametrize("module", ["down_proj", "o_proj"])
@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "gemma3"])
def test_positions_put_biases_back_too(tmp_path, name, module):
    FAMILY_MODELS[name].build().save_pretrained(tmp_path / "base")
    options = {"target_modules": module, "bias": "none" if name == "gemma3" else "rows"}
    adapter = make_adapter(FAMILY_MODELS[name].build(), tmp_path / "adapter", FIRST, 1, **options)
    merge(str(tmp_path / "base"), adapter, tmp_path / "merged")
    positions = write_positions(tmp_path / "1.json", FIRST)
    report = uninstall(positions, str(tmp_path / "merged"), str(tmp_path / "base"), tmp_path / "out", module=module)
    assert bits_of(tmp_path / "out") == bits_of(tmp_path / "base") != bits_of(tmp_path / "merged")
    assert report.num_rows == 5


def test_biases_that_the_adapter_did_not_change_stay(tmp_path):
    """Another training moved them: no business of this adapter's."""
    FAMILY_MODELS["llama-biases"].build().save_pretrained(tmp_path / "base")
    adapter = make_adapter(FAMILY_MODELS["llama-biases"].build(), tmp_path / "adapter", FIRST, 1)
    merge(str(tmp_path / "base"), adapter, tmp_path / "merged")
    name = "model.layers.0.mlp.down_proj.bias"
    edit(tmp_path / "merged", lambda tensors: tensors[name].add_(1))
    report = uninstall(adapter, str(tmp_path / "merged"), str(tmp_path / "base"), tmp_path / "out", strict=True)
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    assert torch.equal(after[name], before[name] + 1)
    assert report.num_changed == 5 * 24


def test_what_is_not_installed_is_told(tmp_path, base, first, second, caplog):
    merge(str(base), second, tmp_path / "merged")
    report = uninstall(first, str(tmp_path / "merged"), str(base), tmp_path / "out")
    assert (report.num_rows, report.num_changed, report.num_absent, report.num_altered) == (5, 0, 5, 0)
    assert bits_of(tmp_path / "out") == bits_of(tmp_path / "merged")
    message = f"nothing of {first} is installed in {tmp_path / 'merged'}: its rows are the base's already"
    assert caplog.messages == [message]
    refuse(
        ArtefactError,
        "nothing of .*first is installed in .* give adapter, model and base that belong together, or leave out --str",
        tmp_path,
        *(first, str(tmp_path / "merged"), str(base), tmp_path / "strict"),
        strict=True,
    )


def test_rows_that_are_the_bases_already_are_told(tmp_path, base, first, both, caplog):
    original = tensors_of(base)
    name = "model.layers.0.mlp.down_proj.weight"
    edit(both, lambda tensors: tensors[name].__setitem__(7, original[name][7]))
    report = uninstall(first, str(both), str(base), tmp_path / "out")
    assert (report.num_rows, report.num_changed, report.num_absent, report.num_altered) == (5, 4 * 24, 1, 0)
    assert caplog.messages == [f"1 of 5 rows of {first} are the base's in {both} already"]


def test_a_change_of_zero_is_installed_wherever_it_is(tmp_path, base, caplog):
    idle = make_adapter(FAMILY_MODELS["llama"].build(), tmp_path / "idle", FIRST, 1)
    weights = load_file(idle / "adapter_model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, idle / "adapter_model.safetensors")
    report = uninstall(idle, str(base), str(base), tmp_path / "out", strict=True)
    assert (report.num_changed, report.num_absent, report.num_altered) == (0, 0, 0)
    assert not caplog.records


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_were_changed_further_go_back_with_a_warning(tmp_path, base, caplog, rank, dtype):
    first = make_adapter(FAMILY_MODELS["llama"].build(), tmp_path / "first", FIRST, 1, r=rank)
    merge(str(base), first, tmp_path / "merged", dtype=dtype)
    name = "model.layers.0.mlp.down_proj.weight"

    def change(tensors):
        tensors[name][7, 3] *= 1.05
        tensors[name][7, 4] += 0.01

    edit(tmp_path / "merged", change)
    report = uninstall(first, str(tmp_path / "merged"), str(base), tmp_path / "out")
    assert (report.num_rows, report.num_absent, report.num_altered) == (5, 0, 1)
    expected = (
        f"1 of 5 rows of {first} are not the base's plus its change in {tmp_path / 'merged'} (row 7 of {name}, for"
    )
    assert caplog.messages == [f"{expected} one): what else changed them goes too"]
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found[name], tensors_of(base)[name].to(dtype))
    message = r"1 of 5 rows .*\(row 7 of model.layers.0.mlp.down_proj.weight, for one\).* or leave out --strict"
    options = (first, str(tmp_path / "merged"), str(base), tmp_path / "strict")
    refuse(ArtefactError, message, tmp_path, *options, strict=True)


def test_another_base_is_told(tmp_path, base, first, both, caplog):
    FAMILY_MODELS["llama"].build(seed=5).save_pretrained(tmp_path / "sibling")
    uninstall(first, str(both), str(tmp_path / "sibling"), tmp_path / "out")
    assert "5 of 5 rows" in caplog.messages[0]
    options = (first, str(both), str(tmp_path / "sibling"), tmp_path / "strict")
    refuse(ArtefactError, "give adapter, model and base that belong together", tmp_path, *options, strict=True)


def test_overlapping_skills_lose_the_shared_rows(tmp_path, base, first, caplog):
    """Merged one after the other, which no check can see; uninstalling takes the second one's share too."""
    third = make_adapter(FAMILY_MODELS["llama"].build(), tmp_path / "third", [[7], [2], []], 3)
    merge(str(base), first, tmp_path / "a")
    merge(str(tmp_path / "a"), third, tmp_path / "both")
    assert uninstall(first, str(tmp_path / "both"), str(base), tmp_path / "out").num_altered == 1
    assert "row 7 of model.layers.0.mlp.down_proj.weight" in caplog.messages[0]


def refuse(error, message, tmp_path, *arguments, **options):
    """An error that leaves nothing behind."""
    before = names_of(tmp_path)
    with pytest.raises(error, match=message):
        uninstall(*arguments, **options)
    assert names_of(tmp_path) == before


def test_adapters_without_rows_of_their_own_are_refused(tmp_path, base, first, both):
    get_peft_model(FAMILY_MODELS["llama"].build(), LoraConfig(target_modules=["down_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    message = (
        "adapter .*lora is of type 'LORA', not 'LOKI': it has no rows of its own to put back; "
        "merge the other adapters into the base instead"
    )
    refuse(ArtefactError, message, tmp_path, tmp_path / "lora", str(both), str(base), tmp_path / "out")
    config = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    refuse(
        ArtefactError,
        "has modules_to_save: it has no rows of its own",
        tmp_path,
        *(first, str(both), str(base), tmp_path / "out"),
    )


def test_what_is_no_adapter_is_refused(tmp_path, base, both):
    (tmp_path / "empty").mkdir()
    options = (str(both), str(base), tmp_path / "out")
    refuse(ArtefactError, "empty has no adapter_config.json", tmp_path, tmp_path / "empty", *options)
    refuse(
        InputError,
        "'.*/nowhere' does not exist: name an adapter folder, or a positions file",
        tmp_path,
        *(tmp_path / "nowhere", *options),
    )
    (tmp_path / "rows.json").write_text("[[1]")
    refuse(ArtefactError, "rows.json is not JSON", tmp_path, tmp_path / "rows.json", *options)
    wrong = write_positions(tmp_path / "rows.json", [[1], [2]])
    refuse(ArtefactError, "rows.json have 2 layers, the model has 3", tmp_path, wrong, *options)
    wrong = write_positions(tmp_path / "rows.json", [[1], [2], [16]])
    refuse(
        ArtefactError, "rows.json: layer 2 names row 16, but the model's rows are 0 to 15", tmp_path, wrong, *options
    )


def test_the_module_belongs_to_positions(tmp_path, base, first, both):
    message = "--site-module o_proj is for positions files: adapter .*first says whose rows it changes"
    refuse(InputError, message, tmp_path, first, str(both), str(base), tmp_path / "out", module="o_proj")


def test_models_that_do_not_belong_together_are_refused(tmp_path, base, first, both):
    FAMILY_MODELS["gpt2"].build().save_pretrained(tmp_path / "gpt2")
    message = r"model '.*both' is of type 'llama', base '.*gpt2' of type 'gpt2': give --base the model that it was made"
    refuse(ArtefactError, message, tmp_path, first, str(both), str(tmp_path / "gpt2"), tmp_path / "out")
    FAMILY_MODELS["llama"].build(intermediate_size=20).save_pretrained(tmp_path / "narrow")
    message = r"first does not fit model.layers.0.mlp.down_proj.weight \(16 × 20\) of model '.*narrow': give --base the"
    refuse(ArtefactError, message, tmp_path, first, str(both), str(tmp_path / "narrow"), tmp_path / "out")
    message = r"first does not fit .* of model '.*narrow': give --model a model that it was merged into"
    refuse(ArtefactError, message, tmp_path, first, str(tmp_path / "narrow"), str(base), tmp_path / "out")
    positions = write_positions(tmp_path / "1.json", FIRST)
    message = r"down_proj.weight is \[16, 24\] in the model, \[16, 20\] in the base: give --base the model that"
    refuse(ArtefactError, message, tmp_path, positions, str(both), str(tmp_path / "narrow"), tmp_path / "out")
    FAMILY_MODELS["llama-biases"].build().save_pretrained(tmp_path / "biases")
    message = r"down_proj.bias is not there in the model, \[16\] in the base"
    refuse(ArtefactError, message, tmp_path, positions, str(both), str(tmp_path / "biases"), tmp_path / "out")


def test_an_adapter_of_another_architecture_is_refused(tmp_path, base, both):
    other = make_adapter(FAMILY_MODELS["gpt2"].build(), tmp_path / "other", FIRST, 1)
    message = (
        "other changes transformer.h.0.mlp.c_proj.weight, which model '.*both' does not have: give --model a model"
    )
    refuse(ArtefactError, message, tmp_path, other, str(both), str(base), tmp_path / "out")
    deep = make_adapter(make_model(num_hidden_layers=4), tmp_path / "deep", [*FIRST, [1]], 1)
    refuse(ArtefactError, "deep", tmp_path, deep, str(both), str(base), tmp_path / "out")


def test_a_missing_tensor_is_refused(tmp_path, base, first, both):
    merged = AutoModelForCausalLM.from_pretrained(both)
    merged.save_pretrained(tmp_path / "single")
    name = "model.layers.0.mlp.down_proj.weight"
    edit(tmp_path / "single", lambda tensors: tensors.pop(name))
    message = (
        f"first changes {name}, which model '.*single' does not have: give --model a model that it was merged into"
    )
    refuse(ArtefactError, message, tmp_path, first, str(tmp_path / "single"), str(base), tmp_path / "out")
    message = f"first changes {name}, which model '.*single' does not have: give --base the model it was trained on"
    refuse(ArtefactError, message, tmp_path, first, str(both), str(tmp_path / "single"), tmp_path / "out")
    positions = write_positions(tmp_path / "1.json", FIRST)
    message = f"model .*single has no tensor {name}"
    refuse(ArtefactError, message, tmp_path, positions, str(tmp_path / "single"), str(base), tmp_path / "out")


def test_a_bias_that_one_of_both_lacks_is_refused(tmp_path):
    FAMILY_MODELS["llama-biases"].build().save_pretrained(tmp_path / "base")
    adapter = make_adapter(FAMILY_MODELS["llama-biases"].build(), tmp_path / "adapter", FIRST, 1, bias="rows")
    merge(str(tmp_path / "base"), adapter, tmp_path / "merged")
    name = "model.layers.0.mlp.down_proj.bias"
    for where, option in (("merged", "--model"), ("base", "--base")):
        shutil.copytree(tmp_path / where, tmp_path / "cut")
        edit(tmp_path / "cut", lambda tensors: tensors.pop(name))
        models = [str(tmp_path / ("cut" if where == other else other)) for other in ("merged", "base")]
        message = f"adapter changes {name}, which model '.*cut' does not have: give {option}"
        refuse(ArtefactError, message, tmp_path, adapter, *models, tmp_path / "out")
        shutil.rmtree(tmp_path / "cut")


@pytest.mark.parametrize("which", ["base", "both"])
def test_missing_shards_and_quantised_weights_are_refused(tmp_path, base, first, both, which):
    folder = {"base": base, "both": both}[which]
    name = "model.layers.0.mlp.down_proj.weight"
    edit(folder, lambda tensors: tensors.__setitem__(name, tensors[name].to(torch.int8)))
    message = f"{name} of .*{which}.* is stored as I8, .*use the model that was not quantised"
    refuse(ArtefactError, message, tmp_path, first, str(both), str(base), tmp_path / "out")
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    refuse(ArtefactError, "shard .* is missing", tmp_path, first, str(both), str(base), tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_base_rows_that_cannot_be_stored_are_refused(tmp_path, base, first, value):
    merge(str(base), first, tmp_path / "merged", dtype=torch.float16)
    name = "model.layers.0.mlp.down_proj.weight"
    edit(base, lambda tensors: tensors[name][7].fill_(value))
    message = f"{name} of .*base.* has rows that are not finite as F16, the model's dtype"
    refuse(ArtefactError, message, tmp_path, first, str(tmp_path / "merged"), str(base), tmp_path / "out")


def test_a_tensor_that_is_named_twice_is_refused(tmp_path, base, both):
    module = "model.layers.0.mlp.down_proj"
    twice = make_adapter(FAMILY_MODELS["llama"].build(), tmp_path / "twice", {module: [1]}, 1)
    config = json.loads((twice / "adapter_config.json").read_text())
    config["positions"]["layers.0.mlp.down_proj"] = [2]
    (twice / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(twice / "adapter_model.safetensors")
    (tensor,) = weights.values()
    save_file(
        {**weights, "base_model.model.layers.0.mlp.down_proj.loki_delta": tensor.clone()},
        twice / "adapter_model.safetensors",
    )
    message = f"{module}.weight is named twice"
    refuse(ArtefactError, message, tmp_path, twice, str(both), str(base), tmp_path / "out")


def test_a_loki_model_is_refused(tmp_path, base, first, both):
    positions = write_positions(tmp_path / "1.json", FIRST)
    create(base, positions, tmp_path / "loki")
    for models, option in (((tmp_path / "loki", base), "--model"), ((both, tmp_path / "loki"), "--base")):
        message = f"model '.*loki' is a LoKI model: give {option} an ordinary one, such as restore-model writes"
        refuse(ArtefactError, message, tmp_path, first, *map(str, models), tmp_path / "out")


def test_nothing_is_ever_written_over(tmp_path, base, first, both):
    """Neither another folder, nor the merged model or the base themselves, nor through a link to them."""
    (tmp_path / "link").symlink_to(both)
    (tmp_path / "file").write_text("mine")
    for output in (both, base, first, tmp_path / "link", tmp_path / "file"):
        refuse(OutputError, "exists already", tmp_path, first, str(both), str(base), output)
    assert (tmp_path / "file").read_text() == "mine"
    # Models may be given by links.
    uninstall(first, str(tmp_path / "link"), str(base), tmp_path / "out", strict=True)


def test_an_index_that_points_outside_the_folder_is_refused(tmp_path, base, first, both):
    index = json.loads((both / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    shutil.copyfile(both / index["weight_map"][name], tmp_path / "elsewhere.safetensors")
    index["weight_map"][name] = "../elsewhere.safetensors"
    (both / "model.safetensors.index.json").write_text(json.dumps(index))
    message = "'../elsewhere.safetensors' .* is missing"
    refuse(ArtefactError, message, tmp_path, first, str(both), str(base), tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path, base, first, both, monkeypatch):
    """The system says that no space is left when the second shard is flushed."""
    flushed = []

    def flush(descriptor):
        flushed.append(descriptor)
        if len(flushed) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", flush)
    message = "cannot write .*out: No space left"
    refuse(OutputError, message, tmp_path, first, str(both), str(base), tmp_path / "out")


def test_a_killed_process_leaves_a_hidden_folder_only(tmp_path, base, first, second, both):
    program = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from loki.implanting import checkpoint\n"
        "from loki.implanting.uninstall import uninstall\n"
        "write, done = checkpoint.write_shard, []\n"
        "def dying(path, tensors, metadata):\n"
        "    write(path, tensors, metadata)\n"
        "    done.append(path)\n"
        "    if len(done) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.write_shard = dying\n"
        f"uninstall(Path({str(first)!r}), {str(both)!r}, {str(base)!r}, Path({str(tmp_path / 'out')!r}))\n"
    )
    before = set(tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - before
    assert left.name.startswith(".out.")
    uninstall(first, str(both), str(base), tmp_path / "out")  # and it does not stand in the way
    merge(str(base), second, tmp_path / "alone")
    assert bits_of(tmp_path / "out") == bits_of(tmp_path / "alone")
