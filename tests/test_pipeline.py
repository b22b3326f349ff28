"""All stages in one run directory: what is left, reused, resumed and refused."""

import json

import h5py
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loki import pipeline, stages
from loki.errors import ArtefactError, InputError
from loki.log.schema import HEADER, LogHeader
from loki.models import load_model
from loki.pipeline import run_pipeline
from loki.provenance import fingerprint_model
from loki.results import Result
from loki.run_settings import RunSettings

STAGE_NAMES = ["analyse", "select", "train", "merge", "evaluate"]


@pytest.fixture
def few_prompts(monkeypatch):
    """Six of the probe's prompts and questions are enough for a tiny model."""
    prompts = stages.load_datasets([stages.DatasetSpec("probe")])[:6]
    questions = stages.load_probe("evaluation")[:6]
    monkeypatch.setattr(stages, "load_datasets", lambda _specs: prompts)
    monkeypatch.setattr(stages, "load_probe", lambda _split: questions)


@pytest.fixture
def settings(tmp_path, model_dir, few_prompts) -> RunSettings:
    return make_settings(model_dir, tmp_path / "run")


def make_settings(model_dir, directory, **changes) -> RunSettings:
    return RunSettings.model_validate(
        {
            "model": str(model_dir),
            "output_dir": directory,
            "analyse": {"steps": 3, "batch_size": 2},
            "select": {"quota": 10},
            "train": {"examples": 8, "learning_rate": 0.01, "steps": 3, "batch_size": 2, "log_every": 1},
            "evaluate": {"task": "function-calls", "requests": 5},
            **changes,
        }
    )


def run_and_follow(settings, **options) -> tuple[Result, dict[str, bool]]:
    finished: dict[str, bool] = {}
    return run_pipeline(settings, announce=finished.__setitem__, **options), finished


def test_a_run_leaves_everything_in_its_directory(settings, model_dir):
    summary, finished = run_and_follow(settings)
    directory = settings.output_dir
    assert finished == dict.fromkeys(STAGE_NAMES, False)
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        [
            *(f"{stage}.json" for stage in STAGE_NAMES),
            *("kva.h5", "10.json", "10.meta.json", "adapter", "merged"),
            *("run.json", "summary.json", "report.html"),
        ]
    )
    assert Result.load(directory / "summary.json") == summary
    assert summary.figures["select"]["num_selected_rows"] == 6  # ⌊10 % of 20⌋ in 3 layers
    assert summary.figures["train"]["num_trainable_weights"] == 6 * 24
    assert summary.figures["evaluate"]["num_weights_changed"] == summary.figures["merge"]["num_changed_weights"]

    rows = json.loads((directory / "10.json").read_text())
    before, after = load_file(model_dir / "model.safetensors"), load_file(directory / "merged/model.safetensors")
    for name, tensor in before.items():
        differs = (tensor != after[name]).reshape(len(tensor), -1).any(dim=1).nonzero().flatten().tolist()
        layer = int(name.split(".")[2]) if "down_proj" in name else None
        assert differs == ([] if layer is None else rows[layer])
    with torch.no_grad():
        AutoModelForCausalLM.from_pretrained(directory / "merged")(torch.tensor([[5, 6]]))


def test_every_shown_number_is_in_the_summary(settings):
    summary, _ = run_and_follow(settings)
    saved = json.loads((settings.output_dir / "summary.json").read_text())
    names = [row["name"] for row in saved["comparisons"]]
    assert names == [row.name for row in summary.comparisons]
    assert {"Knowledge, accuracy", "KL divergence to the base", "Weights changed"} <= set(names)
    report = (settings.output_dir / "report.html").read_text()
    assert all(row.name in report for row in summary.comparisons)


def test_the_report_shows_what_a_budget_saw(tmp_path, model_dir, few_prompts):
    budget = {"max_kl": 1e-9, "every": 2, "probe_accuracy": False, "max_tokens": 20}
    train = {"examples": 8, "learning_rate": 0.01, "epochs": 2, "batch_size": 4, "budget": budget}
    settings = make_settings(model_dir, tmp_path / "run", train=train)
    run_and_follow(settings)
    report = (settings.output_dir / "report.html").read_text().replace("\u2009", " ")
    assert "The budget (KL divergence 1 × 10⁻⁹) was spent at step 2 by the KL divergence, and training stop" in report


def test_a_second_run_reuses_every_stage(settings, monkeypatch):
    first, _ = run_and_follow(settings)
    monkeypatch.setattr(stages.Run, "load_model", lambda *_: pytest.fail("a finished stage ran again"))
    again, finished = run_and_follow(settings)
    assert finished == dict.fromkeys(STAGE_NAMES, True)
    assert again == first


def test_force_runs_every_stage_again_and_finds_the_same(settings):
    first, _ = run_and_follow(settings)
    again, finished = run_and_follow(settings, force=True)
    assert finished == dict.fromkeys(STAGE_NAMES, False)
    assert again.comparisons == first.comparisons


def test_a_lost_file_makes_its_stage_and_those_behind_it_run_again(settings):
    run_and_follow(settings)
    (settings.output_dir / "10.json").unlink()
    _, finished = run_and_follow(settings)
    assert finished == {"analyse": True, "select": False, "train": False, "merge": False, "evaluate": False}


def test_what_a_killed_run_was_writing_aside_is_cleared_away(settings):
    run_and_follow(settings)
    (settings.output_dir / ".kva.h5.x1y2").write_bytes(b"half")
    (settings.output_dir / ".merged.x1y2").mkdir()
    (settings.output_dir / ".gitignore").write_text("mine")
    run_and_follow(settings)
    assert [path.name for path in settings.output_dir.glob(".*")] == [".gitignore"]


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_an_interrupted_run_goes_on_and_ends_equal(tmp_path, model_dir, few_prompts, stage, monkeypatch):
    whole, _ = run_and_follow(make_settings(model_dir, tmp_path / "whole"))

    def interrupt(run):
        raise KeyboardInterrupt

    broken = tuple(
        stages.Stage(s.name, interrupt, s.outputs, s.unfinished) if s.name == stage else s for s in stages.STAGES
    )
    settings = make_settings(model_dir, tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "STAGES", broken)
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(settings)
    assert not (tmp_path / "parts/summary.json").exists()
    parts, finished = run_and_follow(settings)
    assert [name for name, done in finished.items() if done] == STAGE_NAMES[: STAGE_NAMES.index(stage)]
    assert parts.comparisons == whole.comparisons


def test_other_settings_or_another_model_are_refused_but_not_with_force(settings, model_dir, tmp_path):
    run_and_follow(settings)
    changed = make_settings(model_dir, settings.output_dir, select={"quota": 20})
    with pytest.raises(ArtefactError, match=r"other settings \(select.quota 10 there, 20 here\)"):
        run_pipeline(changed)
    summary, _ = run_and_follow(changed, force=True)
    assert summary.figures["select"]["num_selected_rows"] == 12
    assert not (settings.output_dir / "10.json").exists()


def test_a_changed_model_folder_is_noticed(settings, model_dir):
    import os

    run_and_follow(settings)
    weights = model_dir / "model.safetensors"
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    try:
        with pytest.raises(ArtefactError, match=r"model_files .* there"):
            run_pipeline(settings)
    finally:
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_own_examples_are_measured_by_the_loss_of_their_completions(tmp_path, model_dir, few_prompts):
    rows = [json.dumps({"prompt": f"say {word}", "completion": word}) for word in ("one", "two", "three")]
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    own = str(tmp_path / "own.jsonl")
    settings = make_settings(
        model_dir,
        tmp_path / "run",
        train={"data": own, "learning_rate": 0.03, "steps": 6, "batch_size": 3},
        evaluate={"completions": own},
    )
    summary, _ = run_and_follow(settings)
    (loss,) = [row for row in summary.comparisons if row.name == "Task, loss of completions"]
    assert loss.after.value < loss.before.value


def test_changed_examples_are_noticed(tmp_path, model_dir, few_prompts):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": "say one", "completion": "one"}))
    settings = make_settings(model_dir, tmp_path / "run", train={"data": str(own), "learning_rate": 0.01, "steps": 1})
    run_pipeline(settings)
    own.write_text(json.dumps({"prompt": "say two", "completion": "two"}))
    with pytest.raises(ArtefactError, match=r"data_files.*own.jsonl .* there"):
        run_pipeline(settings)


def test_texts_are_preserved(tmp_path, model_dir, few_prompts):
    (tmp_path / "t.jsonl").write_text('{"text": "Water boils at 100 degrees."}\n')
    preserve = {"text": str(tmp_path / "t.jsonl"), "weight": 2.0}
    train = {"examples": 8, "learning_rate": 0.01, "steps": 3, "preserve": preserve}
    settings = make_settings(model_dir, tmp_path / "run", train=train)
    run_and_follow(settings)
    record = json.loads((tmp_path / "run/adapter/loki_training.json").read_text())["preserve"]
    assert (record["weight"], [row["step"] for row in record["history"]]) == (2.0, [1, 2, 3])
    # Other words in the same file are another run.
    (tmp_path / "t.jsonl").write_text('{"text": "Water freezes."}\n')
    with pytest.raises(ArtefactError, match=r"made with other settings \(data_files.*t.jsonl"):
        run_pipeline(settings)


def test_the_texts_of_a_budget_are_checked_before_anything_starts(tmp_path, model_dir, few_prompts):
    train = {"examples": 4, "learning_rate": 0.01, "steps": 1, "budget": {"text": "nowhere.txt", "max_kl": 1.0}}
    with pytest.raises(InputError, match=r"budget: text 'nowhere.txt' cannot be read"):
        run_pipeline(make_settings(model_dir, tmp_path / "run", train=train))
    assert not (tmp_path / "run").exists()


def test_rows_take_steps_by_their_damage(tmp_path, model_dir, few_prompts):
    log = tmp_path / "damage.h5"

    def write_log(scale):
        model = load_model(str(model_dir), dtype="float32")
        header = LogHeader(fingerprint_model(model).as_dict(), "tiny", "texts", {"score": "damage"}, 3, 20)
        with h5py.File(log, "w") as file:
            file.create_dataset("dataset", data=scale * torch.rand(2, 3, 20).numpy(), chunks=(1, 3, 20))
            file.attrs[HEADER] = json.dumps(header.as_dict())

    train = {"examples": 4, "learning_rate": 0.01, "steps": 1, "row_rates": str(log)}
    settings = make_settings(model_dir, tmp_path / "run", train=train)
    with pytest.raises(ArtefactError, match=r"damage.h5 does not exist"):
        run_pipeline(settings)
    assert not (tmp_path / "run").exists()
    write_log(1)
    run_pipeline(settings)
    assert "row_rates" in json.loads((tmp_path / "run/adapter/loki_training.json").read_text())
    write_log(2)
    with pytest.raises(ArtefactError, match=r"made with other settings \(data_files.*damage.h5"):
        run_pipeline(settings)


def test_changed_texts_of_a_budget_are_noticed(tmp_path, model_dir, few_prompts):
    (tmp_path / "t.txt").write_text("Water boils at 100 degrees.")
    budget = {"text": str(tmp_path / "t.txt"), "max_kl": 1.0, "probe_accuracy": False}
    train = {"examples": 4, "learning_rate": 0.01, "steps": 1, "budget": budget}
    settings = make_settings(model_dir, tmp_path / "run", train=train)
    run_pipeline(settings)
    (tmp_path / "t.txt").write_text("Water freezes.")
    with pytest.raises(ArtefactError, match=r"made with other settings \(data_files.*t.txt"):
        run_pipeline(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "nowhere.txt"}, "preserve: text 'nowhere.txt' cannot be read"),
        ({"text": ["x"]}, "preserve: the text has no two tokens in a row"),
        ({"text": "probe", "every": 4}, "preserve: every 4 is more than the 3 steps"),
    ],
)
def test_texts_to_preserve_are_checked_before_anything_starts(tmp_path, model_dir, few_prompts, changes, message):
    train = {"examples": 8, "learning_rate": 0.01, "steps": 3, "preserve": changes}
    with pytest.raises(InputError, match=message):
        run_pipeline(make_settings(model_dir, tmp_path / "run", train=train))
    assert not (tmp_path / "run").exists()
