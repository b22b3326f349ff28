"""LoKI adapters as ordinary LoRA adapters: the same predictions where this package cannot be imported."""

import json
import subprocess
import sys

import pytest
import torch
from families import FAMILY_MODELS
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tuned import FORMS, INPUT_IDS, POSITIONS, build, logits, wrap

from loki import LokiConfig
from loki.errors import ArtefactError, InputError, OutputError
from loki.implanting.export_lora import export_lora

exported_forms = pytest.mark.parametrize("form", [form for form in FORMS if "biases" not in form])


@pytest.fixture
def saved(tmp_path):
    """Folders of the base and of the adapter of a form, with options of its config."""

    def save(form, **options):
        build(form).save_pretrained(tmp_path / "base")
        wrapped = wrap(form, **options)
        wrapped.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter", logits(wrapped)

    return save


@exported_forms
def test_the_lora_adapter_predicts_the_same(tmp_path, saved, form):
    base, adapter, expected = saved(form)
    export_lora(adapter, tmp_path / "lora", model=str(base))
    loaded = PeftModel.from_pretrained(build(form), tmp_path / "lora")
    assert type(loaded.peft_config["default"]).__name__ == "LoraConfig"
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    # It is the same change of the weights, exactly.
    mine = PeftModel.from_pretrained(build(form), adapter)
    for name, module in mine.base_model.model.named_modules():
        if hasattr(module, "loki_rows"):
            theirs = loaded.base_model.model.get_submodule(name)
            torch.testing.assert_close(
                theirs.get_delta_weight("default"), module.get_delta_weight("default"), rtol=1e-6, atol=1e-9
            )


WITHOUT_LOKI = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "loki":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
try:
    import loki
except ImportError:
    pass
else:
    raise SystemExit("loki can be imported")
import torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.parametrize("form", ["rank", "rows"])
def test_in_a_process_without_this_package(tmp_path, saved, form):
    base, adapter, expected = saved(form)
    export_lora(adapter, tmp_path / "lora", model=str(base))
    torch.save(INPUT_IDS, tmp_path / "input_ids.pt")
    files = [str(tmp_path / name) for name in ("lora", "input_ids.pt", "logits.pt")]
    done = subprocess.run([sys.executable, "-c", WITHOUT_LOKI, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


def test_factors_by_hand(tmp_path, saved):
    base, adapter, _ = saved("rank", lora_alpha=3)
    export = export_lora(adapter, tmp_path / "lora", model=str(base))
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "lora"))
    prefix = "base_model.model.model.layers.2.mlp.down_proj"
    assert torch.equal(theirs[f"{prefix}.lora_A.weight"], mine[f"{prefix}.loki_B"])
    lora_b = theirs[f"{prefix}.lora_B.weight"]
    assert lora_b.shape == (16, 2)
    assert torch.equal(lora_b[[0, 3, 15]], mine[f"{prefix}.loki_A"])
    assert not lora_b[[row for row in range(16) if row not in (0, 3, 15)]].any()
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (2, 3, "CAUSAL_LM")
    assert settings["base_model_name_or_path"] == str(base)
    # 2 layers: A is 2 × 24, B is 16 × 2
    assert (export.rank, export.num_modules, export.num_parameters) == (2, 2, 2 * (48 + 32))
    assert export.num_bytes == (tmp_path / "lora/adapter_model.safetensors").stat().st_size


def test_rows_are_of_their_own_rank_in_each_layer(tmp_path, saved):
    base, adapter, _ = saved("rows", positions=[[1, 7], [4, 5], [0, 3, 15]])
    assert export_lora(adapter, tmp_path / "lora", model=str(base)).rank == 3
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 2)
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {"model.layers.2.mlp.down_proj": 3}


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", {"positions": [[1], [2], [3]]}, ["down_proj"]),
        ("llama", {"positions": [[1], [2], [3]], "target_modules": "o_proj"}, ["o_proj"]),
        ("llama", {"positions": {"o_proj": [1], "down_proj": [2]}}, ["down_proj", "o_proj"]),
        ("gpt2", {"positions": [[1], [2], [3]]}, ["mlp.c_proj"]),
        ("llama", {"positions": POSITIONS}, ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]),
    ],
)
def test_target_modules_are_as_short_as_they_can_be(tmp_path, family, options, expected):
    model = FAMILY_MODELS[family].build()
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LokiConfig(r=2, **options)).save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora", model=str(tmp_path / "base"))
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert sorted(settings["target_modules"]) == expected
    assert settings["fan_in_fan_out"] is (family == "gpt2")


def refuse(error, message, tmp_path, adapter, model):
    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error, match=message):
        export_lora(adapter, tmp_path / "lora", model=model)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_changed_biases_are_refused(tmp_path, saved):
    base, adapter, _ = saved("rank-and-biases")
    message = r"changes biases of model.layers.0.mlp.down_proj, which a LoRA adapter cannot: merge it with `loki merge`"
    refuse(ArtefactError, message, tmp_path, adapter, str(base))


def test_an_adapter_without_a_known_base_is_refused(tmp_path, saved):
    _, adapter, _ = saved("rank")
    message = "does not say which model it was trained on: name it with --model"
    refuse(InputError, message, tmp_path, adapter, None)


def test_the_base_that_the_adapter_names_is_the_default(tmp_path, saved):
    base, adapter, _ = saved("rank")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    assert export_lora(adapter, tmp_path / "lora").num_modules == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 2},
            r"changes model.layers.2.\S+.weight, which model .* does not have: give --model the",
        ),
        ({"intermediate_size": 32}, r"does not fit .*down_proj.weight \(16 × 32\) of model"),
        ({"hidden_size": 12, "num_attention_heads": 2}, r"does not fit .*layers.2.mlp.down_proj.weight \(12 × 24\)"),
    ],
)
def test_another_base_is_refused(tmp_path, saved, changes, message):
    _, adapter, _ = saved("rank")
    build("rank", **changes).save_pretrained(tmp_path / "other")
    refuse(ArtefactError, message, tmp_path, adapter, str(tmp_path / "other"))


def test_a_broken_adapter_is_refused(tmp_path, saved):
    base, adapter, _ = saved("rank")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    refuse(ArtefactError, "has NaN or infinity: train again", tmp_path, adapter, str(base))


def test_an_existing_output_is_never_touched(tmp_path, saved):
    base, adapter, _ = saved("rank")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/precious.txt").write_text("mine")
    refuse(OutputError, "exists already", tmp_path, adapter, str(base))
    assert (tmp_path / "lora/precious.txt").read_text() == "mine"


def test_a_lora_adapter_is_refused(tmp_path, saved):
    base, adapter, _ = saved("rank")
    export_lora(adapter, tmp_path / "once", model=str(base))
    refuse(ArtefactError, "is of type 'LORA', not 'LOKI'", tmp_path, tmp_path / "once", str(base))


def test_the_command(tmp_path, saved, capsys, monkeypatch):
    from loki.cli.main import run

    base, adapter, _ = saved("rank")
    monkeypatch.setattr(
        sys, "argv", ["loki", "export-lora", str(adapter), str(tmp_path / "lora"), "--model", str(base), "--json"]
    )
    with pytest.raises(SystemExit) as stop:
        run()
    assert not stop.value.code
    captured = capsys.readouterr()
    assert json.loads(captured.out)["figures"]["rank"] == 2
    assert f"wrote {tmp_path / 'lora'}: LoRA of rank 2 on 2 modules, 160 weights" in captured.err
