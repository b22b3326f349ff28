"""Quantised bases, with the libraries that run on a CPU (`make test-quantised`)."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from families import FAMILY_MODELS
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments
from tuned import INPUT_IDS, logits, loki_layers, loss

from loki import LokiConfig
from loki.errors import InputError
from loki.training.budget import ForgettingBudget

pytestmark = [
    pytest.mark.quantised,
    pytest.mark.filterwarnings(
        "ignore:MatMul8bitLt:UserWarning",  # bitsandbytes tells of its own casts
        "ignore:.*:DeprecationWarning",  # both libraries, of torch
        "ignore:.*:FutureWarning",
    ),
]

KINDS = ("bitsandbytes-8", "bitsandbytes-4", "torchao-8", "torchao-8-dynamic")
POSITIONS = [[1, 7], [], [0, 3, 60]]
LARGEST_ERROR = {"bitsandbytes-8": 1 / 127, "bitsandbytes-4": 1 / 6, "torchao-8": 1 / 127, "torchao-8-dynamic": 1 / 127}
"""In parts of a row's largest weight: one of 127 steps; half of the widest gap between FP4's values, 2/3 and 1."""


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """64 rows: both libraries quantise in blocks."""
    directory = tmp_path_factory.mktemp("base")
    FAMILY_MODELS["llama"].build(hidden_size=64, intermediate_size=128).save_pretrained(directory)
    return directory


def quantisation(kind):
    if kind == "bitsandbytes-8":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bitsandbytes-4":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "torchao-8" else Int8DynamicActivationInt8WeightConfig())


def load(kind, base_dir):
    model = AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=quantisation(kind), device_map="cpu")
    # Evaluation makes bitsandbytes lay 4-bit weights out for inference; no gradient passes them after that.
    return model.train()


def wrap(kind, base_dir, **options):
    torch.manual_seed(3)
    settings = {"positions": POSITIONS, "task_type": "CAUSAL_LM", "init_weights": False, **options}
    return get_peft_model(load(kind, base_dir), LokiConfig(**settings))


def read_weight(layer):
    """The weight that a quantised layer stands for, (D, F): what it does to the unit vectors would be rounded anew."""
    linear = layer.get_base_layer()
    name = type(linear.weight).__name__
    if name == "Int8Params":
        scale = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
        return linear.weight.data.float() * scale[:, None] / 127
    if name == "Params4bit":
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
    return linear.weight.dequantize().float()


@pytest.mark.parametrize("rank", [0, 2])
def test_the_change_is_added_to_the_quantised_output(kind, base_dir, rank):
    wrapped = wrap(kind, base_dir, r=rank)
    for layer in loki_layers(wrapped).values():
        x = torch.randn(3, 128)
        with torch.no_grad():
            found = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(found, x @ layer.get_delta_weight("default").T, rtol=1e-4, atol=1e-5)


def test_starts_as_the_quantised_model(kind, base_dir):
    assert torch.equal(logits(wrap(kind, base_dir, init_weights=True)), logits(load(kind, base_dir)))


@pytest.mark.parametrize("rank", [0, 2])
def test_gradients_of_the_change(kind, base_dir, rank):
    wrapped = wrap(kind, base_dir, r=rank)
    layer = next(iter(loki_layers(wrapped).values()))
    x, grad = torch.randn(3, 128), torch.randn(3, 64)
    layer(x).backward(grad)
    dense = grad[:, layer.loki_rows["default"]].T @ x
    if rank:
        a, b = layer.loki_A["default"], layer.loki_B["default"]
        torch.testing.assert_close(a.grad, 2 * dense @ b.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b.grad, 2 * a.T @ dense, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(layer.loki_delta["default"].grad, dense, rtol=1e-4, atol=1e-4)


def test_training_leaves_the_base_as_it_is(kind, base_dir):
    wrapped = wrap(kind, base_dir, init_weights=True)
    before = [read_weight(layer) for layer in loki_layers(wrapped).values()]
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        losses.append(loss(wrapped))
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    for layer, weight in zip(loki_layers(wrapped).values(), before, strict=True):
        assert torch.equal(read_weight(layer), weight)


def test_measuring_forgetting_leaves_gradients_as_they_are(tmp_path, kind, base_dir):
    """bitsandbytes' 4-bit weights, once evaluated on a CPU with AVX-512 BF16, pass wrong gradients on."""
    wrapped = wrap(kind, base_dir)

    def gradients():
        wrapped.zero_grad()
        loss(wrapped).backward()
        return [p.grad.clone() for p in wrapped.parameters() if p.requires_grad]

    before = gradients()
    # Token ids of the tiny model's vocabulary.
    budget = ForgettingBudget(
        ["abc"], tokenizer=lambda _, **__: SimpleNamespace(input_ids=[5, 6, 7]), probe_accuracy=False
    )
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", bf16=False)
    budget.on_train_begin(args, TrainerState(), TrainerControl(), model=wrapped)
    assert budget.history[0]["kl"] > 0
    for found, expected in zip(gradients(), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 2])
def test_merging_quantises_the_changed_weight(kind, base_dir, rank):
    wrapped = wrap(kind, base_dir, r=rank)
    layers = loki_layers(wrapped).values()
    before = [read_weight(layer) for layer in layers]
    with pytest.warns(UserWarning, match="rounds every row of the layer anew; `loki merge`"):
        wrapped.merge_adapter()
    for layer, weight in zip(layers, before, strict=True):
        expected = weight + layer.get_delta_weight("default")
        after = read_weight(layer)
        largest = LARGEST_ERROR[kind] * expected.abs().amax(1, keepdim=True)
        assert ((after - expected).abs() <= largest).all()
        assert not torch.equal(after[layer.loki_rows["default"]], weight[layer.loki_rows["default"]])
        assert type(layer.get_base_layer().weight) is not torch.nn.Parameter  # quantised still
    merged = wrapped.unload()
    assert not loki_layers(merged)
    assert torch.isfinite(logits(merged)).all()


def test_unmerging_is_exact(kind, base_dir):
    wrapped = wrap(kind, base_dir)
    before = [read_weight(layer) for layer in loki_layers(wrapped).values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.merge_adapter()
        logits(wrapped)
    wrapped.unmerge_adapter()
    for layer, weight in zip(loki_layers(wrapped).values(), before, strict=True):
        assert torch.equal(read_weight(layer), weight)
    assert torch.equal(logits(wrapped), logits(wrap(kind, base_dir)))


def test_safe_merge_refuses_a_broken_change_and_leaves_the_base(kind, base_dir):
    wrapped = wrap(kind, base_dir)
    layer = next(iter(loki_layers(wrapped).values()))
    before = read_weight(layer)
    layer.loki_delta["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="seems to be broken"):
        wrapped.merge_adapter(safe_merge=True)
    assert torch.equal(read_weight(layer), before)


def test_saved_adapters_load_on_the_quantised_base(tmp_path, kind, base_dir):
    wrapped = wrap(kind, base_dir)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(kind, base_dir), tmp_path).train()
    assert torch.equal(logits(loaded), logits(wrapped))


def test_weights_that_cannot_be_read_back_are_not_merged(base_dir):
    """On CPUs with AVX-512 BF16, bitsandbytes lays 4-bit weights out anew in evaluation, and dequantises garbage."""
    wrapped = wrap("bitsandbytes-4", base_dir).eval()
    layer = next(iter(loki_layers(wrapped).values()))
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InputError, match="cannot be merged into this Params4bit of a quantised model: merge it into"):
        wrapped.merge_adapter()


def test_torchao_weights_quantised_by_hand_are_not_merged(base_dir):
    """How they were quantised is not known to the model, so they cannot be quantised so again."""
    import torchao
    from torchao.quantization import Int8WeightOnlyConfig

    model = AutoModelForCausalLM.from_pretrained(base_dir)
    torchao.quantize_(model, Int8WeightOnlyConfig())
    wrapped = get_peft_model(model, LokiConfig(positions=POSITIONS, init_weights=False))
    assert torch.isfinite(wrapped(input_ids=INPUT_IDS).logits).all()
    with pytest.raises(InputError, match="cannot be merged into this Int8Tensor of a quantised model"):
        wrapped.merge_adapter()
