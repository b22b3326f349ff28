"""The modelling file: every family, every way of loading, and no need of this package."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
import transformers
from conversion import INPUT_IDS, POSITIONS, create, load, logits, tensors_of, train, write_positions
from families import FAMILY_MODELS
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import make_model, make_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from loki import restore_loki_model
from loki.architecture import FAMILIES, family_of
from loki.implanting.modeling import modeling_loki

MODELING = Path(str(resources.files("loki.implanting.modeling") / "modeling_loki.py"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny Llama, its LoKI model, and the positions file."""
    root = tmp_path_factory.mktemp("modeling")
    make_model().save_pretrained(root / "base")
    make_tokenizer().save_pretrained(root / "base")
    positions = write_positions(root / "10.json")
    create(root / "base", positions, root / "loki")
    return root


def test_every_family_has_its_classes():
    for model_type in FAMILIES:
        config_class = transformers.CONFIG_MAPPING[model_type]
        base_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        ours = getattr(modeling_loki, f"LoKI{base_class.__name__}")
        assert issubclass(ours, (modeling_loki.SplitRows, base_class))
        assert issubclass(ours, base_class)
        assert ours.config_class is getattr(modeling_loki, f"LoKI{config_class.__name__}")
        assert issubclass(ours.config_class, config_class)
        assert ours.config_class.model_type == model_type


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_family_is_split_trained_and_restored(name, tmp_path):
    FAMILY_MODELS[name].build().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    positions = write_positions(tmp_path / "10.json")
    create(tmp_path / "base", positions, tmp_path / "loki")
    split, info = load(tmp_path / "loki", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(split).__name__.startswith("LoKI")
    torch.testing.assert_close(logits(split), logits(base), rtol=0, atol=1e-5)

    family = family_of(base.config.model_type)
    parts = (".active.weight", ".active_bias")
    trainable = {name for name, parameter in split.named_parameters() if parameter.requires_grad}
    layers = [f"{family.layers}.{layer}.{family.down_proj}" for layer in (0, 2)]
    has_bias = getattr(base.get_submodule(layers[0]), "bias", None) is not None
    assert trainable == {layer + part for layer in layers for part in (parts if has_bias else parts[:1])}

    train(tmp_path / "loki", tmp_path / "trained")
    restore_loki_model(positions, tmp_path / "trained", str(tmp_path / "base"), tmp_path / "restored")
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "restored")
    assert type(restored) is type(base)
    trained = load(tmp_path / "trained")
    torch.testing.assert_close(logits(restored), logits(trained), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(restored), logits(base), rtol=0, atol=1e-4)
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "restored")
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        layer = next((layer for layer in (0, 2) if f".{layer}.{family.down_proj}." in tensor_name), None)
        differs = tensor != after[tensor_name]
        if layer is None:
            assert not differs.any(), tensor_name
            continue
        if tensor.ndim == 2:
            transposed = base.config.model_type == "gpt2"
            differs = (differs.T if transposed else differs).any(dim=1)
        assert differs.nonzero().flatten().tolist() == sorted(POSITIONS[layer]), tensor_name


def test_the_folder_carries_the_file_byte_for_byte_and_so_do_checkpoints(folders, tmp_path):
    assert (folders / "loki/modeling_loki.py").read_bytes() == MODELING.read_bytes()
    train(folders / "loki", tmp_path / "trained")
    assert (tmp_path / "trained/modeling_loki.py").read_bytes() == MODELING.read_bytes()
    train(tmp_path / "trained", tmp_path / "again")
    assert (tmp_path / "again/modeling_loki.py").read_bytes() == MODELING.read_bytes()
    for folder in (folders / "loki", tmp_path / "trained", tmp_path / "again"):
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == {
            "AutoConfig": "modeling_loki.LoKILlamaConfig",
            "AutoModel": "modeling_loki.LoKILlamaForCausalLM",
            "AutoModelForCausalLM": "modeling_loki.LoKILlamaForCausalLM",
        }
        assert config["model_type"] == "llama"
        assert config["architectures"] == ["LoKILlamaForCausalLM"]
        assert config["target_pos"] == [sorted(rows) for rows in POSITIONS]
        assert config["target_module"] == "model.layers.{layer}.mlp.down_proj"


def test_it_loads_where_this_package_cannot_be_imported(folders):
    program = (
        "import sys; sys.modules['loki'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folders / 'loki')!r}, trust_remote_code=True)\n"
        "print(type(model).__name__, sum(p.numel() for p in model.parameters() if p.requires_grad))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"LoKILlamaForCausalLM {7 * 24}\n"
    assert "loki" not in MODELING.read_text().split('"""', 2)[2].replace("LoKI", "").replace("loki create-model", "")


def test_auto_classes_give_the_model_with_its_head(folders):
    config = AutoConfig.from_pretrained(folders / "loki", trust_remote_code=True)
    assert type(config).__name__ == "LoKILlamaConfig"
    assert config.target_pos == [sorted(rows) for rows in POSITIONS]
    model = AutoModel.from_pretrained(folders / "loki", trust_remote_code=True)
    assert torch.equal(logits(model), logits(load(folders / "loki")))
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert sum(p.numel() for p in fresh.parameters() if p.requires_grad) == 7 * 24
    tokenizer = AutoTokenizer.from_pretrained(folders / "loki")
    assert tokenizer("a").input_ids == make_tokenizer()("a").input_ids


def test_embeddings_stay_tied(folders):
    model = load(folders / "loki")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in tensors_of(folders / "loki")


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}])
def test_other_ways_of_loading(folders, options):
    model = load(folders / "loki", **options)
    dtype = options.get("dtype", torch.float32)
    projection = model.model.layers[0].mlp.down_proj
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert projection.index_map.dtype == torch.int64
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 7 * 24
    exact, whole = logits(make_model()), logits(make_model().to(dtype))
    # In bfloat16 the parts sum in another order than the whole: as far from exact as the whole is.
    assert (logits(model) - exact).abs().max() <= 1e-5 + 2 * (whole - exact).abs().max()


def test_it_can_be_built_on_the_meta_device_and_filled(folders):
    config = AutoConfig.from_pretrained(folders / "loki", trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict({**tensors_of(folders / "loki")}, strict=False, assign=True)
    assert torch.equal(model.model.layers[2].mlp.down_proj.index_map[:4], torch.tensor([0, 4, 1, 2]))


def test_a_missing_index_map_is_made_from_the_positions(folders, tmp_path):
    from safetensors.torch import save_file

    model = load(folders / "loki")
    model.save_pretrained(tmp_path / "loki")
    tensors = {name: t for name, t in tensors_of(tmp_path / "loki").items() if not name.endswith("index_map")}
    save_file(tensors, tmp_path / "loki/model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load(tmp_path / "loki")), logits(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"target_pos": None}, "config has no target_pos"), ({"target_pos": [[1]]}, "has 1 lists, the model 3 layers")],
)
def test_a_config_without_fitting_rows_is_refused(folders, changes, message):
    config = AutoConfig.from_pretrained(folders / "loki", trust_remote_code=True)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(config, trust_remote_code=True)


def test_a_folder_of_the_public_implementation_needs_no_target_module(folders, tmp_path):
    model = load(folders / "loki")
    del model.config.target_module
    model.save_pretrained(tmp_path / "loki")
    assert torch.equal(logits(load(tmp_path / "loki")), logits(model))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # the name in all supported versions
def test_trainers_train_the_active_rows_only(folders, tmp_path):
    """The Trainer of transformers, with its checkpoints and gradient checkpointing of both kinds."""
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in INPUT_IDS]
    for reentrant in (True, False):
        output = tmp_path / f"run-{reentrant}"
        arguments = TrainingArguments(
            str(output),
            max_steps=2,
            save_steps=2,
            learning_rate=0.05,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            dataloader_pin_memory=False,
        )
        Trainer(load(folders / "loki"), arguments, train_dataset=rows).train()
        report = restore_loki_model(
            folders / "10.json", output / "checkpoint-2", str(folders / "base"), tmp_path / f"restored-{reentrant}"
        )
        assert report.num_changed == 7 * 24
        assert report.num_other_tensors == 0


def test_the_snippet_of_the_public_readme(folders, tmp_path):
    """Train a LoRA adapter on the active part, merge it with PEFT, restore."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["active"], r=2, task_type="CAUSAL_LM")
    wrapped = get_peft_model(load(folders / "loki"), config)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        wrapped(INPUT_IDS, labels=INPUT_IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(wrapped.eval())
    wrapped.save_pretrained(tmp_path / "lora_adapter")

    base_model = AutoModel.from_pretrained(folders / "loki", trust_remote_code=True)
    lora_model = PeftModel.from_pretrained(base_model, tmp_path / "lora_adapter")
    merged_model = lora_model.merge_and_unload()
    merged_model.save_pretrained(tmp_path / "merged")

    report = restore_loki_model(
        target_pos_path=folders / "10.json",
        model_path=tmp_path / "merged",
        model_name=str(folders / "base"),
        output_path=tmp_path / "restored",
    )
    assert report.num_other_tensors == 0
    assert report.num_changed == 7 * 24
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "restored")
    torch.testing.assert_close(logits(restored), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, logits(make_model()), rtol=0, atol=1e-4)
