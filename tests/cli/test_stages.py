"""Every stage as a command of its own, one after the other, as the README shows."""

import json

import yaml

from loki.results import Result


def test_the_stages_one_by_one(loki, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(json.dumps({"prompt": f"say {word}", "completion": word}) for word in ("one", "two")))

    done = loki("analyse", model_dir, "--output", "kva.h5", "--steps", 2)
    assert (done.code, done.out) == (0, "")
    again = loki("analyse", model_dir, "--output", "kva.h5", "--steps", 2)
    assert again.code == 0
    assert "kva.h5 is complete already" in again.err
    other = loki("analyse", model_dir, "--output", "kva.h5", "--steps", 3)
    assert other.code == 2
    assert "kva.h5 exists already" in other.err
    assert loki("analyse", model_dir, "--output", "kva.h5", "--steps", 2, "--force").code == 0

    done = loki(
        "select-nodes", "--hdf5-path", "kva.h5", "--quota", 10, "--output-dir", ".", "--model", model_dir, "--json"
    )
    assert done.code == 0
    assert json.loads(done.out)["figures"]["selections"][0]["num_selected_rows"] == 6
    assert loki("select-nodes", "--hdf5-path", "kva.h5", "--strategy", "global_lowest", "--quota", 30).code == 0
    assert (tmp_path / "kva_result/pos_json/tiny-llama/global_lowest_30.json").is_file()

    done = loki(
        *("train", "--model", model_dir, "--positions", "10.json", "--data", own, "--output-dir", "adapter"),
        *("--learning-rate", 0.03, "--steps", 4, "--batch-size", 2),
    )
    assert done.code == 0
    assert "warning" not in done.err

    done = loki("merge", "--model", model_dir, "--adapter", "adapter", "--output-dir", "merged", "--json")
    assert json.loads(done.out)["figures"]["num_changed"] == 6 * 24

    options = ("--completions", own, "--requests", 0, "--no-knowledge")
    merged = loki("evaluate", "merged", "--base", model_dir, *options, "--json", "--output", "result.json")
    adapter = loki("evaluate", model_dir, "--adapter", "adapter", *options, "--json")
    assert merged.code == adapter.code == 0
    assert json.loads(merged.out)["comparisons"] == json.loads(adapter.out)["comparisons"]
    (loss, changed) = Result.load(tmp_path / "result.json").comparisons
    assert loss.after.value < loss.before.value
    assert changed.note == "144 of 13,260"
    table = loki("evaluate", "merged", "--base", model_dir, *options).out
    assert "Task, loss of completions" in table
    assert "Weights changed" in table


def test_the_demo_prints_settings_that_run_takes(loki):
    printed = yaml.safe_load(loki("demo", "--print-config").out)
    assert printed["model"] == "embedded"
    assert printed["select"] == {"strategy": "layer_balanced", "quota": 10}


def test_run_draws_a_report_that_can_be_drawn_again(loki, model_dir, tmp_path):
    (tmp_path / "c.yaml").write_text(
        f"model: {model_dir}\noutput_dir: {tmp_path / 'run'}\n"
        "analyse: {steps: 1}\nselect: {quota: '12.5'}\n"
        "train: {examples: 2, learning_rate: 1e-3, steps: 1}\nevaluate: {knowledge: null}\n"
    )
    done = loki("run", tmp_path / "c.yaml")
    assert done.code == 0
    assert "Weights changed" in done.out
    assert (tmp_path / "run/12.5.json").is_file()
    report = tmp_path / "run/report.html"
    first = report.read_bytes()
    report.unlink()
    assert loki("report", tmp_path / "run").code == 0
    assert report.read_bytes() == first
