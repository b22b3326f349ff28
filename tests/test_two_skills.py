"""`benchmarks/two_skills.py` on a tiny model and invented data: what it compares, and going on where it stopped."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loki.rows import RowSelection

SCRIPT = Path(__file__).parents[1] / "benchmarks/two_skills.py"


@pytest.fixture(scope="module")
def two_skills():
    spec = importlib.util.spec_from_file_location("two_skills", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def request(number):
    parameters = {"type": "dict", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    return {
        "id": f"r{number}",
        "category": "simple",
        "functions": [{"name": f"f{number}", "description": "counts", "parameters": parameters}],
        "messages": [{"role": "user", "content": f"count to {number}"}],
        "answer": f"[f{number}(n={number})]",
        "ground_truth": [{f"f{number}": {"n": [number]}}],
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "toolcall/bfcl_train.jsonl.gz", [request(number) for number in range(12)])
    write_rows(folder / "toolcall/bfcl_test.jsonl.gz", [request(number) for number in range(20, 24)])
    passages = [{"id": f"p{number}", "title": f"t{number}", "text": "word " * number} for number in range(1, 7)]
    write_rows(folder / "rerank/scifact_corpus.jsonl.gz", passages)
    ids = [passage["id"] for passage in passages]
    for name, count in (("train", 8), ("test", 3)):
        queries = [
            {"id": f"{name}{number}", "query": f"query {number}", "positives": [ids[number % 6]], "bm25_top20": ids}
            for number in range(count)
        ]
        write_rows(folder / f"rerank/scifact_{name}.jsonl", queries)
    return folder


def arguments(data, model_dir, folder, **changes):
    values = {
        "data-dir": data,
        "work-dir": folder / "work",
        "output": folder / "two_skills.json",
        "model": model_dir,
        "steps": 2,
        "batch-size": 2,
        "warmup-steps": 0,
        "learning-rate": 0.05,
        "held-out": 2,
        "requests": 3,
        "queries": 2,
        "max-tokens": 2000,
        "max-new-tokens": 3,
        "passage-tokens": 8,
        "dtype": "float32",
        **changes,
    }
    return ["--no-mixed-precision", *(part for name, value in values.items() for part in (f"--{name}", str(value)))]


def run(two_skills, monkeypatch, capsys, given):
    monkeypatch.setattr(sys, "argv", ["two_skills.py", *given])
    capsys.readouterr()
    two_skills.main()
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # of transformers, whose trainer is tested elsewhere
def test_the_whole_experiment(two_skills, data, model_dir, tmp_path, monkeypatch, capsys):
    given = arguments(data, model_dir, tmp_path)
    printed = run(two_skills, monkeypatch, capsys, given)
    saved = json.loads((tmp_path / "two_skills.json").read_text())
    assert json.loads(printed.splitlines()[-1]) == saved
    assert saved["kind"] == "two-skills"
    figures = saved["figures"]
    assert {name: figures["rows"][name] for name in ("a", "b", "in_both")} == {"a": 6, "b": 6, "in_both": 0}
    first, second = (RowSelection.load(tmp_path / f"work/rows_{skill}.json") for skill in "ab")
    assert not any(set(a) & set(b) for a, b in zip(first.rows, second.rows, strict=True))

    bits = {name: values["bits"] for name, values in figures["models"].items()}
    assert bits["a-then-b"] == bits["b-then-a"] == bits["at-once"]
    assert (bits["both-less-a"], bits["both-less-b"], bits["both-less-both"]) == (bits["b"], bits["a"], bits["base"])
    assert len(set(bits.values())) == 4
    assert figures["models"]["both-less-a"]["num_rows"] == 6
    # Training moved something, and each change is the difference of two scores.
    for name, before, after in (
        ("learned by a", "base", "a"),
        ("learned by b", "base", "b"),
        ("by b on top of a", "a", "a-then-b"),
        ("by a on top of b", "b", "a-then-b"),
    ):
        for task, change in figures["changes"][name].items():
            expected = figures["scores"][after][task]["value"] - figures["scores"][before][task]["value"]
            assert change["value"] == pytest.approx(expected, abs=1e-9)
            assert change["low"] <= change["value"] + 1e-9
    assert figures["changes"]["learned by a"]["function-calling_loss"]["value"] < 0
    assert figures["changes"]["learned by b"]["reranking_loss"]["value"] < 0
    assert "| both, function calling uninstalled | " in printed
    assert not list((tmp_path / "work").glob("model_*"))

    # Again: nothing is made anew.
    monkeypatch.setattr(two_skills, "train", None)
    monkeypatch.setattr(two_skills, "merge", None)
    monkeypatch.setattr(two_skills, "score", None)
    run(two_skills, monkeypatch, capsys, given)
    assert json.loads((tmp_path / "two_skills.json").read_text())["figures"] == figures
    with pytest.raises(SystemExit, match="has work of other settings: remove it, or choose another --work-dir"):
        run(two_skills, monkeypatch, capsys, arguments(data, model_dir, tmp_path, steps=3))


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_experiment_goes_on_and_a_difference_stops_it(
    two_skills, data, model_dir, tmp_path, monkeypatch, capsys
):
    given = arguments(data, model_dir, tmp_path)
    merge, done = two_skills.merge, []

    def interrupted(base, adapters, output):
        report = merge(base, adapters, output)
        done.append(output.name)
        if len(done) == 3:
            raise KeyboardInterrupt
        return report

    monkeypatch.setattr(two_skills, "merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(two_skills, monkeypatch, capsys, given)

    def altered(base, adapters, output):
        report = interrupted(base, adapters, output)
        if output.name == "model_at-once":
            tensors = load_file(output / "model.safetensors")
            tensors["model.norm.weight"][3] = torch.nextafter(tensors["model.norm.weight"][3], torch.tensor(9.0))
            save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
        return report

    monkeypatch.setattr(two_skills, "train", None)
    monkeypatch.setattr(two_skills, "merge", altered)
    with pytest.raises(SystemExit, match="both, merged by one command is not bit for bit both"):
        run(two_skills, monkeypatch, capsys, given)
    # The model that was cut short is made again, those before it are not.
    assert done == ["model_a", "model_b", "model_a-then-b", "model_a-then-b", "model_b-then-a", "model_at-once"]
    assert not (tmp_path / "two_skills.json").exists()
