"""`loki merge` of two adapters, and `loki uninstall`, on the command line."""

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import make_model

from loki import LokiConfig

FIRST, SECOND = [[7, 1], [0, 19, 3], [5]], [[2, 0], [4], [6, 1]]
"""Disjoint; the tiny model has 13,260 weights in rows of 24."""


@pytest.fixture
def adapters(tmp_path):
    found = []
    for name, positions in (("a", FIRST), ("b", SECOND)):
        torch.manual_seed(len(found))
        wrapped = get_peft_model(make_model(), LokiConfig(positions=positions, init_weights=False))
        wrapped.save_pretrained(tmp_path / name)
        found.append(tmp_path / name)
    return found


def bytes_of(folder):
    return (folder / "model.safetensors").read_bytes()


def figures(done):
    assert done.code == 0, done.err
    return json.loads(done.out)["figures"]


def test_two_skills_come_and_one_goes(loki, model_dir, adapters, tmp_path):
    a, b = adapters
    for name, model, chosen in (
        *(("only-a", model_dir, [a]), ("only-b", model_dir, [b])),
        *(("ab", tmp_path / "only-a", [b]), ("ba", tmp_path / "only-b", [a]), ("at-once", model_dir, [a, b])),
    ):
        options = [option for adapter in chosen for option in ("--adapter", adapter)]
        done = loki("merge", "--model", model, *options, "--output-dir", tmp_path / name)
        assert (done.code, done.out) == (0, "")
        # The second adapter was trained on the base, not on the model that has the first one: no reason for alarm.
        assert "warning" not in done.err
    assert bytes_of(tmp_path / "ab") == bytes_of(tmp_path / "ba") == bytes_of(tmp_path / "at-once")

    options = ("--model", tmp_path / "ab", "--base", model_dir, "--output-dir")
    done = loki("uninstall", a, *options, tmp_path / "without-a", "--json")
    assert figures(done) == {
        "num_parameters": 13260,
        "num_rows": 6,
        "num_changed": 6 * 24,
        "num_absent": 0,
        "num_altered": 0,
    }
    assert json.loads(done.out)["kind"] == "uninstall"
    assert f"wrote {tmp_path / 'without-a'}: 6 rows are the base's again, 144 of 13,260 weights changed" in done.err
    assert "warning" not in done.err
    assert bytes_of(tmp_path / "without-a") == bytes_of(tmp_path / "only-b")
    assert loki("uninstall", b, *options, tmp_path / "without-b", "--strict").code == 0
    assert bytes_of(tmp_path / "without-b") == bytes_of(tmp_path / "only-a")


def test_merge_says_in_json_which_adapters(loki, model_dir, adapters, tmp_path):
    options = ("--model", model_dir, "--adapter", adapters[0], "--adapter", adapters[1])
    done = loki("merge", *options, "--output-dir", tmp_path / "out", "--json")
    assert figures(done)["num_changed"] == (6 + 5) * 24
    assert json.loads(done.out)["settings"]["adapters"] == [str(adapter) for adapter in adapters]


def test_positions_in_place_of_the_adapter(loki, model_dir, tmp_path):
    torch.manual_seed(0)
    wrapped = get_peft_model(make_model(), LokiConfig(positions=FIRST, target_modules="o_proj", init_weights=False))
    wrapped.save_pretrained(tmp_path / "a")
    assert loki("merge", "--model", model_dir, "--adapter", tmp_path / "a", "--output-dir", tmp_path / "m").code == 0
    (tmp_path / "10.json").write_text(json.dumps(FIRST))
    options = (tmp_path / "10.json", "--model", tmp_path / "m", "--base", model_dir, "--output-dir", tmp_path / "out")
    done = loki("uninstall", *options, "--site-module", "o_proj")
    assert done.code == 0
    assert bytes_of(tmp_path / "out") == bytes_of(model_dir)
    shutil.rmtree(tmp_path / "out")
    done = loki("uninstall", *options, "--json")
    assert figures(done)["num_absent"] == 6
    assert f"warning: nothing of {tmp_path / '10.json'} is installed in {tmp_path / 'm'}" in done.err
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(model_dir / "model.safetensors").keys()


def test_bad_input_is_one_line_and_leaves_nothing(loki, model_dir, adapters, tmp_path):
    a, b = adapters

    def refused(*arguments):
        before = sorted(tmp_path.rglob("*"))
        done = loki(*arguments)
        assert done.code == 2
        assert done.out == ""
        assert done.err.startswith("loki: ")
        assert done.err.count("\n") == 1, done.err
        assert sorted(tmp_path.rglob("*")) == before
        return done.err

    merge = ("merge", "--model", model_dir, "--output-dir", tmp_path / "out")
    error = refused(*merge, "--adapter", a, "--adapter", a)
    assert "both change 2 rows of model.layers.0.mlp.down_proj.weight, 1 for one" in error
    assert "`loki select-nodes --exclude`" in error
    error = refused(*merge, "--adapter", a, "--adapter", b, "--kl", "probe")
    assert "--kl probe compares with one adapter, not 2: leave it out, or merge one by one" in error
    assert "adapter" in refused(*merge)
    output = ("--output-dir", tmp_path / "out")
    assert "--base" in refused("uninstall", a, "--model", model_dir, *output)
    error = refused("uninstall", a, "--model", model_dir, "--base", "/no/model", *output)
    assert "'/no/model' does not exist" in error
    models = ("--model", model_dir, "--base", model_dir)
    assert "nothing of" in refused("uninstall", a, *models, *output, "--strict")
    error = refused("uninstall", a, *models, *output, "--site-module", "o_proj")
    assert "--site-module o_proj is for positions files" in error
    assert "exists already" in refused("uninstall", a, *models, "--output-dir", model_dir)
    assert "name an adapter folder, or a positions file" in refused("uninstall", tmp_path / "no", *models, *output)
