"""The tuner under everything that trainers do to a model."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import make_model
from torch import nn
from tuned import FORMS, INPUT_IDS, build, config, logits, loki_layers, loss, train_steps, wrap

from loki import LokiConfig
from loki.implanting.tuner import product

every_form = pytest.mark.parametrize("form", FORMS)


def gradients(model):
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # in transformers 5.23
@every_form
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(form, use_reentrant):
    wrapped = wrap(form).eval()
    expected = gradients(wrapped)
    # Frozen embeddings: PEFT makes the layers' inputs require gradients, as checkpointing of the older kind needs.
    wrapped.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    wrapped.enable_input_require_grads()
    wrapped.train()
    found = gradients(wrapped)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


# torch's compiler makes an instance of each autograd function, and warns of that itself.
ignore_compiler = pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")


def assert_compiles(module, *inputs):
    """Without a graph break, through AOTAutograd, and to the same outputs and gradients.

    What generates code behind that is torch's own affair.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    expected = module(*inputs)
    expected = getattr(expected, "logits", expected)
    weights = torch.randn(expected.shape)
    expected_gradients = torch.autograd.grad(expected, trained, weights)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = compiled(*inputs)
    found = getattr(found, "logits", found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found, trained, weights), expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        found = compiled(*inputs)
    torch.testing.assert_close(getattr(found, "logits", found), expected, rtol=1e-4, atol=1e-5)


@ignore_compiler
def test_a_model_compiles_without_graph_breaks():
    assert_compiles(wrap("rows"), INPUT_IDS)


@ignore_compiler
@pytest.mark.parametrize("form", FORMS)
def test_each_form_compiles_without_graph_breaks(form):
    layer = next(iter(loki_layers(wrap(form)).values()))
    assert_compiles(layer, torch.randn(2, layer.in_features))


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products and notes their dtypes."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.dtypes.append(next(arg.dtype for arg in args if isinstance(arg, torch.Tensor)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["rows", "rows-and-biases", "rows-of-conv1d", "rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_runs_the_products_in_its_dtype(form, dtype):
    wrapped = wrap(form, dtype)
    expected, expected_gradients = logits(wrapped).float(), gradients(wrapped)
    products = Products()
    with products, torch.autocast("cpu", torch.bfloat16):
        found = wrapped(input_ids=INPUT_IDS).logits
    assert set(products.dtypes) <= {torch.bfloat16, torch.float32}
    layer = next(iter(loki_layers(wrapped).values()))
    products.dtypes.clear()
    with products, torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, layer.in_features, dtype=dtype))
    assert set(products.dtypes) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        found_gradients = gradients(wrapped)
    assert {gradient.dtype for gradient in found_gradients.values()} == {torch.float32}
    # bfloat16 keeps 8 bits; logits and gradients add up many products.
    assert (found.float() - expected).norm() < 0.03 * expected.norm()
    for name, gradient in found_gradients.items():
        assert (gradient - expected_gradients[name]).norm() < 0.1 * expected_gradients[name].norm(), name


def test_inference_mode_and_generation():
    wrapped = wrap("rows")
    with torch.inference_mode():
        tokens = wrapped.generate(input_ids=INPUT_IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    merged = wrapped.merge_and_unload()
    assert torch.equal(tokens, merged.generate(input_ids=INPUT_IDS, max_new_tokens=4, do_sample=False, pad_token_id=0))


def make_layer(**options):
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    return get_peft_model(
        nn.Sequential(linear), LokiConfig(positions={"0": [3, 1]}, init_weights=False, **options)
    ).base_model.model[0]


def calls_base(layer, x, monkeypatch):
    """Whether the layer takes the ordinary way, through its base layer."""
    taken = []
    monkeypatch.setattr(product.ChangedRowsProduct, "apply", lambda *args: taken.append(1) or torch.zeros(1))
    layer(x)
    return not taken


def test_one_product_in_float32_training_only(monkeypatch):
    layer, x = make_layer(), torch.randn(2, 6)
    assert not calls_base(layer, x, monkeypatch)
    with torch.no_grad():
        assert calls_base(layer, x, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert calls_base(layer, x, monkeypatch)
    assert calls_base(make_layer(r=2), x, monkeypatch)
    assert calls_base(make_layer().to(torch.bfloat16), x.to(torch.bfloat16), monkeypatch)
    two = wrap("rows")
    two.add_adapter("second", config("rows"))
    two.base_model.set_adapter(["default", "second"])
    assert calls_base(loki_layers(two)["model.layers.0.mlp.down_proj"], torch.randn(2, 24), monkeypatch)


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward_pre", "offload", "unfrozen"])
def test_whoever_listens_to_the_base_layer_hears_it(monkeypatch, kind):
    layer, x = make_layer(), torch.randn(2, 6)
    base = layer.base_layer
    if kind == "forward":
        base.register_forward_hook(lambda *_: None)
    elif kind == "pre":
        base.register_forward_pre_hook(lambda *_: None)
    elif kind == "backward":
        base.register_full_backward_hook(lambda *_: None)
    elif kind == "backward_pre":
        base.register_full_backward_pre_hook(lambda *_: None)
    elif kind == "offload":
        base._hf_hook = object()  # as accelerate marks a layer whose weights it brings in
    else:
        base.weight.requires_grad_(True)
    assert calls_base(layer, x, monkeypatch)


def test_hooks_of_the_base_layer_keep_their_output():
    """The change is not added in place to what a hook may have kept."""
    layer = make_layer()
    kept = []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: kept.append((output, output.clone())))
    layer(torch.randn(2, 6)).sum().backward()
    ((output, then),) = kept
    assert torch.equal(output, then)


def test_gradients_of_the_one_product_in_float64():
    """Against finite differences; the weight is frozen."""
    torch.manual_seed(0)
    x, delta = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    weight, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for tensor in (x, delta, bias):
        tensor.requires_grad_(True)
    rows = torch.tensor([1, 3])
    assert torch.autograd.gradcheck(product.ChangedRowsProduct.apply, (x, weight, bias, rows, delta))
    assert torch.autograd.gradcheck(product.ChangedRowsProduct.apply, (x[0], weight, None, rows, delta))


def test_the_one_product_keeps_no_changed_weight():
    """Only what was there anyway is kept for the backward pass, none of it a copy of the weight."""
    layer = make_layer()
    x = torch.randn(2, 6)
    there = {tensor.data_ptr() for tensor in (x, *layer.parameters(), *layer.buffers())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert kept
    assert all(tensor.data_ptr() in there for tensor in kept)


def test_tied_embeddings_stay_tied():
    model = make_model(tie_word_embeddings=True)
    wrapped = get_peft_model(model, LokiConfig(positions=[[1], [2], [3]]))
    train_steps(wrapped)
    merged = wrapped.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings


@pytest.mark.parametrize("form", ["rows", "rank"])
def test_modules_to_save_are_trained_and_saved_whole(tmp_path, form):
    wrapped = wrap(form, modules_to_save=["lm_head"], init_weights=True)
    before = build(form).lm_head.weight
    train_steps(wrapped)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(form), tmp_path)
    assert torch.equal(logits(loaded), logits(wrapped))
    assert not torch.equal(loaded.merge_and_unload().lm_head.weight, before)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(build(form)))


def test_embeddings_of_new_tokens_are_trained_with_the_rows(tmp_path):
    """`trainable_token_indices` as in PEFT's LoraConfig; TRL writes the tokens it adds there."""
    wrapped = wrap("rows", trainable_token_indices=[2, 5], init_weights=True)
    before = build("rows").model.embed_tokens.weight
    train_steps(wrapped)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("rows"), tmp_path)
    assert torch.equal(logits(loaded), logits(wrapped))
    after = loaded.merge_and_unload().model.embed_tokens.weight
    assert (after != before).any(1).nonzero().flatten().tolist() == [2, 5]


def test_a_second_training_goes_on_where_the_first_stopped(tmp_path):
    wrapped = wrap("rank", init_weights=True)
    train_steps(wrapped)
    wrapped.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(build("rank"), tmp_path, is_trainable=True)
    train_steps(wrapped, 1)
    train_steps(resumed, 1)
    assert torch.equal(logits(resumed), logits(wrapped))


def test_loaded_for_inference_nothing_is_trained(tmp_path):
    wrap("rank-and-biases").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("rank-and-biases"), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
