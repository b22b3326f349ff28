from copy import deepcopy
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from families import FAMILY_MODELS, NUM_ROWS, draw_prompts
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from loki.architecture import (
    FAMILIES,
    Shape,
    attribution_sites,
    decoder_layers,
    down_projections,
    family_of,
    linear_layers,
    model_type_of,
    projections,
    shape_of,
    shape_of_config,
    site_warning,
)
from loki.choices import ModuleName
from loki.errors import ArchitectureError, InputError

NUM_LAYERS, NUM_COLUMNS = 3, 24
NORMED = ("olmo2", "gemma2", "gemma3_text", "gemma3")
MODULES = get_args(ModuleName)
EACH_MODULE = pytest.mark.parametrize("module", MODULES)
EACH_FAMILY = pytest.mark.parametrize("name", FAMILY_MODELS)

# Layer 0 of a model of each family, as its own source names it.
LIKE_LLAMA = ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj")
PROJECTIONS = {
    "llama": LIKE_LLAMA,
    "mistral": LIKE_LLAMA,
    "qwen2": LIKE_LLAMA,
    "qwen3": LIKE_LLAMA,
    "smollm3": LIKE_LLAMA,
    "granite": LIKE_LLAMA,
    "phi3": LIKE_LLAMA,
    "cohere": LIKE_LLAMA,
    "cohere2": LIKE_LLAMA,
    "olmo2": LIKE_LLAMA,
    "gemma2": LIKE_LLAMA,
    "gemma3_text": LIKE_LLAMA,
    "gemma3": ("model.language_model.layers.0.mlp.down_proj", "model.language_model.layers.0.self_attn.o_proj"),
    "starcoder2": ("model.layers.0.mlp.c_proj", "model.layers.0.self_attn.o_proj"),
    "gpt2": ("transformer.h.0.mlp.c_proj", "transformer.h.0.attn.c_proj"),
    "gptj": ("transformer.h.0.mlp.fc_out", "transformer.h.0.attn.out_proj"),
    "gpt_neox": ("gpt_neox.layers.0.mlp.dense_4h_to_h", "gpt_neox.layers.0.attention.dense"),
    "falcon": ("transformer.h.0.mlp.dense_4h_to_h", "transformer.h.0.self_attention.dense"),
    "phi": ("model.layers.0.mlp.fc2", "model.layers.0.self_attn.dense"),
}


def build(name: str = "llama") -> nn.Module:
    return FAMILY_MODELS[name].build()


# --- where the projections are ------------------------------------------------------------------------------


@EACH_MODULE
@EACH_FAMILY
def test_every_family_has_its_projections_where_the_table_says(name, module):
    model = build(name)
    found = projections(model, module)
    first = PROJECTIONS[FAMILY_MODELS[name].model_type][MODULES.index(module)]
    assert list(found) == [first.replace(".0.", f".{i}.") for i in range(NUM_LAYERS)]
    for full_name, projection in found.items():
        assert projection is model.get_submodule(full_name)
    if module == "down_proj":
        assert found == projections(model) == down_projections(model)


@EACH_MODULE
@EACH_FAMILY
def test_row_j_of_a_projection_gives_its_output_j(name, module):
    """Rows are outputs, also where the weight is kept transposed."""
    projection = next(iter(projections(build(name), module).values()))
    columns = projection.nx if isinstance(projection, Conv1D) else projection.in_features
    input_BF = torch.randn(2, 1, columns, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = projection(input_BF)
        weight_DF = projection.weight.T if isinstance(projection, Conv1D) else projection.weight
        assert weight_DF.shape == (NUM_ROWS, columns)
        weight_DF[5] = 0
        if projection.bias is not None:
            projection.bias[5] = 0
        changed = (projection(input_BF) != before).any(dim=0).squeeze(0)
    assert changed.nonzero().flatten().tolist() == [5]


@EACH_FAMILY
def test_sites_of_both_modules_are_all_that_a_layer_adds_to_the_residual_stream(name):
    """Layer output − layer input = attention's site + feed-forward site, for blocks in turn and in parallel."""
    model = build(name)
    layers = list(decoder_layers(model).values())
    seen = {}
    for module in MODULES:
        for i, site in enumerate(attribution_sites(model, "auto", module)[1]):
            # A copy: Falcon adds to it in place.
            site.register_forward_hook(lambda _m, _i, out, key=(module, i): seen.update({key: out.clone()}))
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda _m, args, kwargs, i=i: seen.update({("in", i): args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
        layer.register_forward_hook(
            lambda _m, _i, out, i=i: seen.update({("out", i): out[0] if isinstance(out, tuple) else out})
        )
    with torch.no_grad():
        model(input_ids=draw_prompts((9,))[0][None])
    share = getattr(model.config, "residual_multiplier", 1)
    for i in range(NUM_LAYERS):
        added = share * (seen["down_proj", i] + seen["o_proj", i])
        assert added.norm() > 0.1
        torch.testing.assert_close(seen["in", i] + added, seen["out", i], rtol=1e-5, atol=1e-5)


@EACH_FAMILY
def test_linear_layers_of_both_blocks_are_all_that_a_decoder_layer_has(name):
    """And an adapter of PEFT's takes their names, and no other layer."""
    model = build(name)
    both, ffn, attention = (
        linear_layers(model, blocks) for blocks in (("down_proj", "o_proj"), ("down_proj",), ("o_proj",))
    )
    inside = tuple(f"{layer}." for layer in decoder_layers(model))
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n.startswith(inside)]
    assert both == linear
    assert sorted([*ffn, *attention]) == sorted(both)
    assert set(projections(model, "down_proj")) < set(ffn)
    assert set(projections(model, "o_proj")) < set(attention)
    config = LoraConfig(r=1, target_modules=ffn, fan_in_fan_out=model.config.model_type == "gpt2")
    adapted = get_peft_model(model, config).base_model.model
    assert [n for n, m in adapted.named_modules() if isinstance(m, LoraLayer)] == ffn


@EACH_FAMILY
def test_decoder_layers_are_found_in_the_body_too(name):
    model = build(name)
    body = getattr(model, model.base_model_prefix)
    whole, inside = decoder_layers(model), decoder_layers(body)
    assert len(whole) == NUM_LAYERS
    assert list(whole) == [f"{model.base_model_prefix}.{path}" for path in inside]
    assert list(inside.values()) == list(whole.values())
    assert shape_of(body) == shape_of(model)


def test_more_than_ten_layers_stay_in_order():
    model = build()
    model.model.layers = nn.ModuleList(deepcopy(model.model.layers[0]) for _ in range(12))
    assert [name.split(".")[-1] for name in decoder_layers(model)] == [str(i) for i in range(12)]


# --- shapes -------------------------------------------------------------------------------------------------


@EACH_FAMILY
def test_config_and_model_have_the_same_shape(name):
    case = FAMILY_MODELS[name]
    config = case.config()
    fields = {**case.sizes, **case.features}
    given = [fields[field] for field in ("intermediate_size", "n_inner", "ffn_hidden_size") if fields.get(field)]
    num_columns = given[0] if given else 4 * NUM_ROWS
    assert shape_of_config(config) == Shape(case.model_type, NUM_LAYERS, NUM_ROWS, num_columns)
    assert shape_of(build(name)) == shape_of_config(config)


def test_both_ways_to_say_the_intermediate_size_occur():
    sizes = {name: shape_of_config(case.config()).num_columns for name, case in FAMILY_MODELS.items()}
    assert sizes["gpt2"] == sizes["falcon"] == 4 * NUM_ROWS
    assert sizes["gpt2-scaled"] == sizes["gptj"] == sizes["falcon-new"] == NUM_COLUMNS


def test_shape_names_family_layers_rows_and_columns():
    shape = shape_of(build("qwen3"))
    assert (shape.model_type, shape.num_layers, shape.num_rows, shape.num_columns) == ("qwen3", 3, 16, 24)
    assert str(shape) == "qwen3-3x16x24"


def test_layers_of_several_sizes_are_refused():
    model = build()
    model.model.layers[2].mlp.down_proj = nn.Linear(25, NUM_ROWS)
    with pytest.raises(ArchitectureError, match=r"several sizes .*\[\(16, 24\), \(16, 25\)\]"):
        shape_of(model)


# --- what is not supported ----------------------------------------------------------------------------------


def test_an_unknown_family_is_named_with_what_to_do():
    with pytest.raises(ArchitectureError) as caught:
        family_of("bloom")
    text = str(caught.value)
    assert "unknown architecture 'bloom': known are llama, mistral, " in text
    assert all(family in text for family in FAMILIES)
    assert "add an entry to FAMILIES in loki/architecture.py" in text
    assert "LokiConfig(positions={module name: rows})" in text


def test_a_model_without_a_config_is_an_unknown_family():
    model = nn.Linear(2, 2)
    assert model_type_of(model) == ""
    with pytest.raises(ArchitectureError, match="unknown architecture ''"):
        down_projections(model)


def test_a_model_built_differently_from_its_family_is_refused():
    model = build()
    del model.model.layers
    with pytest.raises(ArchitectureError, match=r"LlamaForCausalLM has no 'model\.layers', where 'llama' models keep"):
        decoder_layers(model)


def test_a_layer_without_a_projection_is_refused_by_name():
    model = build()
    del model.model.layers[1].mlp.down_proj
    del model.model.layers[2].self_attn.o_proj
    with pytest.raises(
        ArchitectureError,
        match=r"model\.layers\.1\.mlp\.down_proj does not exist: this 'llama' model has no linear down-projection in",
    ):
        down_projections(model)
    with pytest.raises(
        ArchitectureError,
        match=r"layers\.2\.self_attn\.o_proj does not exist.* no linear attention's output projection",
    ):
        projections(model, "o_proj")


def test_a_projection_that_is_not_linear_is_refused():
    model = build()
    model.model.layers[0].mlp.down_proj = nn.ReLU()
    with pytest.raises(
        ArchitectureError, match=r"model\.layers\.0\.mlp\.down_proj is ReLU, not a linear layer: its rows are not known"
    ):
        down_projections(model)


FUSED = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8},
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "phimoe": {"num_local_experts": 4},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}


def mixture_config(model_type, **changes):
    sizes = {
        "hidden_size": NUM_ROWS,
        "intermediate_size": NUM_COLUMNS,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 20,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(model_type, **sizes, **FUSED.get(model_type, {}), **changes)


@pytest.mark.parametrize("model_type", FUSED)
def test_fused_experts_are_refused_by_config_and_by_model(model_type):
    config = mixture_config(model_type)
    message = (
        f"^'{model_type}' models keep their experts' weights fused \\(mixture of experts\\): "
        "their rows cannot be attributed; choose a dense model$"
    )
    model = AutoModelForCausalLM.from_config(config)
    for ask in (
        lambda: shape_of_config(config),
        lambda: shape_of(model),
        lambda: projections(model, "o_proj"),
        lambda: attribution_sites(model, "auto"),
    ):
        with pytest.raises(ArchitectureError, match=message):
            ask()
    # Without the config's word, by what the model holds.
    model.config = SimpleNamespace(model_type=model_type)
    with pytest.raises(ArchitectureError, match=message):
        shape_of(model)


def test_experts_of_a_multimodal_models_language_part_are_refused():
    with pytest.raises(ArchitectureError, match=r"^'llama4' models keep their experts' weights fused"):
        shape_of_config(AutoConfig.for_model("llama4"))


def test_experts_in_one_layer_of_a_known_family_are_refused():
    model = build()
    model.model.layers[1].mlp = nn.ModuleDict({"experts": nn.Module()})
    with pytest.raises(ArchitectureError, match=r"^'llama' models keep their experts' weights fused"):
        shape_of(model)
    assert len(projections(model, "o_proj")) == NUM_LAYERS


@pytest.mark.parametrize("count", [0, 1, None])
def test_no_experts_or_one_is_no_mixture(count):
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=3)
    config.num_experts = count
    assert str(shape_of_config(config)) == "llama-3x16x24"
    config.num_experts = 2
    with pytest.raises(ArchitectureError, match=r"^'llama' models keep their experts' weights fused"):
        shape_of_config(config)


@pytest.mark.parametrize(("field", "value"), [("use_bidirectional_attention", True), ("is_causal", False)])
def test_attention_that_is_not_causal_is_refused(field, value):
    model = build("gemma3_text")
    setattr(model.config, field, value)
    with pytest.raises(
        ArchitectureError,
        match=r"this 'gemma3_text' model attends to later tokens too \(its config says so\): "
        "it predicts no next token; choose a causal language model",
    ):
        attribution_sites(model, "auto")
    assert len(down_projections(model)) == NUM_LAYERS  # its rows can be trained


# --- sites --------------------------------------------------------------------------------------------------


@EACH_MODULE
@pytest.mark.parametrize("name", [name for name, case in FAMILY_MODELS.items() if case.model_type not in NORMED])
def test_auto_is_the_projection_where_no_norm_follows(name, module):
    model, model_type = build(name), FAMILY_MODELS[name].model_type
    for site in ("auto", "down_proj"):
        found, modules = attribution_sites(model, site, module)
        assert found == module
        assert modules == list(projections(model, module).values())
        assert site_warning(model, site, module) is None
    block = {"down_proj": "down-projection", "o_proj": "attention's output projection"}[module]
    with pytest.raises(
        InputError,
        match=f"'after_norm' does not exist in '{model_type}' models: "
        f"no norm follows their {block}; use 'auto' or 'down_proj'",
    ):
        attribution_sites(model, "after_norm", module)


@EACH_MODULE
@pytest.mark.parametrize("name", NORMED)
def test_auto_is_the_norm_where_one_follows(name, module):
    model = build(name)
    norm = {"down_proj": "post_feedforward_layernorm", "o_proj": "post_attention_layernorm"}[module]
    for site in ("auto", "after_norm"):
        found, modules = attribution_sites(model, site, module)
        assert found == "after_norm"
        assert modules == [getattr(layer, norm) for layer in decoder_layers(model).values()]
        assert site_warning(model, site, module) is None
    found, modules = attribution_sites(model, "down_proj", module)
    assert found == module
    assert modules == list(projections(model, module).values())
    block = {"down_proj": "down-projection", "o_proj": "attention's output projection"}[module]
    assert site_warning(model, "down_proj", module) == (
        f"site 'down_proj' in '{name}' models: the norm after the {block} forgets its scale, "
        "so nearly all attribution falls on α = 0 and does not converge as steps grow; use 'auto'"
    )


def test_the_module_is_the_down_projection_when_not_said():
    model = build("gemma2")
    assert attribution_sites(model, "auto") == attribution_sites(model, "auto", "down_proj")
    assert site_warning(model, "down_proj") == site_warning(model, "down_proj", "down_proj")
