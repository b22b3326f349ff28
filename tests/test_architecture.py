from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from loki.architecture import (
    FAMILIES,
    attribution_sites,
    decoder_layers,
    down_projections,
    family_of,
    model_type_of,
    shape_of,
)
from loki.errors import ArchitectureError, InputError

NUM_LAYERS, NUM_ROWS, NUM_COLUMNS = 3, 8, 20
WITHOUT_NORM = sorted(name for name, family in FAMILIES.items() if family.post_norm is None)
WITH_NORM = sorted(set(FAMILIES) - set(WITHOUT_NORM))


def tiny(family: str) -> nn.Module:
    config = AutoConfig.for_model(
        family,
        num_hidden_layers=NUM_LAYERS,
        hidden_size=NUM_ROWS,
        intermediate_size=NUM_COLUMNS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=20,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_down_projections_where_the_table_says(family):
    model = tiny(family)
    projections = down_projections(model)
    assert list(projections) == [f"model.layers.{i}.mlp.down_proj" for i in range(NUM_LAYERS)]
    for i, (name, module) in enumerate(projections.items()):
        assert module is model.model.layers[i].mlp.down_proj
        assert module is model.get_submodule(name)
        assert module.weight.shape == (NUM_ROWS, NUM_COLUMNS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_site_gives_what_its_layer_adds_to_the_residual_stream(family):
    """The `auto` site is the last module of the feed-forward block: layer output − residual equals its output."""
    model = tiny(family).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    _, sites = attribution_sites(model, "auto")
    layer = next(iter(decoder_layers(model).values()))
    seen = {}
    sites[0].register_forward_hook(lambda _m, _i, output: seen.update(added=output))
    # The block's residual is the input of the norm in front of it, or of the block where no norm is in front.
    before_block = layer.mlp if family in WITH_NORM else layer.post_attention_layernorm
    before_block.register_forward_pre_hook(lambda _m, inputs: seen.update(residual=inputs[0]))
    layer.register_forward_hook(lambda _m, _i, output: seen.update(output=output))
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(seen["residual"] + seen["added"], seen["output"])


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_are_found_in_the_body_too(family):
    model = tiny(family)
    inside, whole = decoder_layers(model.model), decoder_layers(model)
    assert list(inside) == [f"layers.{i}" for i in range(NUM_LAYERS)]
    assert list(whole) == [f"model.layers.{i}" for i in range(NUM_LAYERS)]
    assert list(inside.values()) == list(whole.values())
    assert shape_of(model.model) == shape_of(model)


def test_more_than_ten_layers_stay_in_order():
    model = tiny("llama")
    model.model.layers = nn.ModuleList(deepcopy(model.model.layers[0]) for _ in range(12))
    assert [name.split(".")[-1] for name in decoder_layers(model)] == [str(i) for i in range(12)]


def test_an_unknown_family_is_named_with_what_to_do():
    with pytest.raises(ArchitectureError) as caught:
        family_of("gpt2")
    text = str(caught.value)
    assert "unknown architecture 'gpt2'" in text
    assert all(family in text for family in FAMILIES)
    assert "add an entry to FAMILIES in loki/architecture.py" in text
    assert "LokiConfig(positions={module name: rows})" in text


def test_a_model_without_a_config_is_an_unknown_family():
    model = nn.Linear(2, 2)
    assert model_type_of(model) == ""
    with pytest.raises(ArchitectureError, match="unknown architecture ''"):
        down_projections(model)


def test_a_model_built_differently_from_its_family_is_refused():
    model = tiny("llama")
    del model.model.layers
    with pytest.raises(ArchitectureError, match=r"LlamaForCausalLM has no 'model\.layers', where 'llama' models keep"):
        decoder_layers(model)


def test_a_layer_without_a_down_projection_is_refused_by_name():
    model = tiny("llama")
    del model.model.layers[1].mlp.down_proj
    with pytest.raises(ArchitectureError, match=r"model\.layers\.1\.mlp\.down_proj does not exist.*mixture-of-experts"):
        down_projections(model)


def test_shape_names_family_layers_rows_and_columns():
    shape = shape_of(tiny("qwen3"))
    assert (shape.model_type, shape.num_layers, shape.num_rows, shape.num_columns) == ("qwen3", 3, 8, 20)
    assert str(shape) == "qwen3-3x8x20"


def test_layers_of_several_sizes_are_refused():
    model = tiny("llama")
    model.model.layers[2].mlp.down_proj = nn.Linear(24, NUM_ROWS)
    with pytest.raises(ArchitectureError, match=r"several sizes .*\[\(8, 20\), \(8, 24\)\]"):
        shape_of(model)


@pytest.mark.parametrize("family", WITHOUT_NORM)
def test_auto_is_the_down_projection_where_no_norm_follows(family):
    model = tiny(family)
    for site in ("auto", "down_proj"):
        name, modules = attribution_sites(model, site)
        assert name == "down_proj"
        assert modules == list(down_projections(model).values())
    with pytest.raises(
        InputError, match=f"'after_norm' does not exist in '{family}' models.*use 'auto' or 'down_proj'"
    ):
        attribution_sites(model, "after_norm")


@pytest.mark.parametrize("family", WITH_NORM)
def test_auto_is_the_norm_where_one_follows(family):
    model = tiny(family)
    for site in ("auto", "after_norm"):
        name, modules = attribution_sites(model, site)
        assert name == "after_norm"
        assert modules == [layer.post_feedforward_layernorm for layer in model.model.layers]
    name, modules = attribution_sites(model, "down_proj")
    assert name == "down_proj"
    assert modules == list(down_projections(model).values())


def test_there_is_a_family_of_either_kind():
    assert "llama" in WITHOUT_NORM
    assert "olmo2" in WITH_NORM
