import json

import numpy as np
import pytest
import torch
from dialled_models import POSITIONS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import make_model

from loki.dialling.adapter import CONFIG, WEIGHTS, DialledAdapter, require_dialable
from loki.errors import ArtefactError, InputError, OutputError

IDS = torch.tensor([[5, 9, 77, 30, 8]])
KINDS = ["rows", "product", "lora", "rslora"]
SOME = np.array([1.0, 0.0, 0.25, 0.5, 2.0, -1.0])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def scales(adapter, value):
    return np.full(adapter.num_units, float(value))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_are_the_base_and_what_was_trained(dialled, trained, kind):
    adapter = dialled(kind)
    whole = logits(PeftModel.from_pretrained(make_model(), trained(kind, folder="again")).eval())
    assert torch.equal(logits(adapter.model), whole)
    adapter.set(scales(adapter, 0))
    assert torch.equal(logits(adapter.model), logits(make_model()))
    assert not torch.allclose(whole, logits(make_model()), atol=1e-3)
    adapter.set(scales(adapter, 1))
    assert torch.equal(logits(adapter.model), whole)


@pytest.mark.parametrize("kind", ["rows", "product"])
def test_rows_are_scaled_one_by_one(dialled, trained, kind):
    """Against weights changed by hand, row by row."""
    adapter = dialled(kind)
    state = load_file(adapter.folder / WEIGHTS)
    expected = make_model()
    unit = 0
    with torch.no_grad():
        for layer, rows in enumerate(POSITIONS):
            prefix = f"base_model.model.model.layers.{layer}.mlp.down_proj"
            if kind == "rows":
                change = state[f"{prefix}.loki_delta"]
            else:
                factor = json.loads((adapter.folder / CONFIG).read_text())["lora_alpha"] / 2
                change = factor * state[f"{prefix}.loki_A"] @ state[f"{prefix}.loki_B"]
            weight = expected.model.layers[layer].mlp.down_proj.weight
            for place, row in enumerate(rows):
                weight[row] += SOME[unit] * change[place]
                unit += 1
    assert adapter.layers_U.tolist() == [0, 0, 1, 1, 1, 2]
    adapter.set(SOME)
    assert torch.allclose(logits(adapter.model), logits(expected), atol=1e-5)


def test_a_lora_is_scaled_module_by_module(dialled):
    adapter = dialled("lora")
    assert adapter.layers_U.tolist() == [0, 0, 1, 1, 2, 2]
    state = load_file(adapter.folder / WEIGHTS)
    config = json.loads((adapter.folder / CONFIG).read_text())
    expected = make_model()
    with torch.no_grad():
        for unit, scale in enumerate(SOME):
            name = ("self_attn.q_proj", "mlp.down_proj")[unit % 2]
            prefix = f"base_model.model.model.layers.{unit // 2}.{name}"
            change = state[f"{prefix}.lora_B.weight"] @ state[f"{prefix}.lora_A.weight"]
            weight = expected.get_submodule(f"model.layers.{unit // 2}.{name}").weight
            weight += scale * config["lora_alpha"] / config["r"] * change
    adapter.set(SOME)
    assert torch.allclose(logits(adapter.model), logits(expected), atol=1e-5)
    assert not adapter.has_rows


def test_biases_of_rows_are_scaled_with_them(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from loki import LokiConfig

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=20, n_layer=1, n_head=2, n_positions=16)).eval()
    config = LokiConfig(positions=[[2, 4]], bias="rows", init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "loki_bias" in name:
                tensor.copy_(torch.tensor([1.0, 2.0]))
    model.save_pretrained(tmp_path / "a")
    adapter = DialledAdapter(model, tmp_path / "a")
    adapter.set(np.array([0.5, 0.0]))
    (bias,) = (tensor for name, tensor in model.named_parameters() if "loki_bias" in name)
    assert bias.tolist() == [0.5, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_was_set(dialled, tmp_path, kind):
    adapter = dialled(kind)
    before = {path.name: path.read_bytes() for path in adapter.folder.iterdir()}
    (adapter.folder / "tokenizer.json").write_text("{}")
    (adapter.folder / "dial.json").write_text("old")
    adapter.set(SOME[: adapter.num_units])
    found = logits(adapter.model)
    adapter.save(tmp_path / "out", lambda folder: (folder / "more").write_text("x"))
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(), tmp_path / "out").eval()), found)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*before, "tokenizer.json", "more"}
    assert all((adapter.folder / name).read_bytes() == content for name, content in before.items())
    with pytest.raises(OutputError, match="exists already"):
        adapter.save(tmp_path / "out")


def test_the_stored_dtype_is_kept(dialled, tmp_path):
    adapter = dialled("rows", dtype=torch.bfloat16)
    adapter.set(scales(adapter, 0.5))
    adapter.save(tmp_path / "out")
    before, after = load_file(adapter.folder / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], tensor / 2)


def test_gradients_are_taken_only_where_asked(dialled):
    adapter = dialled("rows")
    assert not any(tensor.requires_grad for tensor in adapter.model.parameters())
    with adapter.differentiable():
        names = {name.split(".")[-2] for name, tensor in adapter.model.named_parameters() if tensor.requires_grad}
    assert names == {"loki_delta"}
    assert not any(tensor.requires_grad for tensor in adapter.model.parameters())


def write_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "VERA"}, "is of type 'VERA': LOKI and LORA can be dialled"),
        ({"use_dora": True}, "has use_dora, and not only a change that can be scaled: merge it"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save, and not only"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "began with 'pissa_niter_4', which changes the base's own weights too",
        ),
    ],
)
def test_adapters_that_cannot_be_scaled_are_refused(trained, changes, text):
    folder = trained("lora", steps=1)
    write_config(folder, **changes)
    with pytest.raises(ArtefactError) as error:
        require_dialable(folder)
    assert text in str(error.value)


def test_what_is_no_adapter_is_refused(trained, tmp_path):
    with pytest.raises(ArtefactError, match=r"has no adapter_config.json: name the folder of a LoKI or LoRA adapter"):
        require_dialable(tmp_path)
    folder = trained("rows", steps=1)
    (folder / WEIGHTS).unlink()
    # PEFT would unpickle such a file.
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"has no adapter_model.safetensors: save it as safetensors"):
        require_dialable(folder)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(ArtefactError, match="is of type None"):
        require_dialable(folder)


def test_an_adapter_of_another_model_is_refused(trained):
    folder = trained("rows", steps=1)
    with pytest.raises(InputError, match="does not fit this model"):
        DialledAdapter.load(make_model(intermediate_size=32), folder)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_embedding_is_refused(tmp_path):
    untied = make_model(tie_word_embeddings=False)
    model = get_peft_model(untied, LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ArtefactError, match=r"changes base_model.model.model.embed_tokens, which is in no layer"):
        DialledAdapter.load(make_model(tie_word_embeddings=False), tmp_path / "a")
