"""Which modules positions mean, and what is refused before the model is touched."""

import json

import pytest
import torch
from families import FAMILY_MODELS
from peft import get_peft_model
from tiny import make_model
from torch import nn
from tuned import POSITIONS, base_tensors, logits, loki_layers

from loki import LokiConfig, RowSelection
from loki.errors import ArchitectureError, ArtefactError, InputError
from loki.implanting.tuner.targets import config_of_blocks

OF_ATTENTION = {"log": {"settings": {"site_module": "o_proj"}}}
"""Provenance of rows that an analysis of attention's output was the base of."""


def wrap(model, positions, **options):
    return get_peft_model(model, LokiConfig(positions=positions, task_type="CAUSAL_LM", **options))


def rows_by_layer(wrapped):
    return {name: layer.loki_rows["default"].tolist() for name, layer in loki_layers(wrapped).items()}


@pytest.mark.parametrize("family", sorted(FAMILY_MODELS))
@pytest.mark.parametrize("module", ["down_proj", "o_proj"])
def test_positions_by_layer_in_every_family(family, module):
    """An oracle apart from the table: the rows' outputs move, in the layer's own output, and no others."""
    model = FAMILY_MODELS[family].build()
    wrapped = wrap(model, POSITIONS, target_modules=module, init_weights=False)
    layers = loki_layers(wrapped)
    assert [layer.loki_rows["default"].tolist() for layer in layers.values()] == [[1, 7], [0, 3, 15]]
    assert [[int(part) for part in name.split(".") if part.isdecimal()] for name in layers] == [[0], [2]]
    for layer in layers.values():
        x = torch.randn(2, layer.in_features)
        with torch.no_grad():
            moved = (layer(x) != layer.base_layer(x)).any(0)
        assert moved.nonzero().flatten().tolist() == layer.loki_rows["default"].tolist()


@pytest.mark.parametrize("names", ["down_proj", ["down_proj"], {"mlp.down_proj"}, None])
def test_ways_to_name_the_down_projections(model, positions, names):
    wrapped = wrap(model, positions, target_modules=names)
    assert all(name.endswith(".mlp.down_proj") for name in rows_by_layer(wrapped))
    assert wrapped.peft_config["default"].target_modules == {"mlp.down_proj"}


@pytest.mark.parametrize("names", ["o_proj", ["o_proj"], {"self_attn.o_proj"}])
def test_ways_to_name_the_output_projections_of_attention(model, positions, names):
    wrapped = wrap(model, positions, target_modules=names)
    assert rows_by_layer(wrapped) == {
        f"model.layers.{layer}.self_attn.o_proj": sorted(rows) for layer, rows in enumerate(positions)
    }


@pytest.mark.parametrize(
    ("family", "names", "meant"),
    [
        ("gptj", "fc_out", "mlp.fc_out"),
        ("gpt_neox", "attention.dense", "attention.dense"),
        ("gpt2", "mlp.c_proj", "mlp.c_proj"),
        ("gpt2", "attn.c_proj", "attn.c_proj"),
    ],
)
def test_the_familys_own_names(family, names, meant):
    wrapped = wrap(FAMILY_MODELS[family].build(), POSITIONS, target_modules=names)
    assert wrapped.peft_config["default"].target_modules == {meant}


def test_a_reloaded_config_means_the_same_modules(tmp_path, model, positions):
    wrapped = wrap(model, positions, target_modules="o_proj")
    wrapped.save_pretrained(tmp_path)
    again = get_peft_model(make_model(), LokiConfig.from_pretrained(tmp_path))
    assert rows_by_layer(again) == rows_by_layer(wrapped)


def test_positions_by_layer_fit_the_body_of_a_model(model, positions):
    """Without the language-model head, names begin one level lower."""
    wrapped = get_peft_model(model.model, LokiConfig(positions=positions))
    assert [name.split(".mlp")[0] for name in rows_by_layer(wrapped)] == ["layers.0", "layers.1", "layers.2"]


def test_all_forms_of_positions_are_equal(tmp_path, positions):
    path = tmp_path / "10.json"
    path.write_text(json.dumps(positions))
    forms = [str(path), path, positions, tuple(map(tuple, positions)), RowSelection.from_lists(positions)]
    assert len({json.dumps(LokiConfig(positions=form).positions) for form in forms}) == 1


def test_a_module_is_meant_by_the_longest_name_that_ends_it(model):
    wrapped = wrap(model, {"down_proj": [1], "1.mlp.down_proj": [2, 3]})
    assert list(rows_by_layer(wrapped).values()) == [[1], [2, 3], [1]]


def test_named_modules_without_rows_are_left_alone(model):
    wrapped = wrap(model, {"down_proj": [1], "1.mlp.down_proj": []})
    assert list(rows_by_layer(wrapped)) == ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]


def refuse(model, error, message, positions, **options):
    """An error before anything is touched."""
    tensors, before = base_tensors(model), logits(model)
    with pytest.raises(error, match=message):
        wrap(model, positions, **options)
    assert not loki_layers(model)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in base_tensors(model).items())


@pytest.mark.parametrize("module", ["down_proj", "o_proj"])
@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[1], [2]], "have 2 layers, the model has 3"),
        ([[1], [2], [20]], "layer 2 names row 20, but the model's rows are 0 to 19"),
    ],
)
def test_positions_of_another_model_are_refused(model, positions, message, module):
    refuse(model, ArtefactError, message, positions, target_modules=module)


def test_config_without_positions_is_refused(model):
    refuse(model, InputError, "has no positions", None)


@pytest.mark.parametrize(
    ("family", "names"), [("llama", ["q_proj"]), ("llama", ["down_proj", "o_proj"]), ("gpt2", "c_proj"), ("llama", [])]
)
def test_target_modules_that_positions_by_layer_cannot_mean(family, names):
    message = "positions by layer disagree: leave target_modules out"
    with pytest.raises(InputError, match=message):  # GPT-2 has a c_proj in both blocks
        wrap(FAMILY_MODELS[family].build(), POSITIONS, target_modules=names)


def test_target_modules_that_positions_do_not_name(model):
    message = r"target_modules \['up_proj'\] and the modules that positions name \(\['down_proj'\]\) disagree"
    refuse(model, InputError, message, {"down_proj": [1]}, target_modules=["up_proj"])


def test_a_module_that_does_not_exist_is_refused(model):
    message = r"'1.mlp.dwn_proj', which the model does not have"
    refuse(model, InputError, message, {"0.mlp.down_proj": [1], "1.mlp.dwn_proj": [2]})


def test_rows_that_a_named_module_lacks_are_refused(model):
    message = r"model.layers.0.self_attn.o_proj has no row 20: its rows are 0 to 19; correct the positions"
    refuse(model, InputError, message, {"o_proj": [20]})


def test_modules_that_are_not_linear_are_refused(model):
    message = "rows of model.embed_tokens cannot be trained: it is Embedding, not a linear layer"
    refuse(model, InputError, message, {"embed_tokens": [1], "down_proj": [1]})


def test_the_output_projection_of_torch_attention_is_refused():
    """It is a linear layer by type, but attention reads its weight and never calls it."""
    attention = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(InputError, match=r"0.out_proj cannot be trained: it is NonDynamicallyQuantizableLinear"):
        get_peft_model(attention, LokiConfig(positions={"out_proj": [1]}))


def test_biases_where_no_layer_has_one_are_refused(model, positions):
    refuse(model, InputError, "bias 'rows' needs layers that have a bias, and none of those", positions, bias="rows")


def test_rows_of_a_module_that_is_saved_whole_are_refused(model):
    message = "model.layers.1.mlp.down_proj is in positions and in modules_to_save: train its rows or all of it"
    options = {"modules_to_save": ["layers.1.mlp.down_proj"]}
    refuse(model, InputError, message, [[1], [2], [3]], **options)
    assert len(loki_layers(wrap(model, [[1], [], [3]], **options))) == 2


def test_positions_by_layer_need_a_known_family():
    with pytest.raises(ArchitectureError, match=r"unknown architecture ''.*LokiConfig\(positions="):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LokiConfig(positions=[[1]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": 3}, "positions of type int are not possible"),
        ({"r": -1}, r"r -1 is not possible: give 0 to train the rows themselves, or a rank"),
        ({"r": 2.0}, "r 2.0 is not possible"),
        ({"r": True}, "r True is not possible"),
        ({"lora_alpha": 16}, "lora_alpha 16 needs a rank: give r too"),
        ({"r": 2, "lora_alpha": 0}, "lora_alpha 0 is not possible: give a positive number"),
        ({"r": 2, "lora_alpha": "4"}, "lora_alpha '4' is not possible"),
        ({"bias": "all"}, "bias 'all' is not possible: give 'none' or 'rows'"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        LokiConfig(**{"positions": [[1]], **options})


@pytest.mark.parametrize("names", [None, "o_proj", {"o_proj"}])
def test_a_positions_file_says_whose_rows_it_names(tmp_path, model, positions, names):
    RowSelection.from_lists(positions).save(tmp_path / "p.json", meta=OF_ATTENTION)
    wrapped = wrap(model, tmp_path / "p.json", target_modules=names)
    assert all(name.endswith(".self_attn.o_proj") for name in rows_by_layer(wrapped))


def test_a_positions_file_of_another_projection_is_refused(tmp_path, positions):
    RowSelection.from_lists(positions).save(tmp_path / "p.json", meta=OF_ATTENTION)
    with pytest.raises(InputError, match="names rows of o_proj, where down_proj's are wanted"):
        LokiConfig(positions=str(tmp_path / "p.json"), target_modules=["down_proj"])


@pytest.mark.parametrize("family", sorted(FAMILY_MODELS))
def test_rows_of_both_blocks_in_every_family(family):
    """Each block's as if they were alone; layers without rows are left as they are."""
    model = FAMILY_MODELS[family].build()
    chosen = RowSelection.from_lists(POSITIONS)
    reverse = RowSelection.from_lists(POSITIONS[::-1])
    both = config_of_blocks(model, {"down_proj": chosen, "o_proj": reverse}, task_type="CAUSAL_LM")
    expected = {
        **rows_by_layer(wrap(FAMILY_MODELS[family].build(), chosen)),
        **rows_by_layer(wrap(FAMILY_MODELS[family].build(), reverse, target_modules="o_proj")),
    }
    assert rows_by_layer(get_peft_model(model, both)) == expected
    assert len(expected) == 4


@pytest.mark.parametrize("module", ["down_proj", "o_proj"])
def test_rows_of_one_block_are_kept_by_layer(model, positions, module):
    config = config_of_blocks(model, {module: RowSelection.from_lists(positions)}, r=2)
    assert config.positions == [sorted(rows) for rows in positions]
    assert config.r == 2
    assert all(name.endswith(f".{module}") for name in rows_by_layer(get_peft_model(model, config)))


def test_rows_of_both_blocks_for_another_number_of_layers(model, positions):
    short = RowSelection.from_lists(positions[:2])
    with pytest.raises(ArtefactError, match="positions of o_proj have 2 layers, the model has 3"):
        config_of_blocks(model, {"down_proj": RowSelection.from_lists(positions), "o_proj": short})
