"""Training the selected rows with TRL's SFTTrainer, interrupted and not."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from families import FAMILY_MODELS
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import make_model

from loki.errors import ArtefactError, InputError, OutputError
from loki.rows import RowSelection
from loki.training import sft
from loki.training.budget import ForgettingBudget
from loki.training.encoding import IGNORED, encode_examples
from loki.training.packing import require_kept_apart
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


def interrupt(items, what, at=5):
    """Progress that ends as the step of that number does, before it is logged."""
    for item in items:
        if item == at:
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
    assert record["train_loss"] == pytest.approx(load_record(tmp_path / "whole")["train_loss"], rel=1e-6)
    for name, delta in deltas(tmp_path / "whole").items():
        assert torch.equal(delta, deltas(tmp_path / "parts")[name]), name


@pytest.mark.parametrize("length", [{"steps": 6}, {"steps": None, "epochs": 1.5}, {"steps": None, "epochs": 1}])
def test_a_training_that_was_killed_after_its_last_step_ends_there(tmp_path, tokenizer, selection, monkeypatch, length):
    settings = replace(SETTINGS, **length)
    expected = train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "whole")

    def die(_directory):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sft, "new_directory", die)
        with pytest.raises(KeyboardInterrupt):
            train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "parts")
    found = train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "parts")
    assert found == {**expected, "train_loss": pytest.approx(expected["train_loss"], rel=1e-6)}
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


@pytest.mark.parametrize(("scale", "factor"), [(True, 2**0.83), (False, 1.0)])
def test_the_learning_rate_follows_the_quota(tmp_path, tokenizer, scale, factor):
    """One row of 20 in every layer is a quota of 5 %; a cosine schedule of two steps starts at its peak."""
    settings = TrainSettings(learning_rate=1e-3, steps=2, log_every=1, scale_learning_rate=scale)
    selection = RowSelection.from_lists([[1], [2], [3]])
    record = train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "adapter")
    assert record["quota_percent"] == "5"
    assert record["learning_rate"] == pytest.approx(1e-3 * factor)
    assert record["log"][0]["learning_rate"] == pytest.approx(1e-3 * factor)
    assert record["log"][1]["learning_rate"] == pytest.approx(1e-3 * factor / 2)


def test_a_change_of_low_rank_is_trained(tmp_path, tokenizer, selection):
    settings = TrainSettings(learning_rate=1e-2, steps=2, rank=2, lora_alpha=6)
    record = train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "adapter")
    assert record["num_trainable"] == 6 * 2 + 3 * 2 * 24  # A has the rows of all layers, B is one for each layer
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)


@pytest.mark.parametrize(
    ("changes", "num_steps"),
    [
        ({"epochs": 2}, 8),  # 7 examples are 4 batches of 2
        ({"epochs": 2.5}, 10),
        ({"epochs": 0.1}, 1),
        ({"epochs": 3, "accumulate": 3}, 6),  # 3 and 1 batches a step
        ({"epochs": 2, "packing": True, "max_length": 50, "batch_size": 1}, 6),  # 3 packs of 7 examples
    ],
)
def test_epochs_are_passes_over_the_examples_or_their_packs(tmp_path, tokenizer, selection, changes, num_steps):
    settings = replace(SETTINGS, **{"steps": None, **changes})
    record = train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "adapter")
    assert record["num_steps"] == num_steps
    assert [row["step"] for row in record["log"]] == list(range(1, num_steps + 1))


def test_epochs_train_as_as_many_steps_do(tmp_path, tokenizer, selection):
    """The learning rate's schedule too ends with the last of them."""
    for name, length in (("steps", {"steps": 6}), ("epochs", {"steps": None, "epochs": 1.5})):
        train(make_model(), tokenizer, selection, EXAMPLES, replace(SETTINGS, **length), tmp_path / name)
    logs = [load_record(tmp_path / name)["log"] for name in ("steps", "epochs")]
    assert logs[0] == logs[1]
    assert all(
        torch.equal(delta, deltas(tmp_path / "epochs")[name]) for name, delta in deltas(tmp_path / "steps").items()
    )


def test_interrupted_epochs_go_on_and_end_equal(tmp_path, tokenizer, selection):
    settings = replace(SETTINGS, steps=None, epochs=1.5)
    train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "parts", track=interrupt)
    train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "parts")
    for name, delta in deltas(tmp_path / "whole").items():
        assert torch.equal(delta, deltas(tmp_path / "parts")[name]), name


def packed_loss(model, sequences):
    """Mean over the labelled tokens of examples that are run one by one, and how many there are."""
    losses = []
    for ids, labels in sequences:
        log_probabilities = model(torch.tensor(ids)[None].long()).logits[0, :-1].log_softmax(-1)
        chosen = -log_probabilities.gather(1, torch.tensor(ids)[1:, None].long())[:, 0]
        losses.append(chosen[torch.tensor(labels)[1:] != IGNORED])
    return float(torch.cat(losses).mean())


@torch.no_grad()
def test_packed_examples_give_the_loss_of_each_alone(tmp_path, tokenizer, selection):
    encoded = encode_examples(tokenizer, EXAMPLES)
    expected = packed_loss(make_model(), zip(encoded.input_ids, encoded.labels, strict=True))
    # All seven examples, of 15 to 19 tokens, in three packs of one batch.
    settings = TrainSettings(learning_rate=1e-9, steps=1, batch_size=3, log_every=1, packing=True, max_length=50)
    with torch.enable_grad():
        record = train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "adapter")
    assert sum(map(len, encoded.input_ids)) > 100
    # The trainer logs rounded to 4 significant digits.
    assert record["log"][0]["loss"] == pytest.approx(expected, rel=1e-3)


def test_packing_trains_as_the_same_examples_do_in_one_batch(tmp_path, tokenizer, selection):
    """A step over all examples is the same step, packed or not; what differs is the order of sums in float32."""
    changes = {"learning_rate": 1e-2, "steps": 3, "log_every": 1}
    packed = TrainSettings(batch_size=3, packing=True, max_length=50, **changes)
    train(make_model(), tokenizer, selection, EXAMPLES, packed, tmp_path / "packed")
    train(make_model(), tokenizer, selection, EXAMPLES, TrainSettings(batch_size=7, **changes), tmp_path / "plain")
    for name, delta in deltas(tmp_path / "plain").items():
        assert (delta - deltas(tmp_path / "packed")[name]).norm() < 1e-3 * delta.norm(), name


def test_an_interrupted_training_on_packs_ends_equal(tmp_path, tokenizer, selection):
    settings = replace(SETTINGS, batch_size=1, packing=True, max_length=40)
    train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "parts", track=interrupt)
    train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "parts")
    for name, delta in deltas(tmp_path / "whole").items():
        assert torch.equal(delta, deltas(tmp_path / "parts")[name]), name


@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager")])
def test_models_that_keep_packed_examples_apart(name, attention):
    require_kept_apart(FAMILY_MODELS[name].build(attention=attention))


@pytest.mark.parametrize("name", ["falcon", "falcon-alibi"])
def test_a_model_that_lets_packed_examples_see_each_other_is_refused(name):
    with pytest.raises(InputError, match=r"packing is not possible with this 'falcon' model: .* leave packing out"):
        require_kept_apart(FAMILY_MODELS[name].build(attention="sdpa"))


def test_packing_asks_the_model_before_it_starts(tmp_path, tokenizer, selection, monkeypatch):
    def refuse(_model):
        raise InputError("no")

    monkeypatch.setattr(sft, "require_kept_apart", refuse)
    settings = replace(SETTINGS, packing=True)
    with pytest.raises(InputError, match="no"):
        train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_tensorboard_has_losses_and_forgetting(tmp_path, tokenizer, selection):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = replace(SETTINGS, report_to="tensorboard")
    budget = ForgettingBudget(["some text to watch"], every=2, probe_accuracy=False)
    record = train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "adapter", budget=budget)
    events = EventAccumulator(str(tmp_path / "adapter/tensorboard")).Reload()
    found = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in ("train/loss", "train/forgetting/loss_rise", "train/forgetting/kl")
    }
    assert found["train/loss"] == [(row["step"], pytest.approx(row["loss"])) for row in record["log"]]
    for name in ("loss_rise", "kl"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in record["budget"]["history"]]
        assert found[f"train/forgetting/{name}"] == expected
    assert [step for step, _ in found["train/forgetting/kl"]] == [0, 2, 4, 6]


@pytest.mark.parametrize("torn", [False, True])
def test_tensorboard_shows_each_step_once_after_an_interruption(tmp_path, tokenizer, selection, torn):
    """Steps after the checkpoint are taken twice; where both are torn, all are, and the start is measured again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def start(**options):
        budget = ForgettingBudget(["some text to watch"], every=2, probe_accuracy=False)
        settings = replace(SETTINGS, report_to="tensorboard", steps=8)
        train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "adapter", budget=budget, **options)

    def shown(folder, name):
        return [event.step for event in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars(f"train/{name}")]

    with pytest.raises(KeyboardInterrupt):
        start(track=partial(interrupt, at=6))
    unfinished = tmp_path / "adapter.unfinished"
    assert shown(unfinished, "loss") == [1, 2, 3, 4, 5]
    states = list(unfinished.glob("checkpoint-*/trainer_state.json"))
    assert states
    for state in states if torn else []:
        state.write_bytes(state.read_bytes()[:100])
    start()
    assert shown(tmp_path / "adapter", "loss") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert shown(tmp_path / "adapter", "forgetting/kl") == [0, 2, 4, 6, 8]


def test_tensorboard_that_is_missing_is_told_before_anything_starts(tmp_path, tokenizer, selection, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    settings = replace(SETTINGS, report_to="tensorboard")
    with pytest.raises(InputError, match="tensorboard is not installed: pip install tensorboard, or leave report_to"):
        train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, "rank -1 is not possible: give 0 or more"),
        ({"warmup_steps": -1}, "warmup steps -1 is not possible"),
        ({"max_length": 1}, "max length 1 is not possible: give 2 tokens or more"),
        ({"packing": True, "max_length": None}, "packing needs a max length"),
        ({"lora_alpha": 4}, "lora alpha 4 needs a rank"),
        ({"learning_rate": float("nan")}, "learning rate nan is not possible"),
        ({"learning_rate": 0}, "learning rate 0 is not possible"),
        ({"steps": 0}, "steps 0 is not possible"),
        ({"steps": None}, r"steps is missing: give steps \(of the optimiser\), or epochs \(passes over the examples\)"),
        ({"epochs": 2.0}, "steps 1 and epochs 2 are both given: leave one of them out"),
        ({"steps": None, "epochs": 0}, "epochs 0 is not possible: give a number above 0"),
        ({"steps": None, "epochs": float("nan")}, "epochs nan is not possible"),
        ({"steps": None, "epochs": float("inf")}, "epochs inf is not possible"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        TrainSettings(**{"learning_rate": 1e-3, "steps": 1, **changes})


def test_mixed_precision_takes_products_in_bfloat16_and_trains_in_float32(tmp_path, tokenizer, selection):
    seen = set()

    def follow(_module, _inputs, output):
        seen.add(output.dtype)

    records = {}
    for name, mixed in (("mixed", True), ("plain", False)):
        model = make_model()
        if mixed:
            model.model.layers[0].self_attn.q_proj.register_forward_hook(follow)
        settings = replace(SETTINGS, mixed_precision=mixed)
        records[name] = train(model, tokenizer, selection, EXAMPLES, settings, tmp_path / name)
    assert seen == {torch.bfloat16}
    mixed, plain = deltas(tmp_path / "mixed"), deltas(tmp_path / "plain")
    for name, delta in plain.items():
        assert mixed[name].dtype == torch.float32
        # bfloat16 has eight binary digits; AdamW divides by small gradients and makes more of it.
        assert 0 < (mixed[name] - delta).norm() < 0.2 * delta.norm(), name
    losses = [[row["loss"] for row in records[name]["log"]] for name in ("mixed", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


@pytest.fixture
def lengths(monkeypatch):
    """Lengths of the batches that are trained on."""
    seen = []
    real = CompletionTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **options):
        seen.append(inputs["input_ids"].shape[1])
        return real(self, model, inputs, *args, **options)

    monkeypatch.setattr(CompletionTrainer, "compute_loss", compute_loss)
    return seen


@pytest.mark.parametrize(
    ("mixed", "dtype", "positions_of_model", "step"),
    [
        (True, torch.float32, 128, 32),
        (False, torch.bfloat16, 128, 32),
        (False, torch.float32, 128, 1),
        # A model that knows 100 positions cannot take 128.
        (True, torch.float32, 100, 1),
    ],
)
def test_in_reduced_precision_lengths_are_few(
    tmp_path, tokenizer, selection, lengths, mixed, dtype, positions_of_model, step
):
    model = make_model().to(dtype)
    model.config.max_position_embeddings = positions_of_model
    train(model, tokenizer, selection, EXAMPLES, replace(SETTINGS, mixed_precision=mixed), tmp_path / "adapter")
    assert len(lengths) == SETTINGS.steps
    assert all(length % step == 0 for length in lengths)
    assert any(length % 32 for length in lengths) == (step == 1)


@pytest.mark.parametrize("packing", [False, True])
def test_longer_batches_train_the_same(tmp_path, tokenizer, selection, lengths, packing, monkeypatch):
    settings = replace(SETTINGS, packing=packing, max_length=61)
    for name, step in (("as_they_come", None), ("padded", sft.LENGTH_STEP)):
        monkeypatch.setattr(sft, "_length_step", lambda *_args, step=step: step)
        train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / name)
    as_they_come, padded = lengths[: SETTINGS.steps], lengths[SETTINGS.steps :]
    assert padded == [-(-length // 32) * 32 for length in as_they_come] != as_they_come
    plain = deltas(tmp_path / "as_they_come")
    for name, delta in deltas(tmp_path / "padded").items():
        assert torch.allclose(delta, plain[name], rtol=1e-4, atol=1e-6), name


def test_an_interrupted_training_in_mixed_precision_ends_equal(tmp_path, tokenizer, selection):
    settings = replace(SETTINGS, mixed_precision=True)
    train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "parts", track=interrupt)
    with pytest.raises(ArtefactError, match="unfinished training of other settings"):
        train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "parts")
    train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "parts")
    for name, delta in deltas(tmp_path / "whole").items():
        assert torch.equal(delta, deltas(tmp_path / "parts")[name]), name


def test_mixed_precision_of_a_bfloat16_model_is_refused(tmp_path, tokenizer, selection):
    settings = replace(SETTINGS, mixed_precision=True)
    message = "mixed precision needs a float32 model, and this one is bfloat16: load it as float32, or leave mixed"
    with pytest.raises(InputError, match=message):
        train(make_model().bfloat16(), tokenizer, selection, EXAMPLES, settings, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
