"""`loki info`: what it prints, as a table and as JSON, and what it refuses."""

import json

import pytest
import torch
from tiny import make_model
from transformers import LlamaConfig

from loki import model_costs
from loki.cli.info import BYTES, COUNTS, TIMES, _scaled


@pytest.fixture
def measured(monkeypatch):
    """What speed was measured of; the measuring itself has its tests in `test_model_costs.py`."""
    asked = []

    def measure_speed(size, device, dtype):
        asked.append((size.shape.num_rows, str(device), dtype))
        return 2e9

    monkeypatch.setattr(model_costs, "measure_speed", measure_speed)
    return asked


@pytest.fixture
def llama_8b(tmp_path):
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    ).save_pretrained(tmp_path / "Llama-8B")
    return tmp_path / "Llama-8B" / "config.json"


def lines(text):
    """Every line with text, words apart by one space."""
    words = [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in words if line.strip("─")]


def test_a_large_model_from_its_config_alone(loki, llama_8b, measured):
    """The paper's 188, 376, 563 and 16 million; bytes are 4 and 16 times as many.

    Operations: 300 · 32 · 218,103,808 weights of a layer, and 4 · (7·496 + 32) of those and 4 · 224 · 4096 · 128,256:
    5,620.6 GFLOP, 39,461,000 s at 2 GFLOPS for 14,042 prompts.
    """
    done = loki("info", llama_8b)
    assert (done.code, done.err) == (0, "")
    *table, _, analysis, dry_run = lines(done.out)
    assert table == [
        str(llama_8b),
        "llama · 32 layers · 4,096 rows × 14,336 columns · 8.03 B weights · bfloat16",
        "quota rows a layer trained share adapter AdamW",
        "LoKI 5 % 204 93.6 M 1.17 % 374 MB 1.50 GB",
        "10 % 409 188 M 2.34 % 751 MB 3.00 GB",
        "20 % 819 376 M 4.68 % 1.50 GB 6.01 GB",
        "30 % 1,228 563 M 7.02 % 2.25 GB 9.01 GB",
        "LoKI*, rank 32 5 % 204 14.9 M 0.19 % 59.6 MB 238 MB",
        "10 % 409 15.1 M 0.19 % 60.4 MB 242 MB",
        "20 % 819 15.5 M 0.19 % 62.1 MB 248 MB",
        "30 % 1,228 15.9 M 0.20 % 63.8 MB 255 MB",
    ]
    assert analysis == (
        "Analysis of 14,042 prompts: an estimated 460 days here, "
        "if all ran at the 2 GFLOPS of matrix products (float32 on cpu);"
    )
    assert dry_run == "`loki analyse MODEL --dry-run` times real prompts."
    assert max(map(len, done.out.splitlines()[3:15])) <= 80


def test_quotas_and_rank_of_ones_own(loki, model_dir, measured):
    found = lines(loki("info", model_dir, "--quota", 12.5, "--quota", "050", "--rank", 2, "--num-prompts", 3).out)
    assert found[2:5] == [
        "quota rows a layer trained share adapter AdamW",
        "LoKI 12.5 % 2 144 1.09 % 576 bytes 2.30 kB",
        "50 % 10 720 5.43 % 2.88 kB 11.5 kB",
    ]
    assert found[5:7] == [
        "LoKI*, rank 2 12.5 % 2 156 1.18 % 624 bytes 2.50 kB",
        "50 % 10 204 1.54 % 816 bytes 3.26 kB",
    ]
    assert "AdamW: trainable weights, their gradients and two moments, all float32; the frozen model" in found[7]
    assert "Analysis of 3 prompts: an estimated 1 s here" in found[8]
    without = lines(loki("info", model_dir, "--rank", 0).out)
    assert [line.split(" %")[0] for line in without[3:8]] == ["LoKI 5", "10", "20", "30", without[7]]


@pytest.mark.parametrize(
    ("number", "units", "digits", "text"),
    [
        (999, COUNTS, 3, "999"),
        (1000, COUNTS, 3, "1.00 k"),
        (999_499, COUNTS, 3, "999 k"),
        (999_500, COUNTS, 3, "1.00 M"),
        (15_938_560, COUNTS, 3, "15.9 M"),
        (1_234_567 * 10**9, COUNTS, 3, "1,230 T"),
        (0, BYTES, 3, "0 bytes"),
        (2_304, BYTES, 3, "2.30 kB"),
        (59.4, TIMES, 2, "59 s"),
        (90, TIMES, 2, "1.5 min"),
        (3600 * 40.6, TIMES, 2, "1.7 days"),
    ],
)
def test_units_for_people(number, units, digits, text):
    assert _scaled(number, units, digits=digits) == text


def test_as_json(loki, model_dir, measured):
    done = loki("info", model_dir, "--quota", 10, "--rank", 4, "--num-prompts", 100, "--dtype", "bfloat16", "--json")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert (result["kind"], result["model"]) == ("info", str(model_dir))
    assert result["settings"] == {
        "quotas": ["10"],
        "rank": 4,
        "num_prompts": 100,
        "dtype": "bfloat16",
        "device": None,
    }
    figures = result["figures"]
    estimate = figures.pop("analysis_estimate")
    rows = {"quota_percent": "10", "rank": 0, "rows_per_layer": 2, "num_trainable": 144}
    product = {"quota_percent": "10", "rank": 4, "rows_per_layer": 2, "num_trainable": 312}
    assert figures == {
        "family": "llama",
        "num_layers": 3,
        "num_rows": 20,
        "num_columns": 24,
        "num_weights": 13260,
        "dtype": "float32",
        "training": [
            cost
            | {
                "trainable_percent": pytest.approx(cost["num_trainable"] / 132.6),
                "adapter_bytes": 4 * cost["num_trainable"],
                "optimiser_bytes": 16 * cost["num_trainable"],
            }
            for cost in (rows, product)
        ],
    }
    # 300 · 3 · 2,640 weights, 4 · (7·3 + 3) · 2,640 for branches and 4 · 21 · 5,200 for their heads.
    assert estimate == {
        "num_tokens_per_prompt": 150,
        "operations_per_prompt": 2_376_000 + 253_440 + 436_800,
        "operations_per_second": 2e9,
        "dtype": "bfloat16",
        "device": "cpu",
        "seconds": pytest.approx(100 * 3_066_240 / 2e9),
    }
    assert measured == [(20, "cpu", torch.bfloat16)]


def test_speed_is_really_measured(loki, model_dir):
    figures = json.loads(loki("info", model_dir, "--json").out)["figures"]
    assert figures["analysis_estimate"]["operations_per_second"] > 1e6


def test_no_weights_are_loaded(loki, tmp_path, measured):
    make_model().config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    assert loki("info", tmp_path).code == 0


@pytest.mark.real
def test_the_embedded_model(loki):
    found = lines(loki("info", "embedded").out)
    assert found[:2] == [
        "SmolLM2-135M-Instruct (Q4_1, dequantised)",
        "llama · 30 layers · 576 rows × 1,536 columns · 135 M weights · float32",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["/none"], "model folder '/none' does not exist: name a Hugging Face model folder"),
        (["none.gguf"], "model file 'none.gguf' does not exist"),
        (["none.h5"], "model folder 'none.h5' does not exist"),
        (["{log}"], "{log} is an attribution log, not a model: draw it with `loki report {log}`"),
        (["{model}", "--quota", "0"], "quota 0 is outside (0, 100]"),
        (["{model}", "--quota", "ten"], "quota 'ten' is not a number"),
        (["{model}", "--quota", "4.9"], "quota 4.9 gives no row out of 20: give at least 5"),
        (["{model}", "--rank", "-1"], "rank -1 is not possible: give 1 or more, or 0 for none"),
        (["{model}", "--num-prompts", "0"], "num-prompts 0 is not possible: give 1 or more"),
        (["{model}", "--device", "abacus"], "device 'abacus' is unknown"),
        (["{model}", "--dtype", "int3"], "Invalid value for '--dtype'"),
        (["{bloom}"], "unknown architecture 'bloom': known are llama"),
        (["{bad}"], "config of '{bad}' cannot be used"),
        ([], "Missing argument 'model'"),
    ],
)
def test_bad_input(loki, model_dir, tmp_path, options, message):
    from transformers import BloomConfig

    BloomConfig().save_pretrained(tmp_path / "bloom")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.json").write_text('{"model_type": "llama", "hidden_size": "many"}')
    (tmp_path / "kva.h5").write_bytes(b"a log")
    places = {"log": tmp_path / "kva.h5", "model": model_dir, "bloom": tmp_path / "bloom", "bad": tmp_path / "bad"}
    done = loki("info", *(option.format(**places) for option in options))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("loki: ")
    assert done.err.count("\n") == 1
    assert message.format(**places) in done.err


def test_help(loki):
    assert "Example: loki info" in loki("info", "--help").out
