"""`loki evaluate --tasks`: before and after on benchmarks, as a table, as a file, and as a gate."""

import gzip
import json

import pytest
import torch
from plain_scoring import likeliest
from tiny import make_model, make_tokenizer

from loki.results import Result

WORDS = "lamp", "door", "salt", "snow", "iron", "gold", "bird", "fish", "road", "tree", "moon", "wind"
QUESTIONS = [
    {"id": f"q{index}", "question": f"What is {index}?", "choices": [WORDS[(index + 5 * i) % 12] for i in range(3)]}
    for index in range(12)
]


def moved():
    """The base after some training, as it were: it says something else on some of the questions."""
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.down_proj.weight
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return model


def picked(model, row):
    pairs = [(f"Question: {row['question']}\nAnswer:", f" {choice}") for choice in row["choices"]]
    return likeliest(model, make_tokenizer(), pairs, divisors=[len(choice) for choice in row["choices"]])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Here: ARC-Easy whose answers are what the base says, PIQA whose answers are not, a text, a model `after`."""
    monkeypatch.chdir(tmp_path)
    base = make_model()
    right = [row | {"answer": picked(base, row)} for row in QUESTIONS]
    wrong = [row | {"answer": (row["answer"] + 1) % 3} for row in right]
    data = tmp_path / "data"
    data.mkdir()
    for task, rows in (("arc_easy", right), ("piqa", wrong)):
        (data / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.jsonl").write_text(json.dumps({"id": "t", "text": "The sun is not the moon. " * 3}))
    after = tmp_path / "after"
    moved().save_pretrained(after)
    make_tokenizer().save_pretrained(after)
    return tmp_path


@pytest.fixture
def kept():
    """Share of the questions on which the trained model still says what the base says."""
    base, after = make_model(), moved()
    same = sum(picked(base, row) == picked(after, row) for row in QUESTIONS)
    assert 0 < same < len(QUESTIONS)
    return same / len(QUESTIONS)


@pytest.fixture
def evaluate(loki, folder):
    def call(model, *options):
        return loki("evaluate", model, "--tasks", "arc_easy,piqa", "--data-dir", "data", *options)

    return call


def test_before_and_after(evaluate, folder, model_dir, kept):
    done = evaluate("after", "--base", model_dir, "--text", "text.jsonl", "--output", "result.json")
    assert done.code == 0
    assert "after before and after" in done.out
    lost = 100 * (1 - kept)
    assert f"forgetting {lost:.2f} %" in done.out
    assert f"losses only {lost:.2f} %, {lost:.2f} points lost, over arc_easy" in done.out
    assert "left out, base at chance: piqa" in done.out
    assert "* the model before training is not above chance" in done.out
    assert "33.3 *" in done.out
    assert "wrote result.json" in done.err
    result = Result.load(folder / "result.json")
    arc, piqa, loss, divergence = result.comparisons
    assert [row.name for row in result.comparisons] == ["arc_easy", "piqa", "text_loss", "text_kl"]
    assert (arc.before.value, arc.after.value) == pytest.approx((100, 100 * kept))
    assert (piqa.before.value, divergence.before) == (0, None)
    assert divergence.after.value > 0
    assert loss.after.value != loss.before.value
    assert result.figures["forgetting"]["counted"] == ["arc_easy"]
    assert result.figures["scores"][0]["ids"] == [row["id"] for row in QUESTIONS]


def test_a_model_alone_serves_as_baseline(evaluate, folder, model_dir, kept):
    alone = evaluate(model_dir, "--output", "base.json")
    assert alone.code == 0
    assert "100.0 ± 0.0 %" in alone.out
    assert "forgetting" not in alone.out
    assert "before" not in alone.out
    paired = evaluate("after", "--base", model_dir, "--json")
    told = evaluate("after", "--baseline", "base.json", "--json")
    assert told.code == paired.code == 0
    assert json.loads(told.out)["comparisons"] == json.loads(paired.out)["comparisons"]
    assert json.loads(told.out)["figures"] == json.loads(paired.out)["figures"]
    assert not list(folder.glob("*.parts"))


def test_the_gate(evaluate, model_dir, kept):
    evaluate(model_dir, "--output", "base.json")
    lost = 100 * (1 - kept)
    closed = evaluate("after", "--baseline", "base.json", "--fail-above", "1%")
    assert closed.code == 1
    line = f"loki: forgetting (losses only) is {lost:.2f} %, above 1 %, over arc_easy"
    assert line in closed.err.splitlines()
    assert "forgetting" in closed.out
    assert evaluate("after", "--baseline", "base.json", "--fail-above", "100").code == 0
    assert evaluate(model_dir, "--baseline", "base.json", "--fail-above", "0%").code == 0


def test_any_adapter(evaluate, folder, model_dir):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapter = get_peft_model(
        make_model(), LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter += 0.3 * torch.randn_like(parameter) if "lora_" in name else 0
    adapter.save_pretrained(folder / "lora")
    merged = adapter.merge_and_unload()
    done = evaluate(model_dir, "--adapter", "lora", "--json")
    assert done.code == 0
    arc = json.loads(done.out)["figures"]["scores"][0]["scores"]
    assert arc == [float(picked(merged, row) == picked(make_model(), row)) for row in QUESTIONS]
    assert len(set(arc)) == 2


def test_the_same_command_goes_on(evaluate, folder, model_dir, monkeypatch):
    import loki.evaluation.harness as harness

    monkeypatch.setitem(harness.ITEMS_AT_ONCE, "loglikelihood", 5)
    whole = evaluate(model_dir, "--json").out
    score = harness._score

    def stop_at_piqa(task, *arguments, **options):
        if task.name == "piqa":
            raise KeyboardInterrupt
        return score(task, *arguments, **options)

    monkeypatch.setattr(harness, "_score", stop_at_piqa)
    stopped = evaluate(model_dir, "--output", "result.json")
    assert stopped.code == 130
    assert "the same command goes on where it stopped" in stopped.err
    monkeypatch.setattr(harness, "_score", score)
    done = evaluate(model_dir, "--output", "result.json", "--json")
    assert "arc_easy: 12 of 12 items were scored already" in done.err
    assert json.loads(done.out)["figures"] == json.loads(whole)["figures"]
    assert sorted(path.name for path in folder.glob("result*")) == ["result.json"]


@pytest.fixture
def calls(folder):
    """Two requests that want a call, and one that wants none."""
    function = {"name": "f", "parameters": {"properties": {}}}
    rows = [
        {
            "id": f"r{index}",
            "category": "simple_python",
            "functions": [function],
            "messages": [{"role": "user", "content": f"Number {index}."}],
            "answer": "[f()]" if truth else None,
            "ground_truth": truth,
        }
        for index, truth in enumerate([[{"f": {}}], [{"f": {}}], None])
    ]
    (folder / "data/bfcl_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def says(monkeypatch):
    """Replies by number; the same of both models until the second is asked."""
    replies = [["[f()]", "x", "[]"], ["[f()]", "[f()]", "[f()]"]]
    monkeypatch.setattr(
        "loki.evaluation.bfcl.generate_replies", lambda _model, _tokenizer, conversations, **_: replies.pop(0)
    )


def test_what_is_learned_stands_beside_what_was_known(loki, folder, model_dir, kept, calls, says):
    options = ("--tasks", "bfcl,arc_easy", "--data-dir", "data", "--base", model_dir, "--output", "result.json")
    done = loki("evaluate", "after", *options)
    assert done.code == 0
    lost = 100 * (1 - kept)
    # Refusals fell from 100 to 0 %: that is no knowledge, and the forgetting score has ARC-Easy alone.
    assert f"losses only {lost:.2f} %, {lost:.2f} points lost, over arc_easy" in done.out
    assert "left out" not in done.out
    assert "*" not in done.out
    result = Result.load(folder / "result.json")
    assert {row.name: (row.before.value, row.after.value) for row in result.comparisons} == {
        "arc_easy": (pytest.approx(100), pytest.approx(100 * kept)),
        "bfcl": (pytest.approx(200 / 3), pytest.approx(200 / 3)),
        "bfcl_calls": (50, 100),
        "bfcl_single": (50, 100),
        "bfcl_irrelevance": (100, 0),
    }
    notes = {row.name: row.note for row in result.comparisons}
    assert notes["bfcl_calls"] == "right; 95 % interval of the change +0.0 … +100.0"
    assert "chance" in notes["arc_easy"]
    assert not list(folder.glob("*.parts"))


def test_what_is_learned_alone_needs_no_harness(loki, folder, model_dir, calls, says, monkeypatch):
    monkeypatch.setattr("loki.evaluation.harness._require_lm_eval", lambda: pytest.fail("lm-eval is not needed"))
    options = ("--tasks", "bfcl", "--data-dir", "data")
    alone = loki("evaluate", model_dir, *options, "--output", "base.json")
    assert alone.code == 0
    assert "chance" not in alone.out
    told = loki("evaluate", "after", *options, "--baseline", "base.json")
    assert told.code == 0
    assert "+50.0, +0.0 … +100.0" in told.out
    assert "forgetting" not in told.out


def test_texts_of_the_data_folder_are_named_among_the_tasks_too(loki, folder, model_dir):
    (folder / "data/text").mkdir()
    with gzip.open(folder / "data/text/wikitext2_test.jsonl.gz", "wb") as file:
        file.write((folder / "text.jsonl").read_bytes())
    options = (model_dir, "--base", model_dir, "--data-dir", "data", "--json")
    among = loki("evaluate", *options, "--tasks", "wikitext2,arc_easy")
    apart = loki("evaluate", *options, "--tasks", "arc_easy", "--text", "wikitext2")
    assert among.code == 0
    assert json.loads(among.out) == json.loads(apart.out)
    assert [row["name"] for row in json.loads(among.out)["comparisons"]] == [
        "arc_easy",
        "wikitext2_loss",
        "wikitext2_kl",
    ]
    alone = loki("evaluate", *options, "--tasks", "wikitext2", "--text", "wikitext2")
    assert [row["name"] for row in json.loads(alone.out)["comparisons"]] == ["wikitext2_loss", "wikitext2_kl"]


def test_tasks_are_named_once_or_many_times(loki, folder, model_dir):
    options = ("--tasks", "piqa, arc_easy", "--tasks", "piqa", "--data-dir", "data", "--limit", 3, "--json")
    done = loki("evaluate", model_dir, *options)
    scores = json.loads(done.out)["figures"]["scores"]
    assert [(score["task"], len(score["ids"])) for score in scores] == [("piqa", 3), ("arc_easy", 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--tasks", "arc_hard", "--data-dir", "data"),
            "task 'arc_hard' is unknown: choose from hellaswag, winogrande",
        ),
        (("--tasks", "arc_hard", "--data-dir", "data"), "loki-paper, likelihood, bfcl, acebench, toolace, scifact"),
        (("--tasks", "bfcl"), "task 'bfcl' is scored on local data: give --data-dir"),
        (("--tasks", "bfcl", "--data-dir", "data"), "data has no data for task 'bfcl': it is expected in toolcall/"),
        (("--tasks", "scifact", "--data-dir", "data", "--num-fewshot", "2"), "and scifact shows no examples"),
        (
            ("--tasks", "bfcl", "--data-dir", "data", "--base", "after", "--fail-above", "1%"),
            "--fail-above judges what was known before, and bfcl is what is learned: name a benchmark too",
        ),
        (("--tasks", "sciq", "--data-dir", "data"), "data has no data for task 'sciq': it is expected in"),
        (("--tasks", "arc_easy", "--data-dir", "none"), "data folder 'none' does not exist"),
        (("--tasks", "humaneval", "--data-dir", "data"), "give --allow-code-execution"),
        (("--tasks", ",", "--data-dir", "data"), "no task is named"),
        (("--tasks", "arc_easy", "--data-dir", "data", "--fail-above", "1%"), "give --tasks and --base or --baseline"),
        (
            ("--tasks", "arc_easy", "--base", "after", "--adapter", "x"),
            "--base after and --adapter x exclude each other",
        ),
        (("--tasks", "arc_easy", "--base", "after", "--baseline", "b"), "--baseline b and --base after exclude"),
        (("--tasks", "arc_easy", "--baseline", "no.json"), "result no.json does not exist"),
        (
            ("--tasks", "arc_easy", "--base", "after", "--fail-above", "much"),
            "'much' is no percentage: give one from 0%",
        ),
        (("--tasks", "arc_easy", "--completions", "c.jsonl"), "--completions c.jsonl is not read beside --tasks"),
        (("--text", "wikitext2"), "text 'wikitext2' comes from a data folder: give --data-dir"),
        (("--base", "after", "--limit", "3"), "--limit goes with benchmarks: give --tasks or --text too"),
        (("--base", "after", "--fail-above", "1%"), "--fail-above goes with benchmarks"),
        (("--tasks", "piqa", "--data-dir", "data", "--base", "after", "--fail-above", "1"), "above chance on no task"),
    ],
)
def test_what_is_refused(loki, folder, model_dir, options, message):
    done = loki("evaluate", model_dir, *options)
    assert done.code == 2
    (line,) = [line for line in done.err.splitlines() if line.startswith("loki: ")]
    assert message in line


def test_a_baseline_of_something_else(evaluate, loki, model_dir):
    assert evaluate(model_dir, "--output", "base.json", "--limit", 5).code == 0
    other_items = evaluate("after", "--baseline", "base.json")
    assert other_items.code == 2
    assert "task 'arc_easy' was scored on other items before than after" in other_items.err
    loki("evaluate", model_dir, "--tasks", "piqa", "--data-dir", "data", "--output", "piqa.json")
    other_tasks = evaluate("after", "--baseline", "piqa.json")
    assert other_tasks.code == 2
    assert "no score of task 'arc_easy', only of piqa: evaluate it on the same tasks" in other_tasks.err
