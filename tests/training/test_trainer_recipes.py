"""The recipes of docs/recipes, run on a tiny model, against `loki train` on the same examples."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from loki.rows import RowSelection
from loki.training.examples import load_examples
from loki.training.settings import TrainSettings
from loki.training.sft import train

RECIPES = Path(__file__).parents[2] / "docs/recipes"
POSITIONS = [[7, 1], [0, 19, 3], [5]]
TIMEOUT = 300
"""Seconds; a launch takes about 15 on a quiet machine, and a hang would take days."""


@pytest.fixture
def data(tmp_path):
    """Eight prompts, with completions of one to eight words."""
    rows = [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(1, n + 1)))} for n in range(1, 9)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "10.json").write_text(json.dumps(POSITIONS))
    return path


def options(model_dir, data, tmp_path, *, batch_size=4):
    return [
        *("--model", model_dir, "--positions", tmp_path / "10.json", "--data", data),
        *("--output-dir", tmp_path / "adapter", "--learning-rate", 0.02, "--steps", 4, "--batch-size", batch_size),
    ]


def run_here(monkeypatch, recipe, arguments):
    monkeypatch.setattr(sys, "argv", [recipe, *map(str, arguments)])
    runpy.run_path(str(RECIPES / recipe), run_name="__main__")


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def require_equal(found, expected):
    """The same sums in another order, in float32; AdamW divides by small gradients and makes more of it."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0
        assert (found[name] - value).norm() < 1e-3 * value.norm(), name


@pytest.fixture
def expected(data, tmp_path):
    """What `loki train` makes of the same examples."""
    settings = TrainSettings(learning_rate=0.02, steps=4)
    examples = load_examples(str(data), count=None, seed=0)
    train(make_model(), make_tokenizer(), RowSelection.from_lists(POSITIONS), examples, settings, tmp_path / "expected")
    return adapter(tmp_path / "expected")


# The recipes are written for machines with an accelerator too.
without_accelerator = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@without_accelerator
def test_peft_and_trainer(monkeypatch, capsys, model_dir, data, tmp_path, expected):
    run_here(monkeypatch, "peft_trainer.py", options(model_dir, data, tmp_path))
    require_equal(adapter(tmp_path / "adapter"), expected)
    assert "step 0: per-token loss +0.0000, KL 0.0000" in capsys.readouterr().out
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    for name, weight in make_model().state_dict().items():
        rows = torch.zeros(len(weight), dtype=torch.bool)
        if name.endswith("mlp.down_proj.weight"):
            rows[POSITIONS[int(name.split(".")[2])]] = True
        assert torch.equal(merged[name][~rows], weight[~rows]), name
        if rows.any():
            assert (merged[name][rows] != weight[rows]).any(dim=-1).all(), name


@without_accelerator
def test_trl(monkeypatch, capsys, model_dir, data, tmp_path, expected):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in chats))
    run_here(monkeypatch, "trl_sft.py", options(model_dir, data, tmp_path))
    require_equal(adapter(tmp_path / "adapter"), expected)
    assert "step 4: per-token loss" in capsys.readouterr().out


def test_fsdp2_on_two_processes(model_dir, data, tmp_path):
    arguments = options(model_dir, data, tmp_path, batch_size=2)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *map(str, [RECIPES / "fsdp2.py", *arguments]),
        ],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 4: loss") == 1
    losses, expected = plain_training(data)
    assert [float(line.split()[-1]) for line in done.stdout.splitlines()] == pytest.approx(losses, abs=1e-3)
    require_equal(adapter(tmp_path / "adapter"), expected)


def plain_training(data):
    """Losses and changes of four steps over four examples each, one after the other, in plain torch.

    The change is a dense matrix added to the weight, with a mask; AdamW treats every weight by itself.
    """
    tokenizer, model = make_tokenizer(), make_model()
    start = [layer.mlp.down_proj.weight.detach().clone() for layer in model.model.layers]
    changes = [torch.zeros_like(weight, requires_grad=True) for weight in start]
    optimizer = torch.optim.AdamW(changes, lr=0.02)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    losses = []
    for step in range(4):
        total, num_tokens = 0.0, 0
        for index in range(4 * step, 4 * step + 4):
            row = rows[index % 8]
            prompt = tokenizer(f"<|user|>{row['prompt']}<|end|><|assistant|>").input_ids
            whole = torch.tensor([[*prompt, *tokenizer(f"{row['completion']}<|end|>").input_ids]])
            patched = {
                f"model.layers.{layer}.mlp.down_proj.weight": start[layer]
                + change * torch.isin(torch.arange(20), torch.tensor(POSITIONS[layer]))[:, None]
                for layer, change in enumerate(changes)
            }
            logits = torch.func.functional_call(model, patched, kwargs={"input_ids": whole}).logits
            picked = logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])[len(prompt) - 1 :]
            total, num_tokens = total - picked.sum(), num_tokens + len(picked)
        optimizer.zero_grad()
        (total / num_tokens).backward()
        losses.append(total.item() / num_tokens)
        optimizer.step()
    names = [f"base_model.model.model.layers.{layer}.mlp.down_proj.loki_delta" for layer in range(3)]
    return losses, {
        name: change.detach()[sorted(POSITIONS[layer])]
        for layer, (name, change) in enumerate(zip(names, changes, strict=True))
    }
