"""Training the selected rows with TRL's SFTTrainer, interrupted and not."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import make_model

from loki.errors import ArtefactError, InputError, OutputError
from loki.rows import RowSelection
from loki.training.settings import TrainSettings
from loki.training.sft import RECORD, load_record, train
from loki.training.trainer import CompletionTrainer

EXAMPLES = [
    {
        "prompt": [{"role": "user", "content": f"say {word}"}],
        "completion": [{"role": "assistant", "content": word}],
    }
    for word in ("one", "two", "three", "four", "five", "six", "seven")
]
SETTINGS = TrainSettings(learning_rate=1e-2, steps=6, batch_size=2, save_every=2, log_every=1, seed=3)


@pytest.fixture
def selection(positions):
    return RowSelection.from_lists(positions)


def interrupt(items, what):
    """Progress that ends before the last of six steps."""
    for item in items:
        if item == 5:
            raise KeyboardInterrupt
        yield item


def deltas(directory):
    return load_file(directory / "adapter_model.safetensors")


def test_adapter_and_record_are_left(tmp_path, tokenizer, selection):
    steps = []

    def track(items, what):
        for item in items:
            steps.append((what, item))
            yield item

    record = train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "adapter", track=track)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter"]
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        RECORD,
    ]
    assert record == load_record(tmp_path / "adapter")
    assert record["num_trainable"] == 6 * 24
    assert [row["step"] for row in record["log"]] == [1, 2, 3, 4, 5, 6]
    assert record["log"][-1]["loss"] < record["log"][0]["loss"]
    assert steps == [("training", step) for step in range(6)]
    assert all(delta.abs().max() > 0 for delta in deltas(tmp_path / "adapter").values())


def test_loss_is_on_completions_only(tmp_path, tokenizer, selection):
    """Hand-computed first loss: mean over the completion's bytes and the end token."""
    settings = TrainSettings(learning_rate=1e-9, steps=1, batch_size=1, log_every=1)
    record = train(make_model(), tokenizer, selection, EXAMPLES[:1], settings, tmp_path / "adapter")
    prompt = tokenizer("<|user|>say one<|end|><|assistant|>").input_ids
    whole = torch.tensor([[*prompt, *tokenizer("one<|end|>").input_ids]])
    with torch.no_grad():
        log_probabilities = make_model()(whole).logits[0, :-1].log_softmax(-1)
    expected = -log_probabilities.gather(1, whole[0, 1:, None])[len(prompt) - 1 :].mean()
    # The trainer logs rounded to 4 significant digits.
    assert record["log"][0]["loss"] == pytest.approx(float(expected), rel=1e-3)


def test_interrupted_training_goes_on_and_ends_equal(tmp_path, tokenizer, selection):
    train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "whole")

    with pytest.raises(KeyboardInterrupt):
        train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "parts", track=interrupt)
    assert not (tmp_path / "parts").exists()
    assert (tmp_path / "parts.unfinished/checkpoint-4").is_dir()

    done = []

    def follow(items, what):
        for item in items:
            done.append(item)
            yield item

    record = train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "parts", track=follow)
    assert done == [4, 5]
    assert [row["step"] for row in record["log"]] == [1, 2, 3, 4, 5, 6]
    for name, delta in deltas(tmp_path / "whole").items():
        assert torch.equal(delta, deltas(tmp_path / "parts")[name]), name


@pytest.mark.parametrize("torn", [None, b"", b'{"global_st'])
def test_a_checkpoint_that_was_torn_by_a_kill_is_passed_over(tmp_path, tokenizer, selection, torn):
    train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "whole")

    with pytest.raises(KeyboardInterrupt):
        train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "parts", track=interrupt)
    state = tmp_path / "parts.unfinished/checkpoint-4/trainer_state.json"
    state.unlink()
    if torn is not None:
        state.write_bytes(torn)
    train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "parts")
    for name, delta in deltas(tmp_path / "whole").items():
        assert torch.equal(delta, deltas(tmp_path / "parts")[name]), name


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_is_one_line_and_keeps_earlier_checkpoints(tmp_path, tokenizer, selection, monkeypatch, error):
    save = CompletionTrainer._save_checkpoint

    def fill_disk(trainer, *arguments):
        if trainer.state.global_step == 4:
            raise error
        save(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CompletionTrainer, "_save_checkpoint", fill_disk)
        with pytest.raises(OutputError, match=r"cannot write a checkpoint .* make room and train on"):
            train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "adapter")
    assert (tmp_path / "adapter.unfinished/checkpoint-2").is_dir()
    train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "adapter")


def test_other_errors_of_training_are_not_taken_for_a_full_disk(tmp_path, tokenizer, selection, monkeypatch):
    def fail(*_arguments, **_options):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(CompletionTrainer, "compute_loss", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "adapter")


def test_unfinished_training_of_other_settings_is_refused(tmp_path, tokenizer, selection):
    (tmp_path / "adapter.unfinished").mkdir()
    (tmp_path / "adapter.unfinished/manifest.json").write_text(json.dumps({"settings": {}}))
    with pytest.raises(ArtefactError, match=r"unfinished training of other examples, model, positions, settings"):
        train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "adapter")


def test_existing_output_is_refused(tmp_path, tokenizer, selection):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/file").touch()
    with pytest.raises(OutputError, match="exists already"):
        train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"learning_rate": 0}, "learning rate 0 is not possible"), ({"steps": 0}, "steps 0 is not possible")],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        TrainSettings(**{"learning_rate": 1e-3, "steps": 1, **changes})
