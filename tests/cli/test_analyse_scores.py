"""`loki analyse --score`: logs of other scores than KVA, what they refuse, and that all readers take them."""

import json

import numpy as np
import pytest
import torch
from tiny import NUM_LAYERS, NUM_ROWS, make_tokenizer
from transformers import AutoModelForCausalLM

from loki.analysis.row_scores import score_rows
from loki.choices import StrategyName
from loki.log.reader import AttributionLog
from loki.rows import RowSelection, load_meta

TEXTS = {"wall": "a wall of dry stone keeps sheep out", "oar": "an oar in the boat", "fen": "fen and field"}
PIECES = {
    "wall#1": "a wall of dry ston",
    "wall#2": "e keeps sheep out",
    "oar": "an oar in the boat",
    "fen": "fen and field",
}
"""In windows of 18 bytes."""


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in TEXTS.items()))
    return path


@pytest.fixture
def command(model_dir, texts):
    return ("analyse", model_dir, "--dataset", texts, "--dtype", "float32", "--device", "cpu")


def read(path):
    with AttributionLog(path) as log:
        return log.prompts()[1], np.concatenate(list(log.chunks())), dict(log.header.settings)


@pytest.mark.parametrize("score", ["damage", "fisher", "first_order", "activation_norm"])
def test_the_score_is_the_one_asked_for(loki, command, model_dir, tmp_path, score):
    done = loki(*command, "--score", score, "--max-tokens", 18, "--seed", 4, "--output", tmp_path / "log.h5")
    assert done.code == 0, done.err
    assert "log.h5: 4 prompts" in " ".join(done.err.split())
    ids, scores_NLD, settings = read(tmp_path / "log.h5")
    assert ids == list(PIECES)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    for n, text in enumerate(PIECES.values()):
        ids_NT = make_tokenizer()(text, return_tensors="pt").input_ids
        np.testing.assert_array_equal(scores_NLD[n], score_rows(model, ids_NT, score=score, seed=4)[0].numpy())
    seed = {"seed": 4} if score in ("damage", "fisher") else {}
    assert settings == {"score": score, **seed, "max_tokens": 18, "site_module": "down_proj"}


def test_attention_rows_and_batches(loki, command, tmp_path):
    options = ("--score", "damage", "--site-module", "o_proj", "--output")
    assert loki(*command, *options, tmp_path / "one.h5").code == 0
    assert loki(*command, *options, tmp_path / "three.h5", "--batch-size", 3).code == 0
    one, three = read(tmp_path / "one.h5"), read(tmp_path / "three.h5")
    assert one[2] == {"score": "damage", "seed": 0, "max_tokens": 512, "site_module": "o_proj"}
    np.testing.assert_allclose(three[1], one[1], rtol=1e-3)


def test_the_log_is_named_after_the_score(loki, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loki(*command, "--score", "activation_norm").code == 0
    assert loki(*command).code == 0
    assert {path.name for path in tmp_path.glob("*.h5")} == {"activation_norm.h5", "kva.h5"}
    assert read(tmp_path / "kva.h5")[2]["rule"] == "riemann_left"


def test_shards_merge_and_the_same_command_leaves_a_finished_log_alone(loki, command, tmp_path):
    whole, options = tmp_path / "whole.h5", ("--score", "damage", "--max-tokens", 2)
    assert loki(*command, *options, "--output", whole).code == 0
    shards = [tmp_path / f"{number}.h5" for number in (1, 2)]
    for number, shard in enumerate(shards, start=1):
        assert loki(*command, *options, "--shard", f"{number}/2", "--output", shard).code == 0
    assert loki("merge-logs", *shards, "--output", tmp_path / "merged.h5").code == 0
    assert np.array_equal(read(tmp_path / "merged.h5")[1], read(whole)[1])
    before = whole.read_bytes()
    assert "is complete already" in loki(*command, *options, "--output", whole).err
    assert whole.read_bytes() == before
    other = loki(*command, "--score", "damage", "--max-tokens", 2, "--seed", 1, "--output", whole)
    assert (other.code, "exists already" in other.err) == (2, True)


def test_json_and_a_dry_run(loki, command, tmp_path):
    done = loki(*command, "--score", "fisher", "--json", "--output", tmp_path / "log.h5")
    result = json.loads(done.out)
    assert result["settings"] == {"score": "fisher", "seed": 0, "max_tokens": 512, "site_module": "down_proj"}
    assert result["figures"]["num_prompts"] == 3
    done = loki(*command, "--score", "fisher", "--max-tokens", 18, "--json", "--dry-run")
    figures = json.loads(done.out)["figures"]
    assert figures["num_prompts"] == 4
    assert figures["num_tokens"] == sum(map(len, TEXTS.values()))
    assert figures["log_bytes"] == 4 * NUM_LAYERS * NUM_ROWS * 4
    assert figures["seconds"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (("--score", "damage", *options), f"{names} is for --score kva: leave it out, or leave out --score damage")
            for options, names in [
                (("--rule", "riemann_left"), "--rule"),
                (("--steps", 7), "--steps"),
                (("--objective", "logit"), "--objective"),
                (("--no-multiply",), "--multiply/--no-multiply"),
                (("--site", "auto"), "--site"),
                (("--engine", "recompute"), "--engine"),
                (("--target", "predicted"), "--target"),
                (("--max_branches", 3), "--max-branches"),
            ]
        ),
        (("--score", "fisher", "--log-dtype", "float16"), "--log-dtype float16 is for --score kva: leave it out"),
        (("--max-tokens", 100), "--max-tokens 100 is for scores other than kva: leave it out"),
        (("--score", "damage", "--max-tokens", 1), "max_tokens 1 is not possible: give 2 or more"),
        (("--score", "damage", "--seed", -1), "seed -1 is not possible: give 0 or more"),
        (("--score", "harm"), "'harm' is not one of 'kva', 'damage', 'fisher', 'first_order', 'activation_norm'"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(loki, command, tmp_path, options, message):
    done = loki(*command, *options, "--output", tmp_path / "log.h5")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.glob("log.h5*"))


@pytest.fixture
def log(loki, command, tmp_path):
    path = tmp_path / "damage.h5"
    assert loki(*command, "--score", "damage", "--max-tokens", 6, "--output", path).code == 0
    return path


@pytest.mark.parametrize("strategy", [name for name in StrategyName.__args__ if name != "random"])
def test_every_strategy_selects_from_it_and_says_which_score_it_was(loki, log, tmp_path, strategy):
    done = loki(
        *("select-nodes", "--hdf5-path", log, "--quota", 10, "--strategy", strategy, "--stability"),
        *("--output-dir", tmp_path, "--output-name", "rows.json"),
    )
    assert done.code == 0, done.err
    assert RowSelection.load(tmp_path / "rows.json").num_selected == NUM_LAYERS * NUM_ROWS // 10
    meta = load_meta(tmp_path / "rows.json")
    assert meta["log"]["settings"]["score"] == "damage"
    assert 0 < meta["stability"] <= 1


def test_the_lowest_are_those_of_least_damage_whether_signed_or_not(loki, log, tmp_path):
    for strategy in ("layer_balanced", "layer_balanced_magnitude", "layer_highest"):
        loki("select-nodes", "--hdf5-path", log, "--quota", 25, "--strategy", strategy, "--output-dir", tmp_path)
    rows = RowSelection.load(tmp_path / "25.json")
    assert rows == RowSelection.load(tmp_path / "layer_balanced_magnitude_25.json")
    means_LD = read(log)[1].mean(0)
    high = RowSelection.load(tmp_path / "layer_highest_25.json")
    for layer in range(NUM_LAYERS):
        assert means_LD[layer, list(rows.rows[layer])].mean() < means_LD[layer].mean()
        assert means_LD[layer, list(high.rows[layer])].mean() > means_LD[layer].mean()


def test_report_and_comparison_take_it(loki, log, tmp_path):
    for quota in (10, 25):
        loki("select-nodes", "--hdf5-path", log, "--quota", quota, "--output-dir", tmp_path)
    done = loki("compare-positions", tmp_path / "10.json", tmp_path / "25.json")
    assert done.code == 0, done.err
    done = loki("report", log, "--positions", tmp_path / "10.json", "--output", tmp_path / "report.html")
    assert done.code == 0, done.err
    assert "damage" in (tmp_path / "report.html").read_text()
