"""`loki dial` on the command line."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_tokenizer

from loki import LokiConfig
from loki.dialling.adapter import DialledAdapter
from loki.dialling.measure import Yardstick
from loki.evaluation.completions import completion_loss
from loki.evaluation.text import Text

EXAMPLES = [
    {"prompt": [{"role": "user", "content": f"say {w}"}], "completion": [{"role": "assistant", "content": w}]}
    for w in ("red", "green", "blue")
]
TEXTS = ["water runs down the hill", "birds fly south in autumn"]


@pytest.fixture
def files(tmp_path):
    """A trained adapter, held-out examples and a text."""
    torch.manual_seed(0)
    model = get_peft_model(make_model(), LokiConfig(positions=[[1, 7], [0, 3, 19], [5]], task_type="CAUSAL_LM"))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(20):
        loss = sum(completion_loss(model, make_tokenizer(), example) for example in EXAMPLES)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


@pytest.fixture
def dial(loki, files, model_dir):
    def run(*options):
        given = ("--model", model_dir, "--completions", files / "held.jsonl", "--text", files / "text.jsonl")
        return loki("dial", files / "adapter", *given, "--points", 2, *options)

    return run


@pytest.mark.parametrize("ways", [[], ["scale", "layers", "rows"]])
def test_the_adapter_that_is_written_is_within_the_budget(dial, files, ways):
    done = dial("--budget", "0.05", "--json", *(part for way in ways for part in ("--by", way)))
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["kind"] == "dial"
    assert {point["by"] for point in result["figures"]["points"]} == set(ways or ["scale"])
    chosen = result["figures"]["chosen"]
    assert chosen["kl"] <= 0.05 < result["figures"]["whole"]["kl"]
    out = files / "adapter-dialled"
    assert {path.name for path in out.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "dial.json",
        "curve.png",
        "curve.svg",
    }
    assert json.loads((out / "dial.json").read_text())["figures"] == result["figures"]
    assert not (files / "adapter-dialled.unfinished").exists()
    # Measured anew, what was written is what was promised.
    adapter = DialledAdapter.load(make_model(), out)
    texts = [Text(str(number), text) for number, text in enumerate(TEXTS)]
    again = Yardstick.of(adapter, make_tokenizer(), EXAMPLES, "text", texts).measure()
    assert again.kl == pytest.approx(chosen["kl"], rel=1e-5)
    assert again.task_loss == pytest.approx(chosen["task_loss"], rel=1e-5)


def test_the_table_names_every_point(dial, files):
    done = dial("--budget", "0.05", "--by", "scale", "--output-dir", files / "out")
    assert "Budget: 0.05 nats of divergence" in done.out
    rows = [line.split() for line in done.out.splitlines() if line.strip().startswith(("base", "scale"))]
    assert rows[0][0] == "base"
    assert len(rows) == 1 + 2 + 4
    assert f"wrote {files / 'out'}: by scale at" in done.err


def test_an_interrupted_dial_goes_on_with_the_same_command(dial, files, monkeypatch):
    real, calls = Yardstick.measure, []

    def interrupt(self, **options):
        calls.append(options["what"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, **options)

    monkeypatch.setattr(Yardstick, "measure", interrupt)
    ways = ("--by", "scale", "--by", "rows")
    done = dial("--budget", "0.05", *ways)
    assert done.code == 130
    assert (files / "adapter-dialled.unfinished/points.json").exists()
    assert not (files / "adapter-dialled").exists()
    other = dial("--budget", "0.06", *ways)
    assert (other.code, "is of a dial with other settings" in other.err) == (2, True)
    assert dial("--budget", "0.05", *ways).code == 0
    assert len(calls) == len(set(calls)) + 1


def test_a_lora_of_the_builtin_task_needs_no_files(loki, model_dir, tmp_path):
    """Whether it helps with that task is another question: here it does by the tokens that all answers share."""
    torch.manual_seed(0)
    model = get_peft_model(make_model(), LoraConfig(r=1, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    from loki.prompts.function_calls import make_examples

    example = make_examples("train", 1, 0)[0].as_prompt_completion()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(15):
        loss = completion_loss(model, make_tokenizer(), example)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(tmp_path / "lora")
    options = ("--model", model_dir, "--examples", 2, "--text-tokens", 100, "--points", 1, "--budget", "500%")
    done = loki("dial", tmp_path / "lora", *options, "--by", "layers", "--by", "scale", "--json")
    assert done.code == 0, done.err
    figures = json.loads(done.out)["figures"]
    assert {point["by"] for point in figures["points"]} == {"scale", "layers"}
    assert np.isfinite(figures["chosen"]["task_loss"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--budget", "little"], "--budget little is not possible: give a rise of the text's perplexity such as 1%"),
        (["--by", "columns"], "--by columns is unknown: give scale, layers, rows"),
        (["--points", "0"], "--points 0 is not possible: give 1 or more"),
        (["--examples", "0"], "--examples 0 is not possible: give 1 or more"),
        (["--window", "1"], "window 1 is not possible: give 2 tokens or more"),
        (["--text", "nowhere.txt"], "--text: text 'nowhere.txt' cannot be read"),
        (["--text", "c4"], "text 'c4' comes from a data folder: give --data-dir"),
        (["--completions", "nowhere.jsonl"], "'nowhere.jsonl' cannot be read"),
        (["--model", "nowhere"], "model folder 'nowhere' does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(dial, files, options, text):
    before = sorted(path.name for path in files.iterdir())
    done = dial(*options)
    assert done.code == 2
    assert text in done.err
    assert done.err.count("\n") == 1
    assert sorted(path.name for path in files.iterdir()) == before


def test_an_output_that_exists_is_left_alone(dial, files):
    (files / "adapter-dialled").mkdir()
    (files / "adapter-dialled/mine").write_text("x")
    done = dial()
    assert (done.code, "exists already: remove it or choose another output folder" in done.err) == (2, True)
    assert (files / "adapter-dialled/mine").read_text() == "x"
