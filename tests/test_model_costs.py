"""Costs from configs written out by hand: against the paper, published sizes, real models, adapters and optimisers."""

import json

import gguf
import pytest
import torch
from families import FAMILY_MODELS
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from tiny import NUM_COLUMNS, NUM_LAYERS, NUM_ROWS, make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import BloomConfig, LlamaConfig, MixtralConfig, Qwen2Config, T5Config

from loki import LokiConfig, model_costs
from loki.analysis.attribution import attribute
from loki.architecture import Shape, shape_of_config
from loki.errors import ArchitectureError, InputError
from loki.model_costs import (
    ModelSize,
    analysis_operations,
    forward_operations,
    measure_speed,
    model_size,
    read_config,
    training_cost,
)
from loki.selection.quota import rows_for_quota

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
QWEN_HALF_B = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151936,
    tie_word_embeddings=True,
)
SMOLLM2_135M = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def llama_8b():
    return model_size(LLAMA_8B)


@pytest.fixture(scope="module")
def qwen_half_b():
    return model_size(QWEN_HALF_B)


def test_trainable_weights_of_the_paper(llama_8b, qwen_half_b):
    """Its table 1 and section 4, in millions: Llama q = 10, 20, 30 and LoKI* r = 32; Qwen q = 5, 10, 20, 30."""
    millions = [round(training_cost(llama_8b, quota).num_trainable / 1e6) for quota in (10, 20, 30)]
    assert millions == [188, 376, 563]
    assert round(training_cost(llama_8b, 30, rank=32).num_trainable / 1e6) == 16
    millions = [round(training_cost(qwen_half_b, quota).num_trainable / 1e6, 1) for quota in (5, 10, 20, 30)]
    assert millions == [5.1, 10.4, 20.9, 31.3]


def test_sizes_that_are_published(llama_8b, qwen_half_b):
    """The weights that the makers' own checkpoints have."""
    assert llama_8b.num_weights == 8_030_261_248
    assert qwen_half_b.num_weights == 494_032_768
    assert model_size(SMOLLM2_135M).num_weights == 134_515_008
    assert llama_8b.shape == Shape("llama", 32, 4096, 14336)
    assert (llama_8b.dtype, qwen_half_b.dtype) == ("bfloat16", None)


def test_by_hand(qwen_half_b):
    """⌊5 % of 896⌋ = 44 rows of 4,864 in 24 layers; with rank 8, 24 · 8 · (44 + 4,864)."""
    rows = training_cost(qwen_half_b, "5")
    assert (rows.quota_percent, rows.rank, rows.rows_per_layer, rows.num_trainable) == ("5", 0, 44, 5_136_384)
    assert rows.trainable_percent == pytest.approx(100 * 5_136_384 / 494_032_768)
    assert rows.adapter_bytes == 20_545_536
    assert rows.optimiser_bytes == 82_182_144
    product = training_cost(qwen_half_b, 5, rank=8)
    assert (product.rows_per_layer, product.num_trainable) == (44, 942_336)
    assert training_cost(qwen_half_b, "0.50").quota_percent == "0.5"


@given(
    quota=st.decimals("0.5", "100", places=2),
    rank=st.integers(0, 64),
    sizes=st.tuples(st.integers(1, 9), st.integers(200, 500), st.integers(1, 900)),
)
def test_costs_follow_from_shapes_alone(quota, rank, sizes):
    num_layers, num_rows, num_columns = sizes
    shapes = [(rank, num_columns)] if rank else []
    rows = rows_for_quota(str(quota), num_rows)
    shapes.append((rows, rank or num_columns))
    size = ModelSize(Shape("llama", *sizes), 10**6, (1,) * num_layers, 1, None)
    cost = training_cost(size, str(quota), rank)
    weights = num_layers * sum(first * second for first, second in shapes)
    assert (cost.rows_per_layer, cost.num_trainable, cost.adapter_bytes) == (rows, weights, 4 * weights)
    assert cost.optimiser_bytes == 4 * cost.adapter_bytes
    assert cost.trainable_percent == pytest.approx(weights / 10**4)


@pytest.mark.parametrize("case", FAMILY_MODELS.values(), ids=FAMILY_MODELS)
def test_sizes_are_those_of_the_real_model(case):
    """Matrix products of a real pass over 5 tokens, by torch's own count, tell the weights of layers and head."""
    model = case.build()
    size = model_size(case.config())
    assert size.shape == shape_of_config(model.config)
    assert size.num_weights == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(5)[None], logits_to_keep=1)
    counts = counter.get_flop_counts()["Global"]
    products = counts.get(torch.ops.aten.mm, 0) + counts.get(torch.ops.aten.addmm, 0)
    assert products == forward_operations(size, 5) + 2 * size.head_weights


def test_operations_of_an_analysis_by_hand():
    """2 layers of 10 and 12 weights, a head of 5, 3 tokens, 4 steps.

    The plain pass: 2·3·22 = 132. The second layer sees 4 branches of the first and each the unmodified row: 10 + 5·12
    = 70 products; 8 branches pass the head: 40. Both forward and back: 4·110.
    """
    size = ModelSize(Shape("llama", 2, 1, 1), 27, (10, 12), 5, None)
    assert forward_operations(size, 3) == 132
    assert analysis_operations(size, 3, 4) == 132 + 440


def test_operations_of_an_analysis_are_those_of_the_diary(llama_8b):
    """docs/log.md: 32.1 and 99.2 GFLOP for SmolLM2 at T = 151, 3.09 plain passes; Llama's shape comes to 2.7."""
    small = model_size(SMOLLM2_135M)
    assert forward_operations(small, 151) == pytest.approx(32.1e9, rel=0.002)
    assert analysis_operations(small, 151) == pytest.approx(99.2e9, rel=0.002)
    assert analysis_operations(llama_8b, 151) / forward_operations(llama_8b, 151) == pytest.approx(2.7, abs=0.05)


@pytest.mark.parametrize("num_tokens", [20, 100, 400])
def test_operations_of_an_analysis_are_near_those_of_the_engine(num_tokens):
    """Matrix products that torch counts; the engine spares part of the last layer, and takes some rows more."""
    model = make_model(num_hidden_layers=6)
    with FlopCounterMode(display=False) as counter:
        attribute(model, torch.randint(0, 260, (1, num_tokens)))
    done = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert analysis_operations(model_size(model.config), num_tokens) == pytest.approx(done, rel=0.15)


@pytest.mark.parametrize("rank", [0, 8])
def test_a_saved_adapter_and_its_optimiser_have_the_size_that_was_told(rank, tmp_path):
    model = make_model(hidden_size=64, intermediate_size=1536, num_hidden_layers=2, head_dim=32)
    cost = training_cost(model_size(model.config), 30, rank)
    positions = [list(range(cost.rows_per_layer))] * 2
    adapted = get_peft_model(model, LokiConfig(positions=positions, r=rank))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == cost.num_trainable
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size == pytest.approx(cost.adapter_bytes, rel=0.01)

    optimiser = torch.optim.AdamW(trained)
    adapted(torch.arange(5)[None], labels=torch.arange(5)[None]).loss.backward()
    optimiser.step()
    moments = [state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    tensors = [*trained, *(parameter.grad for parameter in trained), *moments]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == cost.optimiser_bytes


@pytest.mark.parametrize(("quota", "message"), [("0", "outside"), ("ten", "not a number"), ("0.05", "gives no row")])
def test_quotas_that_are_not_possible(qwen_half_b, quota, message):
    with pytest.raises(InputError, match=message):
        training_cost(qwen_half_b, quota)


def test_a_rank_that_is_not_possible(qwen_half_b):
    with pytest.raises(InputError, match="rank -1 is not possible: give 1 or more, or 0 for none"):
        training_cost(qwen_half_b, 10, rank=-1)


class Clock:
    def __init__(self):
        self.now = 5.0

    def perf_counter(self):
        return self.now


def test_speed_is_that_of_the_products_after_the_first(monkeypatch):
    """Products of 150 × 20 and 20 × 24 that take 0.25 s each, the first one 9 s: 2 · 150 · 480 / 0.25 a second."""
    clock, durations, shapes = Clock(), iter([9.0]), []

    def linear(x, weight):
        shapes.append((tuple(x.shape), tuple(weight.shape), x.dtype, weight.dtype))
        clock.now += next(durations, 0.25)

    monkeypatch.setattr(model_costs.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    size = model_size(make_model().config)
    speed = measure_speed(size, torch.device("cpu"), torch.bfloat16, seconds=1)
    assert speed == pytest.approx(2 * 150 * 480 / 0.25)
    assert len(shapes) == 5
    assert set(shapes) == {((150, 20), (24, 20), torch.bfloat16, torch.bfloat16)}
    monkeypatch.setattr(model_costs, "MAX_MEASURED_WEIGHTS", 100)
    assert measure_speed(size, torch.device("cpu"), torch.float32) == pytest.approx(2 * 150 * 100 / 0.25)
    assert shapes[-1][1] == (5, 20)


def test_speed_is_measured_for_real():
    """Between a thousandth and a thousand times what one core does."""
    size = model_size(make_model(hidden_size=64, intermediate_size=96, head_dim=32).config)
    assert 1e7 < measure_speed(size, torch.device("cpu"), torch.float32, seconds=0.01) < 1e13


@pytest.fixture
def config_dir(tmp_path):
    make_model().config.save_pretrained(tmp_path)
    return tmp_path


def test_a_config_alone_is_enough(config_dir, monkeypatch):
    assert [path.name for path in config_dir.iterdir()] == ["config.json"]
    folder, file = read_config(str(config_dir)), read_config(str(config_dir / "config.json"))
    monkeypatch.chdir(config_dir)
    here = read_config("config.json")
    expected = model_size(make_model().config)
    assert expected.shape == Shape("llama", NUM_LAYERS, NUM_ROWS, NUM_COLUMNS)
    assert model_size(folder) == model_size(file) == model_size(here) == expected


def write_gguf(path, **changes):
    writer = gguf.GGUFWriter(path, changes.pop("family", "llama"))
    values = {
        "block_count": NUM_LAYERS,
        "embedding_length": NUM_ROWS,
        "feed_forward_length": NUM_COLUMNS,
        "head_count": 2,
        "head_count_kv": 1,
        "vocab_size": 260,
    }
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file(tmp_path):
    """It has no `output.weight`, so the embedding is tied: 3 layers of 2,640 and 40 weights, 5,200 and a norm of 20."""
    size = model_size(read_config(str(write_gguf(tmp_path / "tiny.gguf"))))
    assert size.shape == Shape("llama", NUM_LAYERS, NUM_ROWS, NUM_COLUMNS)
    assert size.num_weights == 3 * (2640 + 40) + 5200 + 20
    assert size.dtype is None


def test_a_gguf_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"GGUF file .*tiny\.gguf cannot be read \(.*\): name a whole GGUF file"):
        read_config(str(path))
    with pytest.raises(InputError, match=r"model file 'no\.gguf' does not exist: name a config\.json or GGUF file"):
        read_config("no.gguf")
    path.write_bytes(whole)
    monkeypatch.setattr(model_costs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"reading .*tiny\.gguf needs the package gguf: run `pip install gguf`"):
        read_config(str(path))


def test_models_that_have_no_rows_to_train():
    with pytest.raises(ArchitectureError, match="unknown architecture 'bloom': known are llama"):
        model_size(BloomConfig())
    # No causal model at all: the family is named, not what `transformers` says.
    with pytest.raises(ArchitectureError, match="unknown architecture 't5': known are llama"):
        model_size(T5Config())
    with pytest.raises(ArchitectureError, match="mixture of experts"):
        model_size(MixtralConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "many"}, "Field 'hidden_size' expected int"),
        ({"hidden_size": 21}, "not a multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "unheard"}, "KeyError: 'unheard'"),
    ],
)
def test_configs_that_no_model_can_be_built_from(config_dir, changes, message):
    path = config_dir / "config.json"
    values = json.loads(path.read_text())
    values.pop("head_dim")
    path.write_text(json.dumps(values | changes))
    with pytest.raises(InputError, match=rf"^config of .* cannot be used \(.*{message}.*\): mend it$") as caught:
        model_size(read_config(str(config_dir)))
    assert "\n" not in str(caught.value)


def test_what_load_config_refuses(tmp_path):
    with pytest.raises(InputError, match=r"model file 'none/config\.json' does not exist"):
        read_config("none/config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not a valid JSON file"):
        read_config(str(tmp_path))


def test_stored_dtype_of_a_multimodal_model():
    config = FAMILY_MODELS["gemma3"].config()
    config.get_text_config().dtype = "bfloat16"
    assert model_size(config).dtype == "bfloat16"
