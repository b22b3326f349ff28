"""`loki train`: settings files, options, budgets, and several processes."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from warm import WarmRanks

TIMEOUT = 300
"""Seconds; a launch takes about 15 on a quiet machine, and a hang would take days."""


@pytest.fixture
def settings(model_dir, tmp_path):
    """The least that a settings file needs, with data of its own: eight examples of one to eight answers."""
    (tmp_path / "p.json").write_text(json.dumps([[7, 1], [0, 19], [5, 3]]))
    rows = [{"instruction": f"count to {n}", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 9)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(model_dir),
        "positions": str(tmp_path / "p.json"),
        "output_dir": str(tmp_path / "adapter"),
        "data": str(tmp_path / "own.jsonl"),
        "learning_rate": 0.02,
        "steps": 4,
        "batch_size": 2,
        "log_every": 1,
    }


def write(tmp_path, values, **changes):
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def record_of(folder):
    return json.loads((folder / "loki_training.json").read_text())


def test_a_settings_file_trains_and_options_come_before_it(loki, settings, tmp_path):
    config = write(tmp_path, settings)
    done = loki("train", config)
    assert (done.code, done.out) == (0, "")
    assert f"wrote {tmp_path / 'adapter'}: 144 weights trained, mean loss" in done.err
    assert "learning rate 0.02\n" in done.err
    done = loki("train", config, "--output_dir", tmp_path / "other", "--steps", 2, "--packing", "--max-length", 60)
    assert done.code == 0
    record = record_of(tmp_path / "other")
    assert [row["step"] for row in record["log"]] == [1, 2]
    assert record["settings"]["packing"] is True


def test_the_same_numbers_come_from_a_file_and_from_options(loki, settings, tmp_path):
    assert loki("train", write(tmp_path, settings, log_every=5)).code == 0
    options = [
        part
        for name, value in settings.items()
        if name not in ("log_every", "output_dir")
        for part in (f"--{name.replace('_', '-')}", value)
    ]
    assert loki("train", *options, "--output-dir", tmp_path / "flags").code == 0
    for name, value in load_file(tmp_path / "adapter/adapter_model.safetensors").items():
        assert torch.equal(value, load_file(tmp_path / "flags/adapter_model.safetensors")[name])


def test_epochs_in_place_of_steps(loki, settings, tmp_path):
    """Eight examples in batches of two."""
    assert loki("train", write(tmp_path, settings), "--epochs", 1.25).code == 0
    assert [row["step"] for row in record_of(tmp_path / "adapter")["log"]] == [1, 2, 3, 4, 5]


def test_a_scaled_learning_rate_is_told(loki, settings, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([[1], [2], [3]]))
    done = loki("train", write(tmp_path, settings, steps=1))
    assert "learning rate 0.0356 (0.02 scaled to a quota of 5 %)" in done.err
    done = loki("train", write(tmp_path, settings, steps=1), "--no-scale-learning-rate", "--output-dir", tmp_path / "b")
    assert "learning rate 0.02\n" in done.err


def test_a_budget_is_told_step_by_step_and_kept_in_the_record(loki, settings, tmp_path):
    (tmp_path / "t.txt").write_text("Water boils at 100 degrees.")
    section = {"text": str(tmp_path / "t.txt"), "max_kl": 1e-9, "every": 2, "probe_accuracy": False}
    done = loki("train", write(tmp_path, settings, budget=section))
    assert done.code == 0
    assert "note: step 0: per-token loss +0.0000, KL 0.0000 nats\n" in done.err
    assert "note: step 2: the forgetting budget is spent, training stops\n" in done.err
    assert [row["step"] for row in record_of(tmp_path / "adapter")["budget"]["history"]] == [0, 2]


def test_texts_are_preserved_and_the_cost_is_told(loki, settings, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "Water boils at 100 degrees."}\n')
    config = write(tmp_path, settings, preserve={"text": "elsewhere", "every": 2})
    done = loki("train", config, "--preserve", tmp_path / "t.jsonl", "--preserve-weight", 3, "--mixed-precision")
    assert done.code == 0
    record = record_of(tmp_path / "adapter")
    assert (record["preserve"]["weight"], record["preserve"]["every"]) == (3.0, 2)
    assert [row["step"] for row in record["preserve"]["history"]] == [2, 4]
    assert record["settings"]["mixed_precision"] is True
    (line,) = [line for line in done.err.splitlines() if "preserved texts" in line]
    assert line == (
        f"preserved texts: KL from the base {record['preserve']['kl_last']:.4f} nats per token at the last pass; "
        f"{record['preserve']['seconds_per_step']:.2f} s a step, "
        f"{record['preserve']['seconds_per_step_without']:.2f} s without"
    )


def test_rows_take_steps_by_their_damage(loki, settings, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "Water boils at 100 degrees."}\n')
    log = tmp_path / "damage.h5"
    assert (
        loki("analyse", settings["model"], "--score", "damage", "--dataset", tmp_path / "t.jsonl", "--output", log).code
        == 0
    )
    assert loki("train", write(tmp_path, settings)).code == 0
    assert loki("train", write(tmp_path, settings), "--row-rates", log, "--output-dir", tmp_path / "rates").code == 0
    plain, scaled = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "rates"))
    assert all(not torch.equal(plain[name], scaled[name]) for name in plain)
    done = loki("train", write(tmp_path, settings), "--row-rates", tmp_path / "no.h5", "--output-dir", tmp_path / "b")
    assert (done.code, done.out) == (2, "")
    assert "no.h5 does not exist: make it with `loki analyse`" in done.err
    assert not list(tmp_path.glob("b*"))


def test_texts_are_checked_before_the_model_loads(loki, settings, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise AssertionError("loaded")

    monkeypatch.setattr("loki.models.load_model", fail)
    (tmp_path / "t.txt").write_text("x")
    done = loki("train", write(tmp_path, settings), "--preserve", tmp_path / "t.txt")
    assert done.code == 2
    assert "preserve: the text has no two tokens in a row: give a longer one" in done.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model: input should be a valid string, got none"),
        ({"budget": {"text": "no.txt"}}, "budget: text 'no.txt' cannot be read"),
        ({"budget": {"max_kl": -1}}, "budget: max kl -1"),
        ({"data": "no.jsonl"}, "training data 'no.jsonl' cannot be read"),
        ({"max_length": 3}, "no example has an answer within 3 tokens"),
        ({"lora_alpha": 2}, "lora alpha 2.0 needs a rank"),
        ({"preserve": {"text": "no.txt"}}, "preserve: text 'no.txt' cannot be read"),
        ({"preserve": {"text": []}}, "preserve: the text is empty"),
        ({"preserve": {"text": ["x"]}}, "preserve: the text has no two tokens in a row"),
        ({"preserve": {"text": "probe", "weight": 0}}, "preserve: weight 0.0 is not possible: give a number above 0"),
        ({"preserve": {"text": "probe", "every": 9}}, "preserve: every 9 is more than the 4 steps of this training"),
        ({"mixed_precision": True, "dtype": "bfloat16"}, "mixed precision needs a float32 model, not dtype bfloat16"),
        ({"steps": None}, "steps is missing: give steps"),
    ],
)
def test_what_is_wrong_is_one_line(loki, settings, tmp_path, changes, message):
    done = loki("train", write(tmp_path, settings, **changes))
    assert (done.code, done.out) == (2, "")
    assert message in done.err.lower()
    assert done.err.count("\n") == 1
    assert not list(tmp_path.glob("adapter*"))


@pytest.fixture
def attention(loki, model_dir, tmp_path):
    """Positions of attention's output, two in each layer, by an analysis of it."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o/t.jsonl").write_text(json.dumps({"id": "a", "text": "Water boils at 100 degrees."}))
    options = ("--dataset", tmp_path / "o/t.jsonl", "--score", "damage", "--output", tmp_path / "o/o.h5")
    assert loki("analyse", model_dir, *options, "--site-module", "o_proj").code == 0
    assert loki("select-nodes", "--hdf5-path", tmp_path / "o/o.h5", "--output-dir", tmp_path / "o").code == 0
    return tmp_path / "o/10.json"


def changed_rows(folder, base):
    """Rows of each weight that differ from the base's."""
    before, after = (load_file(directory / "model.safetensors") for directory in (base, folder))
    differing = {name: (before[name] != after[name]).flatten(1).any(1) for name in before if before[name].dim() == 2}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - differing)
    return {name: rows.nonzero().flatten().tolist() for name, rows in differing.items() if rows.any()}


def of_layers(path, rows):
    return {f"model.layers.{layer}.{path}.weight": sorted(chosen) for layer, chosen in enumerate(rows)}


def test_rows_of_both_blocks_are_trained_and_merged_and_put_back(loki, settings, attention, model_dir, tmp_path):
    """Each where its file says; by option or from a settings file, in either order."""
    options = ("--positions", attention, "--positions", settings["positions"])
    done = loki("train", write(tmp_path, settings), *options)
    assert done.code == 0, done.err
    assert "adapter: 264 weights trained" in done.err  # 6 rows of 24 columns, 6 of 20
    assert record_of(tmp_path / "adapter")["quota_percent"] == "10"
    listed = write(tmp_path, settings, positions=[settings["positions"], str(attention)])
    assert loki("train", listed, "--output-dir", tmp_path / "listed").code == 0
    merge = ("merge", "--model", model_dir, "--adapter")
    assert loki(*merge, tmp_path / "adapter", "--output-dir", tmp_path / "merged").code == 0
    chosen = [json.loads(Path(path).read_text()) for path in (settings["positions"], attention)]
    expected = {**of_layers("mlp.down_proj", chosen[0]), **of_layers("self_attn.o_proj", chosen[1])}
    assert changed_rows(tmp_path / "merged", model_dir) == expected
    assert loki(*merge, tmp_path / "listed", "--output-dir", tmp_path / "same").code == 0
    merged = [load_file(tmp_path / name / "model.safetensors") for name in ("merged", "same")]
    for name, tensor in merged[0].items():
        # The order of the optimiser's tensors is another: the gradients' norm, a sum, differs in its last bits.
        torch.testing.assert_close(tensor, merged[1][name])
    put_back = ("uninstall", tmp_path / "adapter", "--model", tmp_path / "merged", "--base", model_dir)
    assert loki(*put_back, "--output-dir", tmp_path / "back").code == 0
    assert changed_rows(tmp_path / "back", model_dir) == {}


def test_rows_of_attention_alone_are_trained_where_they_are(loki, settings, attention, tmp_path):
    """Its provenance says whose they are, or an option; they were taken for the down-projection's once."""
    assert loki("train", write(tmp_path, settings), "--positions", attention).code == 0
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(names) >= 3
    assert all(".self_attn.o_proj." in name for name in names)
    attention.with_name("10.meta.json").unlink()
    options = ("--positions", attention, "--site-module", "o_proj", "--output-dir", tmp_path / "told")
    assert loki("train", write(tmp_path, settings), *options).code == 0
    told = load_file(tmp_path / "told/adapter_model.safetensors")
    assert told.keys() == names.keys()
    assert all(torch.equal(told[name], names[name]) for name in names)


def test_positions_that_contradict_are_refused(loki, settings, attention, tmp_path):
    config = write(tmp_path, settings)

    def refused(*options):
        done = loki("train", config, *options)
        assert done.code == 2
        assert done.err.count("\n") == 1, done.err
        assert not (tmp_path / "adapter").exists()
        return done.err

    error = refused("--positions", attention, "--site-module", "down_proj")
    assert "10.json names rows of o_proj, where down_proj's are wanted: give a file of those" in error
    error = refused("--positions", attention, "--positions", attention)
    assert "10.json names rows of o_proj, as another does: give one of them" in error
    assert "site-module" in refused("--site-module", "up_proj")
    config = write(tmp_path, settings, positions=[])
    assert "positions: value should have at least 1 item" in refused()
    config = write(tmp_path, settings, positions=[3])
    error = refused()
    assert "positions.0: input is not a valid path" in error
    assert error.endswith(", got 3\n")


def test_a_missing_option_is_named(loki):
    done = loki("train", "--model", "m")
    assert done.code == 2
    assert "positions is missing: give --positions, or `positions: …` in a settings file" in done.err


def on_cpu():
    """The environment of several processes on the CPU, also where there is a GPU."""
    return {**os.environ, "ACCELERATE_USE_CPU": "true"}


def errors_of(arguments, tmp_path):
    """What a launch wrote to standard error; it fails rather than hangs."""
    command = [sys.executable, "-m", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=on_cpu(), cwd=tmp_path
    )
    try:
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        kill(process)
    assert process.returncode == 0, errors[-3000:]
    return errors


def kill(process):
    """A launcher and all that it started, each in a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for started in [*psutil.Process(process.pid).children(recursive=True), process]:
            started.kill()
    process.wait()


def test_two_processes_equal_one_with_the_doubled_batch(loki, settings, tmp_path):
    """With examples and texts of different lengths: means are over the tokens of both processes."""
    budget = {"text": settings["data"].replace("own.jsonl", "t.txt"), "every": 2, "probe_accuracy": False}
    (tmp_path / "t.txt").write_text("Water boils at 100 degrees.")
    preserve = {"text": ["Water boils.", "A cat is an animal.", "Two and two is four, and so on."], "weight": 20}
    doubled = write(tmp_path, settings, budget=budget, save_every=2, preserve={**preserve, "batch_size": 2})
    assert loki("train", doubled, "--batch-size", 4, "--output-dir", tmp_path / "one").code == 0
    config = write(tmp_path, settings, budget=budget, save_every=2, preserve={**preserve, "batch_size": 1})
    # Without GPUs it starts several processes only if it is told that there are some.
    accelerate = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    errors = errors_of([*accelerate, "-m", "loki", "train", str(config)], tmp_path)
    assert errors.count("wrote ") == 1
    assert errors.count("note: step 2: per-token loss") == 1
    one, two = (record_of(tmp_path / name) for name in ("one", "adapter"))
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    # The same sums in another order, in float32; AdamW divides by small gradients and makes more of it.
    assert [row["loss"] for row in two["log"]] == pytest.approx([row["loss"] for row in one["log"]], rel=1e-4)
    assert two["budget"]["history"][-1]["kl"] == pytest.approx(one["budget"]["history"][-1]["kl"], rel=1e-3)
    kls = [[row["kl"] for row in record["preserve"]["history"]] for record in (one, two)]
    assert kls[0][1:] == pytest.approx(kls[1][1:], rel=1e-3)
    assert min(kls[0][1:]) > 1e-4
    expected = load_file(tmp_path / "one/adapter_model.safetensors")
    found = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-3 * value.norm(), name
    assert not list(tmp_path.glob("*.unfinished"))


def test_two_processes_that_are_killed_go_on(loki, settings, tmp_path):
    """And end as one that was not interrupted, with the doubled batch; steps enough for the kill to come in time."""
    config = write(tmp_path, settings, steps=30, save_every=10, learning_rate=1e-3)
    with WarmRanks(2, "-m", "loki", "train", config, env=on_cpu(), cwd=tmp_path) as processes:
        waited_until = time.monotonic() + TIMEOUT
        while not (tmp_path / "adapter.unfinished/checkpoint-10/trainer_state.json").exists():
            assert processes.poll() is None, processes.communicate()
            assert time.monotonic() < waited_until
            time.sleep(0.01)
    assert not (tmp_path / "adapter").exists()
    with WarmRanks(2, "-m", "loki", "train", config, env=on_cpu(), cwd=tmp_path) as processes:
        _, errors = processes.communicate(TIMEOUT)
    assert processes.returncode == 0, errors
    assert loki("train", config, "--batch-size", 4, "--output-dir", tmp_path / "one").code == 0
    one, two = (record_of(tmp_path / name) for name in ("one", "adapter"))
    # As above.
    assert [row["loss"] for row in two["log"]] == pytest.approx([row["loss"] for row in one["log"]], rel=1e-4)
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    expected = load_file(tmp_path / "one/adapter_model.safetensors")
    found = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-3 * value.norm(), name
