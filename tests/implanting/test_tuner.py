"""LoKI as a PEFT method: what is trained, what is not, and what is saved."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import NUM_COLUMNS, NUM_ROWS, make_model
from torch import nn

from loki import LokiConfig, RowSelection
from loki.errors import ArtefactError, InputError

INPUT_IDS = torch.arange(1, 13).reshape(2, 6)


def wrap(model, positions, **options):
    return get_peft_model(model, LokiConfig(positions=positions, task_type="CAUSAL_LM", **options))


def train_steps(model, steps=3):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
        optimiser.step()


def logits(model):
    with torch.no_grad():
        return model(input_ids=INPUT_IDS).logits


def test_starts_as_the_unmodified_model(model, positions):
    before = logits(model)
    assert torch.equal(logits(wrap(model, positions)), before)


def test_only_the_changes_of_selected_rows_are_trainable(model, positions):
    wrapped = wrap(model, positions)
    trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert [tuple(p.shape) for p in trainable.values()] == [(2, NUM_COLUMNS), (3, NUM_COLUMNS), (1, NUM_COLUMNS)]
    assert all(".mlp.down_proj.loki_delta." in name for name in trainable)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_changes_exactly_the_selected_rows(positions, dtype):
    base = dict(make_model().to(dtype).named_parameters())
    wrapped = wrap(make_model().to(dtype), positions)
    train_steps(wrapped)
    merged = dict(wrapped.merge_and_unload().named_parameters())
    assert base.keys() == merged.keys()
    for layer, rows in enumerate(positions):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        differs = (base.pop(name) != merged[name]).any(dim=1)
        assert not differs[[row for row in range(NUM_ROWS) if row not in rows]].any()
        if dtype is torch.float32:
            assert differs[rows].all()
        else:
            assert differs[rows].any()  # small steps may vanish in bfloat16
    for name, tensor in base.items():
        assert torch.equal(tensor, merged[name]), name


def test_change_is_kept_in_float32_on_a_bfloat16_base(positions):
    wrapped = wrap(make_model().to(torch.bfloat16), positions)
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    assert logits(wrapped).dtype == torch.bfloat16


def test_output_is_that_of_the_changed_weight(positions):
    """Hand-computed: y = x (W + Δ)ᵀ with Δ on the named rows only."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(4, 5))
    weight, bias = linear[0].weight.detach().clone(), linear[0].bias.detach().clone()
    wrapped = get_peft_model(linear, LokiConfig(positions={"0": [3, 1]}, init_weights=False))
    layer = wrapped.base_model.model[0]
    delta = layer.loki_delta["default"].detach()
    changed = weight.clone()
    changed[1] += delta[0]
    changed[3] += delta[1]
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(wrapped(x), x @ changed.T + bias)
    torch.testing.assert_close(layer.get_delta_weight("default"), changed - weight)


def test_merging_equals_the_adapter_in_float32(model, positions):
    wrapped = wrap(model, positions)
    train_steps(wrapped)
    expected = logits(wrapped)
    # The change is added to weights before instead of to outputs after the product: rounding only.
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


def test_unmerging_is_exact(positions):
    wrapped = wrap(make_model().to(torch.bfloat16), positions, init_weights=False)
    before = {name: p.clone() for name, p in wrapped.named_parameters()}
    wrapped.merge_adapter()
    assert any(not torch.equal(p, before[name]) for name, p in wrapped.named_parameters())
    wrapped.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in wrapped.named_parameters())


def test_unmerging_two_adapters_on_the_same_rows_is_exact(positions):
    wrapped = wrap(make_model().to(torch.bfloat16), positions, init_weights=False)
    wrapped.add_adapter("second", LokiConfig(positions=positions, init_weights=False))
    before = {name: p.clone() for name, p in wrapped.named_parameters()}
    wrapped.base_model.merge_adapter(["default", "second"])
    wrapped.base_model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in wrapped.named_parameters())


def test_safe_merge_refuses_a_broken_change_and_leaves_the_base(model, positions):
    wrapped = wrap(model, positions)
    layer = wrapped.base_model.model.model.layers[0].mlp.down_proj
    before = layer.base_layer.weight.clone()
    layer.loki_delta["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="seems to be broken"):
        wrapped.merge_and_unload(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_disabling_the_adapter_gives_the_base(model, positions):
    before = logits(model)
    wrapped = wrap(model, positions, init_weights=False)
    assert not torch.allclose(logits(wrapped), before)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_adapter_loads_equal_and_names_no_path(tmp_path, positions, low_cpu_mem_usage):
    (tmp_path / "10.json").write_text(json.dumps(positions))
    wrapped = wrap(make_model(), str(tmp_path / "10.json"))
    train_steps(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    (tmp_path / "10.json").unlink()
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["positions"] == [sorted(rows) for rows in positions]
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(wrapped))


def test_adapter_file_holds_the_changes_only(tmp_path, model, positions):
    wrap(model, positions).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 6 * NUM_COLUMNS


def test_transformers_loads_the_adapter_by_itself(tmp_path, positions):
    wrapped = wrap(make_model(), positions, init_weights=False)
    wrapped.save_pretrained(tmp_path)
    plain = make_model()
    plain.load_adapter(tmp_path)
    assert torch.equal(logits(plain), logits(wrapped))


def test_layers_without_rows_are_left_alone(model):
    wrapped = wrap(model, [[], [2], []])
    assert type(wrapped.base_model.model.model.layers[0].mlp.down_proj) is nn.Linear
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == NUM_COLUMNS


def test_all_forms_of_positions_are_equal(tmp_path, positions):
    path = tmp_path / "10.json"
    path.write_text(json.dumps(positions))
    forms = [str(path), path, positions, tuple(map(tuple, positions)), RowSelection.from_lists(positions)]
    assert len({json.dumps(LokiConfig(positions=form).positions) for form in forms}) == 1


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[1], [2]], "have 2 layers, the model has 3"),
        ([[1], [2], [20]], "layer 2 names row 20, but the model's rows are 0 to 19"),
    ],
)
def test_positions_of_another_model_are_refused(model, positions, message):
    with pytest.raises(ArtefactError, match=message):
        wrap(model, positions)


def test_config_without_positions_is_refused(model):
    with pytest.raises(InputError, match="has no positions"):
        wrap(model, None)


def test_positions_of_a_strange_type_are_refused():
    with pytest.raises(InputError, match="positions of type int are not possible"):
        LokiConfig(positions=3)


def test_target_modules_that_disagree_with_positions_are_refused(model, positions):
    with pytest.raises(InputError, match="leave target_modules out"):
        wrap(model, positions, target_modules=["q_proj"])


def test_a_module_is_meant_by_the_longest_name_that_ends_it(model):
    names = {"down_proj": [1], "1.mlp.down_proj": [2, 3]}
    wrapped = wrap(model, names)
    layers = wrapped.base_model.model.model.layers
    assert [layer.mlp.down_proj.loki_rows["default"].tolist() for layer in layers] == [[1], [2, 3], [1]]


def test_a_module_that_does_not_exist_is_refused(model):
    with pytest.raises(InputError, match=r"'1.mlp.dwn_proj', which the model does not have"):
        wrap(model, {"0.mlp.down_proj": [1], "1.mlp.dwn_proj": [2]})


def test_rows_that_a_named_module_lacks_are_refused(model):
    with pytest.raises(ValueError, match="row 20 does not exist: the layer's rows are 0 to 19"):
        wrap(model, {"o_proj": [20]})


def test_modules_that_are_not_linear_are_refused(model):
    with pytest.raises(TypeError, match=r"it is Embedding, not nn.Linear"):
        wrap(model, {"embed_tokens": [1]})
