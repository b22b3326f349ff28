"""`loki create-model`, `restore-model`, `suppress` and `merge --kl` on the command line."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from loki import LokiConfig

ROWS = [[7, 1], [0, 19, 3], [5]]


@pytest.fixture
def positions(tmp_path):
    (tmp_path / "10.json").write_text(json.dumps(ROWS))
    return tmp_path / "10.json"


def figures(done):
    assert done.code == 0, done.err
    return json.loads(done.out)["figures"]


def test_there_and_back_with_the_public_implementations_options(loki, model_dir, positions, tmp_path):
    create = ("create-model", "--model-name", model_dir, "--target-pos-path", positions, "--save-dir", tmp_path / "m")
    done = loki(*create, "--torch-dtype", "bfloat16", "--model-type", "llama", "--trust-remote-code")
    assert (done.code, done.out) == (0, "")
    assert (
        f"wrote {tmp_path / 'm'}: 144 of 13,260 weights are trainable; load it with trust_remote_code=True" in done.err
    )
    assert load_file(tmp_path / "m/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    # Options with underscores too, as some pages of the public implementation have them.
    restore = ("restore-model", "--model_path", tmp_path / "m", "--target_pos_path", positions)
    done = loki(*restore, "--output_path", tmp_path / "out", "--model_name", model_dir, "--json")
    assert figures(done) == {"num_parameters": 13260, "num_changed": 0, "num_other_tensors": 0}
    assert "0 of 13,260 weights changed in the selected rows" in done.err
    assert (tmp_path / "out/model.safetensors").read_bytes() == (model_dir / "model.safetensors").read_bytes()
    options = ("--target-pos-path", positions, "--output-path", tmp_path / "half", "--model-name", model_dir)
    assert loki("restore-model", "--model-path", tmp_path / "m", *options, "--torch-dtype", "float16").code == 0
    assert load_file(tmp_path / "half/model.safetensors")["model.norm.weight"].dtype == torch.float16


def test_create_keeps_the_models_dtype_and_prints_json(loki, model_dir, positions, tmp_path):
    options = ("--model-name", model_dir, "--target-pos-path", positions, "--save-dir", tmp_path / "m")
    assert figures(loki("create-model", *options, "--json")) == {"num_parameters": 13260, "num_trainable": 144}
    assert load_file(tmp_path / "m/model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_a_model_with_split_rows_is_never_loaded_with_random_weights(loki, model_dir, positions, tmp_path):
    options = ("--model-name", model_dir, "--target-pos-path", positions, "--save-dir", tmp_path / "m")
    assert loki("create-model", *options).code == 0
    done = loki("analyse", tmp_path / "m", "--output", tmp_path / "kva.h5")
    assert done.code == 2
    assert "has its rows split for training: give --trust-remote-code" in done.err
    assert "`loki restore-model` first" in done.err


def test_suppress(loki, model_dir, positions, tmp_path):
    options = ("--model", model_dir, "--positions", positions, "--output-dir", tmp_path / "out")
    done = loki("suppress", *options, "--site-module", "o_proj", "--json")
    assert figures(done) == {"num_parameters": 13260, "num_suppressed_rows": 6, "num_changed": 120}
    assert "6 rows set to zero, 120 of 13,260 weights" in done.err
    weight = load_file(tmp_path / "out/model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    assert (weight == 0).all(dim=1).nonzero().flatten().tolist() == [0, 3, 19]
    assert loki("suppress", *options[:4], "--output-dir", tmp_path / "down").code == 0


def test_positions_say_whose_rows_they_are(loki, model_dir, positions, tmp_path):
    positions.with_name("10.meta.json").write_text(json.dumps({"log": {"settings": {"site_module": "o_proj"}}}))
    options = ("--model", model_dir, "--positions", positions, "--output-dir", tmp_path / "out")
    refused = loki("suppress", *options, "--site-module", "down_proj")
    assert refused.code == 2
    assert "10.json names rows of o_proj, where down_proj's are wanted" in refused.err
    done = loki("suppress", *options, "--json")
    assert json.loads(done.out)["settings"]["site_module"] == "o_proj"
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert (tensors["model.layers.1.self_attn.o_proj.weight"] == 0).all(dim=1).nonzero().flatten().tolist() == [
        0,
        3,
        19,
    ]
    assert not (tensors["model.layers.1.mlp.down_proj.weight"] == 0).all(dim=1).any()
    create = ("--model-name", model_dir, "--target-pos-path", positions, "--save-dir", tmp_path / "m")
    refused = loki("create-model", *create)
    assert refused.code == 2
    assert "10.json names rows of o_proj, where down_proj's are wanted" in refused.err
    assert not (tmp_path / "m").exists()
    back = ("uninstall", positions, "--model", tmp_path / "out", "--base", model_dir, "--output-dir", tmp_path / "back")
    assert loki(*back).code == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (model_dir / "model.safetensors").read_bytes()


def test_merge_tells_the_divergence(loki, positions, tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    get_peft_model(make_model(), LokiConfig(positions=positions, init_weights=False)).save_pretrained(tmp_path / "a")
    options = ("--model", tmp_path / "base", "--adapter", tmp_path / "a", "--output-dir")
    done = loki("merge", *options, tmp_path / "out", "--kl", "probe", "--json")
    assert 0 < figures(done)["kl_nats_per_token"] < 1e-2
    assert figures(done)["num_tokens"] == 512
    assert "KL divergence between adapter and merged model:" in done.err
    assert "nats per token over 512 tokens" in done.err
    assert "kl_nats_per_token" not in figures(loki("merge", *options, tmp_path / "plain", "--json"))


def refused(loki, tmp_path, *arguments):
    before = sorted(tmp_path.rglob("*"))
    done = loki(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("loki: ")
    assert done.err.count("\n") == 1, done.err
    assert sorted(tmp_path.rglob("*")) == before
    return done.err


def test_bad_input_is_one_line_and_leaves_nothing(loki, model_dir, positions, tmp_path):
    out = tmp_path / "out"
    create = ("create-model", "--target-pos-path", positions, "--save-dir", out, "--model-name")
    assert "'/no/model' does not exist" in refused(loki, tmp_path, *create, "/no/model")
    assert "model type 'qwen2' is not that of" in refused(loki, tmp_path, *create, model_dir, "--model-type", "qwen2")
    assert "torch-dtype" in refused(loki, tmp_path, *create, model_dir, "--torch-dtype", "int8")
    missing = ("create-model", "--save-dir", out, "--model-name", model_dir, "--target-pos-path", "no.json")
    assert "positions file no.json does not exist" in refused(loki, tmp_path, *missing)
    restore = ("restore-model", "--target-pos-path", positions, "--output-path", out, "--model-name", model_dir)
    assert "is no LoKI model" in refused(loki, tmp_path, *restore, "--model-path", model_dir)
    suppress = ("suppress", "--positions", positions, "--output-dir", out, "--model", "/no/model")
    assert "does not exist" in refused(loki, tmp_path, *suppress)
    merge = ("merge", "--model", model_dir, "--adapter", tmp_path, "--output-dir", out)
    assert "'no.txt' for --kl cannot be read" in refused(loki, tmp_path, *merge, "--kl", "no.txt")


def test_a_loki_model_in_place_of_an_ordinary_one_is_named(loki, model_dir, positions, tmp_path):
    create = ("create-model", "--target-pos-path", positions, "--model-name")
    assert loki(*create, model_dir, "--save-dir", tmp_path / "m").code == 0
    error = refused(loki, tmp_path, *create, tmp_path / "m", "--save-dir", tmp_path / "n")
    assert "is a LoKI model already: name the model that it was made from" in error
