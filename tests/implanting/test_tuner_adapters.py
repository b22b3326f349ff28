"""Merging and unmerging, several adapters in one model, and adapters on disk."""

import json

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from tiny import make_model
from torch import nn
from transformers import AutoModelForCausalLM
from tuned import FORMS, POSITIONS, base_tensors, build, config, dense_changes, logits, loki_layers, train_steps, wrap

from loki import LokiConfig
from loki.errors import InputError

every_form = pytest.mark.parametrize("form", FORMS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@every_form
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_equals_the_adapter(form, safe_merge):
    wrapped = wrap(form)
    expected = logits(wrapped)
    merged = wrapped.merge_and_unload(safe_merge=safe_merge)
    assert type(merged) is type(build(form))
    assert base_tensors(merged).keys() == base_tensors(build(form)).keys()
    # The change is added to weights before instead of to outputs after the product: rounding only.
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@every_form
@both_dtypes
def test_merged_weights_are_rounded_once(form, dtype):
    """W + Δ in float64, then one rounding: to float32, or over float32 to the base's dtype."""
    wrapped = wrap(form, dtype)
    changes = dict(dense_changes(wrapped))
    before = base_tensors(build(form, dtype))
    for name, tensor in base_tensors(wrapped.merge_and_unload()).items():
        if name not in changes:
            assert torch.equal(tensor, before[name]), name
            continue
        changed = changes[name] != 0
        assert torch.equal(tensor[~changed], before[name][~changed]), name
        exact = before[name].double() + changes[name]
        # One unit in the last place of float32 for A·B, whose sum may run in another order.
        torch.testing.assert_close(tensor, exact.float().to(dtype), rtol=0 if dtype is torch.bfloat16 else 1e-6, atol=0)


@every_form
@both_dtypes
def test_unmerging_is_exact(form, dtype):
    wrapped = wrap(form, dtype)
    before = base_tensors(wrapped)
    wrapped.merge_adapter()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in base_tensors(wrapped).items())
    wrapped.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(wrapped).items())


def add_second(wrapped, form="rows"):
    """An adapter on some of the first one's rows, and on others."""
    second = config(form, positions=[[1, 2], [5], [3]], init_weights=False)
    wrapped.add_adapter("second", second)


@every_form
def test_unmerging_two_adapters_on_the_same_rows_is_exact(form):
    wrapped = wrap(form, torch.bfloat16)
    add_second(wrapped, form)
    before = base_tensors(wrapped)
    wrapped.base_model.merge_adapter(["default", "second"])
    assert loki_layers(wrapped).popitem()[1].merged_adapters == ["default", "second"]
    wrapped.base_model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(wrapped).items())


def test_merging_does_nothing_to_layers_without_the_adapter():
    wrapped = wrap("rows")
    add_second(wrapped)
    layer = wrapped.base_model.model.model.layers[1].mlp.down_proj
    before = layer.base_layer.weight.clone()
    wrapped.base_model.merge_adapter(["default"])
    assert torch.equal(layer.base_layer.weight, before)
    assert layer.merged_adapters == []


def test_unmerging_what_is_not_merged_warns():
    wrapped = wrap("rows")
    with pytest.warns(UserWarning, match="Already unmerged"):
        wrapped.unmerge_adapter()


def break_change(wrapped, where):
    layer = loki_layers(wrapped)["model.layers.0.mlp.down_proj"]
    getattr(layer, where)["default"].data.view(-1)[0] = float("nan")
    return layer.base_layer


@pytest.mark.parametrize(
    ("form", "where"), [("rows", "loki_delta"), ("rank", "loki_A"), ("rows-and-biases", "loki_bias")]
)
def test_safe_merge_refuses_a_broken_change_and_leaves_the_base(form, where):
    wrapped = wrap(form)
    base_layer = break_change(wrapped, where)
    before = {name: tensor.clone() for name, tensor in base_layer.named_parameters()}
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        wrapped.merge_and_unload(safe_merge=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_layer.named_parameters())


@every_form
@pytest.mark.parametrize("merged", [False, True])
def test_disabling_the_adapter_gives_the_base(form, merged):
    """Biases too, and without PEFT's warning (here an error) that its own biases stay."""
    before = logits(build(form))
    wrapped = wrap(form)
    assert not torch.allclose(logits(wrapped), before, atol=1e-2)
    if merged:
        wrapped.merge_adapter()
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), before)
    assert not torch.allclose(logits(wrapped), before, atol=1e-2)


def test_several_adapters_are_switched_and_deleted():
    wrapped = wrap("rows")
    add_second(wrapped)
    first = logits(wrapped)
    wrapped.set_adapter("second")
    second = logits(wrapped)
    assert not torch.allclose(first, second)
    trained = {name.rsplit(".", 1)[1] for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained == {"second"}
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), first)
    wrapped.delete_adapter("second")
    assert torch.equal(logits(wrapped), first)
    assert not any("second" in name for name, _ in [*wrapped.named_parameters(), *wrapped.named_buffers()])
    assert all("second" not in layer.loki_scaling for layer in loki_layers(wrapped).values())


def test_several_adapters_may_train_biases():
    """They are changes of their own; PEFT's unfreeze the base's biases, so that only one adapter may."""
    wrapped = wrap("rows-and-biases")
    add_second(wrapped, "rows-and-biases")
    wrapped.set_adapter("second")
    assert all("base_layer" not in name for name, p in wrapped.named_parameters() if p.requires_grad)


def weighted_sum(wrapped, weights):
    """Base plus the weighted dense changes, as the model with those weights."""
    tensors = {name: tensor.double() for name, tensor in base_tensors(wrapped).items()}
    for adapter, weight in weights.items():
        for name, change in dense_changes(wrapped, adapter):
            tensors[name] += weight * change
    return tensors


@pytest.mark.parametrize(
    ("first", "second", "rank"),
    [("rows", "rows", 0), ("rank", "rank", 4), ("rows", "rank", 0), ("rows-and-biases", "rank-and-biases", 0)],
)
def test_weighted_sums_of_adapters(first, second, rank):
    wrapped = wrap(first)
    add_second(wrapped, second)
    before, trained = logits(wrapped), [p.requires_grad for p in wrapped.parameters()]
    expected = weighted_sum(wrapped, {"default": 0.7, "second": -1.3})
    wrapped.add_weighted_adapter(["default", "second"], [0.7, -1.3], "sum")
    # Nothing that was there has changed, nor what is trained.
    assert torch.equal(logits(wrapped), before)
    assert [p.requires_grad for name, p in wrapped.named_parameters() if not name.endswith(".sum")] == trained
    assert wrapped.peft_config["sum"].positions == [[1, 2, 7], [5], [0, 3, 15]]
    assert wrapped.peft_config["sum"].r == rank
    found = base_tensors(wrapped.merge_and_unload(adapter_names=["sum"]))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rank", [0, 2])
def test_weighted_sums_of_adapters_on_other_modules(rank):
    options = {"task_type": "CAUSAL_LM", "r": rank, "init_weights": False}
    wrapped = get_peft_model(make_model(), LokiConfig(positions={"o_proj": [1], "0.mlp.down_proj": [4]}, **options))
    wrapped.add_adapter("second", LokiConfig(positions=[[4, 5], [], [6]], **options))
    parts = {
        adapter: {
            name: layer.get_delta_weight(adapter)
            for name, layer in loki_layers(wrapped).items()
            if adapter in layer.loki_rows
        }
        for adapter in ("default", "second")
    }
    wrapped.add_weighted_adapter(["default", "second"], [2.0, 0.5], "sum")
    for name, layer in loki_layers(wrapped).items():
        expected = 2.0 * parts["default"].get(name, torch.tensor(0.0)) + 0.5 * parts["second"].get(
            name, torch.tensor(0.0)
        )
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-5, atol=1e-7)


def test_a_weighted_sum_is_saved_and_loaded_like_any_adapter(tmp_path):
    wrapped = wrap("rank")
    add_second(wrapped, "rank")
    wrapped.add_weighted_adapter(["default", "second"], [0.7, 0.3], "sum")
    wrapped.set_adapter("sum")
    wrapped.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(build("rank"), tmp_path / "sum")
    assert torch.equal(logits(loaded), logits(wrapped))


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "options", "message"),
    [
        (["default"], [1.0], "sum", {"combination_type": "svd"}, "combination_type 'svd' is not possible.*'linear'"),
        (["default"], [1.0, 2.0], "sum", {}, "1 adapters and 2 weights: give one weight for each adapter"),
        ([], [], "sum", {}, "0 adapters and 0 weights"),
        (["nobody"], [1.0], "sum", {}, "adapter 'nobody' does not exist: the model has default, second"),
        (["default"], [1.0], "second", {}, "adapter 'second' exists already"),
    ],
)
def test_weighted_sums_that_are_refused(adapters, weights, name, options, message):
    wrapped = wrap("rows")
    add_second(wrapped)
    with pytest.raises(InputError, match=message):
        wrapped.add_weighted_adapter(adapters, weights, name, **options)
    assert set(wrapped.peft_config) == {"default", "second"}


def test_weighted_sums_of_more_than_rows_are_refused():
    wrapped = wrap("rows", modules_to_save=["lm_head"])
    with pytest.raises(InputError, match="adapter 'default' has modules_to_save, which cannot be added up"):
        wrapped.add_weighted_adapter(["default"], [1.0], "sum")


@every_form
@both_dtypes
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_adapters_load_equal(tmp_path, form, dtype, low_cpu_mem_usage):
    wrapped = wrap(form, dtype, init_weights=True)
    train_steps(wrapped)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(form, dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {p.dtype for name, p in loaded.named_parameters() if ".loki_" in name} == {torch.float32}
    assert torch.equal(logits(loaded), logits(wrapped))


@every_form
def test_transformers_loads_the_adapter_by_itself(tmp_path, form):
    wrapped = wrap(form)
    wrapped.save_pretrained(tmp_path)
    plain = build(form)
    plain.load_adapter(tmp_path)
    assert torch.equal(logits(plain), logits(wrapped))


def test_the_base_is_found_by_its_name(tmp_path, model_dir, positions):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    wrapped = get_peft_model(model, LokiConfig(positions=positions, task_type="CAUSAL_LM", init_weights=False))
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), logits(wrapped))


def test_injected_adapters_save_and_load():
    """PEFT's way without a PeftModel, as diffusers and transformers use it."""
    wrapped, plain = wrap("rank"), build("rank")
    prefix = "base_model.model."
    state = {name.removeprefix(prefix): tensor for name, tensor in get_peft_model_state_dict(wrapped).items()}
    assert all(name.split(".loki_")[1] in ("A", "B") for name in state)
    plain = inject_adapter_in_model(config("rank"), plain)
    result = set_peft_model_state_dict(plain, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(plain), logits(wrapped))


def test_adapter_config_is_complete_and_names_no_path(tmp_path):
    (tmp_path / "10.json").write_text(json.dumps(POSITIONS))
    wrap("rank-and-biases", positions=str(tmp_path / "10.json")).save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert str(tmp_path) not in json.dumps(saved)
    fields = ("peft_type", "positions", "r", "lora_alpha", "bias", "target_modules", "modules_to_save")
    assert {field: saved[field] for field in fields} == {
        "peft_type": "LOKI",
        "positions": [[1, 7], [], [0, 3, 15]],
        "r": 2,
        "lora_alpha": 3,
        "bias": "rows",
        "target_modules": ["mlp.down_proj"],
        "modules_to_save": None,
    }
    again = LokiConfig.from_pretrained(tmp_path / "adapter")
    again.base_model_name_or_path = None  # PEFT writes what the model says of itself
    assert again == config("rank-and-biases", target_modules=["mlp.down_proj"], inference_mode=True, init_weights=False)


@pytest.mark.parametrize(
    ("form", "num_elements"),
    [("rows", 5 * 24), ("rank", 5 * 2 + 2 * 2 * 24), ("rank-and-biases", 5 * 2 + 2 * 2 * 24 + 5)],
)
def test_adapter_file_holds_the_changes_only(tmp_path, form, num_elements):
    wrap(form).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == num_elements
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_names_of_saved_tensors(tmp_path):
    """Other programs read them: `loki merge`, for one."""
    wrap("rank-and-biases").save_pretrained(tmp_path)
    module = "base_model.model.model.layers.0.mlp.down_proj"
    names = {name for name in load_file(tmp_path / "adapter_model.safetensors") if ".0." in name}
    assert names == {f"{module}.loki_A", f"{module}.loki_B", f"{module}.loki_bias"}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
@pytest.mark.parametrize("form", ["rows", "rank", "rows-of-conv1d"])
def test_pefts_own_conversion_to_lora(form):
    """`peft.convert_to_lora` decomposes the dense change; a rank as large as the rows loses nothing."""
    from peft.tuners.lora.conversion import convert_to_lora

    wrapped = wrap(form)
    lora_config, state = convert_to_lora(wrapped, rank=3)
    converted = get_peft_model(build(form), lora_config)
    set_peft_model_state_dict(converted, state)
    torch.testing.assert_close(logits(converted), logits(wrapped), rtol=1e-4, atol=1e-4)


def test_changed_biases_have_no_conversion_to_lora():
    assert not wrap("rows-and-biases").supports_lora_conversion()
    assert wrap("rows").supports_lora_conversion()


def test_the_change_may_be_kept_in_the_bases_dtype():
    """DeepSpeed's ZeRO-3 wants one dtype in the whole model."""
    wrapped = get_peft_model(build("rank", torch.bfloat16), config("rank"), autocast_adapter_dtype=False)
    assert {p.dtype for p in wrapped.parameters()} == {torch.bfloat16}
    wrapped.add_adapter("second", config("rows"))
    dtypes = {name.rsplit(".", 1)[1]: p.dtype for name, p in wrapped.named_parameters() if ".loki_" in name}
    assert dtypes == {"default": torch.bfloat16, "second": torch.float32}


def test_a_layer_that_other_modules_hold_is_unwrapped_on_unloading():
    wrapped = wrap("rows")
    assert type(wrapped.unload().model.layers[0].mlp.down_proj) is nn.Linear
