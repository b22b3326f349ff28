"""The anchor on texts: its gradients against two plain copies of the model, and that it disturbs nothing else."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import FAMILY_MODELS
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer
from torch.nn import functional as F  # noqa: N812
from transformers import Trainer, TrainerCallback, TrainingArguments

from loki import LokiConfig
from loki.errors import ArtefactError, InputError
from loki.heads import plain_head
from loki.rows import RowSelection
from loki.training import preserve as preserve_module
from loki.training import sft
from loki.training.budget import ForgettingBudget
from loki.training.chunked_divergence import chunked_divergence
from loki.training.preserve import PreservePredictions
from loki.training.settings import TrainSettings
from loki.training.sft import load_record, train

TEXTS = ["Water boils at 100 degrees.", "A cat is an animal; a stone is none.", "Two and two is four."]
EXAMPLES = [
    {"prompt": [{"role": "user", "content": f"say {word}"}], "completion": [{"role": "assistant", "content": word}]}
    for word in ("one", "two", "three", "four", "five", "six", "seven")
]
SETTINGS = TrainSettings(learning_rate=3e-2, steps=6, batch_size=2, save_every=2, log_every=1, seed=3)
LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def selection(positions):
    return RowSelection.from_lists(positions)


def anchor(texts=TEXTS, **options):
    return PreservePredictions(texts, **{"batch_size": 2, "window": 16, **options})


def deltas(directory):
    return load_file(directory / "adapter_model.safetensors")


def require_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def adapted(model, config, seed=1):
    """A model with an adapter that changes its predictions, so that there is a divergence."""
    torch.manual_seed(seed)
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


class Gradients(TrainerCallback):
    """What the optimiser is given at every step."""

    def __init__(self):
        self.at = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.at.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


ROWS = [torch.arange(5 + index, 25 + index) for index in range(8)]


def plain_trainer(tmp_path, model, *callbacks, **changes):
    """A `Trainer` of transformers itself, on texts of equal length."""
    options = {
        **{"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_grad_norm": 0.0},
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False, "save_strategy": "no"},
        **{"logging_steps": 1, "train_sampling_strategy": "sequential"},
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path / "out"), **{**options, **changes}),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in ROWS],
        processing_class=make_tokenizer(),
        callbacks=list(callbacks),
    )


def windows_of(texts=TEXTS, window=16):
    ids = [make_tokenizer()(text).input_ids for text in texts]
    return [part[start : start + window] for part in ids for start in range(0, len(part), window)]


def plain_divergence(base, model, windows):
    """Mean over all positions of KL(base ‖ model), window by window, over the whole logits."""
    total, positions = 0.0, 0
    for ids in windows:
        with torch.no_grad():
            before = base(torch.tensor([ids])).logits[0].log_softmax(-1)
        after = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total = total + F.kl_div(after, before, reduction="sum", log_target=True)
        positions += len(ids)
    return total / positions


def plain_gradients(base, model, *, weight, rows):
    """Gradients of the task's mean loss plus the weighted divergence, with a second copy of the model as base."""
    ids = torch.stack(rows)
    logits = model(ids).logits[:, :-1]
    task = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    (task + weight * plain_divergence(base, model, windows_of())).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


CASES = {
    "llama": ("llama", {}, None),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, None),
    "qwen2-lora": ("qwen2", {}, LORA),
    "gemma2": ("gemma2", {"tie_word_embeddings": True}, None),
    "granite-lora": ("granite", {}, LORA),
    "llama-trained-head": ("llama", {}, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "llama-lora-on-head": ("llama", {}, LoraConfig(r=2, target_modules=["q_proj", "lm_head"])),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_those_of_two_copies(case, accumulate, tmp_path):
    """Gemma 2 caps its logits and Granite divides them; accumulated batches take the anchor once."""
    family, changes, config = CASES[case]
    config = config or LokiConfig(positions=[[7, 1], [0, 15, 3], [5]], task_type="CAUSAL_LM")
    base = FAMILY_MODELS[family].build(vocab_size=260, **changes)
    model = adapted(copy.deepcopy(base), config)
    other = adapted(copy.deepcopy(base), config)
    assert (plain_head(model) is not None) is (case in ("llama", "llama-tied", "qwen2-lora"))
    expected = plain_gradients(base, other, weight=2.5, rows=ROWS[: 2 * accumulate])
    found, kept = Gradients(), anchor(weight=2.5, batch_size=9)
    plain_trainer(tmp_path, model, kept, found, gradient_accumulation_steps=accumulate).train()
    assert found.at[0].keys() == expected.keys()
    total = torch.sqrt(sum(value.square().sum() for value in expected.values()))
    for name, value in expected.items():
        # The same float32 sums in another order, of window after window and of a padded batch.
        assert (found.at[0][name] - value).norm() < 1e-5 * total, name
    divergence = float(plain_divergence(base, other, windows_of()).detach())
    assert divergence > 0.01
    assert kept.history[0]["kl"] == pytest.approx(divergence, rel=1e-4)


def test_every_leaves_the_mean_of_the_gradients_as_it_is(tmp_path):
    """A pass at every second step has twice the weight; the steps between have the task's gradients alone."""
    config = LokiConfig(positions=[[7, 1], [0, 15, 3], [5]], task_type="CAUSAL_LM")
    models = [adapted(make_model(), config) for _ in range(3)]
    found, kept = Gradients(), anchor(batch_size=9, every=2, weight=0.5)
    # Nothing moves, so that all steps are at the same weights.
    plain_trainer(tmp_path, models[0], kept, found, max_steps=4, learning_rate=0.0).train()
    assert [row["step"] for row in kept.history] == [2, 4]
    for step, weight in enumerate([0.0, 1.0]):
        rows = ROWS[2 * step : 2 * step + 2]
        expected = plain_gradients(make_model(), models[step + 1], weight=weight, rows=rows)
        for name, value in expected.items():
            assert (found.at[step][name] - value).norm() < 1e-5 * value.norm(), name


def test_the_sum_of_both_gradients_is_clipped(tmp_path):
    found = Gradients()
    model = adapted(make_model(), LokiConfig(positions=[[7, 1], [0, 3], [5]], task_type="CAUSAL_LM"))
    plain_trainer(tmp_path, model, anchor(weight=1e4), found, max_grad_norm=0.5).train()
    norm = torch.sqrt(sum(value.square().sum() for value in found.at[0].values()))
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"rank": 2}, {"packing": True, "max_length": 40}, {"gradient_checkpointing": True}]
)
def test_it_keeps_the_predictions(tmp_path, tokenizer, selection, changes):
    """The task is learned all the same."""
    settings = replace(SETTINGS, steps=25, save_every=50, **changes)
    divergence, record = {}, {}
    for name, preserve in (("with", anchor(weight=10)), ("without", None)):
        model = make_model()
        record[name] = train(model, tokenizer, selection, EXAMPLES, settings, tmp_path / name, preserve=preserve)
        with torch.no_grad():
            divergence[name] = float(plain_divergence(make_model(), model, windows_of()))
    assert divergence["without"] > 0.01
    assert divergence["with"] < 0.5 * divergence["without"]
    assert record["with"]["log"][-1]["loss"] < 0.9 * record["with"]["log"][0]["loss"]


def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer, selection):
    """To the last bit, with dropout: what is computed again draws the same numbers."""
    for name, checkpointing in (("with", True), ("without", False)):
        settings = replace(SETTINGS, gradient_checkpointing=checkpointing)
        model = make_model(attention_dropout=0.3)
        train(model, tokenizer, selection, EXAMPLES, settings, tmp_path / name, preserve=anchor())
    require_equal(deltas(tmp_path / "with"), deltas(tmp_path / "without"))


def test_the_trainers_random_numbers_are_its_own(tmp_path, tokenizer, selection):
    """With a weight that vanishes the adapter is that of no anchor, to the last bit, although dropout draws numbers."""
    for name, preserve in (("with", anchor(weight=1e-37)), ("without", None)):
        model = make_model(attention_dropout=0.3)
        settings = replace(SETTINGS, rank=2)
        train(model, tokenizer, selection, EXAMPLES, settings, tmp_path / name, preserve=preserve)
    require_equal(deltas(tmp_path / "with"), deltas(tmp_path / "without"))
    state = torch.get_rng_state()
    with preserve_module._own_random_numbers(3, 1):
        first = torch.rand(4)
    with preserve_module._own_random_numbers(3, 2):
        second = torch.rand(4)
    with preserve_module._own_random_numbers(3, 1):
        assert torch.equal(torch.rand(4), first)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_on_in_the_model_and_off_in_the_base(tmp_path):
    """At the start both have the same weights: without dropout nothing is between them."""
    kls = []
    for dropout in (0.0, 0.3):
        model = get_peft_model(make_model(attention_dropout=dropout), LORA)
        kept = anchor()
        plain_trainer(tmp_path, model, kept).train()
        kls.append(kept.history[0]["kl"])
    assert kls[0] == pytest.approx(0, abs=1e-7)
    assert kls[1] > 1e-4


def interrupt(items, what):
    """Progress that ends as the fifth step does, after the checkpoint of the fourth."""
    for item in items:
        if item == 5:
            raise KeyboardInterrupt
        yield item


def without_seconds(record):
    kept = {name: value for name, value in record["preserve"].items() if not name.startswith("seconds")}
    history = [{name: row[name] for name in ("step", "kl")} for row in kept["history"]]
    return {**record, "train_loss": 0, "preserve": {**kept, "history": history}}


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"packing": True, "max_length": 40, "batch_size": 1}, {"batch_size": 3}),
        ({"mixed_precision": True}, {"every": 2}),
    ],
)
def test_an_interrupted_training_ends_equal(tmp_path, tokenizer, selection, changes, options):
    """With dropout, and with more windows than are read before the kill."""
    settings = replace(SETTINGS, steps=8, **changes)

    def run(name, **more):
        model = make_model(attention_dropout=0.3)
        preserve = anchor(window=8, **options)
        return train(model, tokenizer, selection, EXAMPLES, settings, tmp_path / name, preserve=preserve, **more)

    expected = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", track=interrupt)
    found = run("parts")
    assert without_seconds(found) == without_seconds(expected)
    assert found["preserve"]["seconds_per_step"] > found["preserve"]["seconds_per_step_without"] > 0
    require_equal(deltas(tmp_path / "parts"), deltas(tmp_path / "whole"))


def test_a_training_that_was_killed_after_its_last_step_keeps_its_record(tmp_path, tokenizer, selection, monkeypatch):
    expected = train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "whole", preserve=anchor())

    def die(_directory):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sft, "new_directory", die)
        with pytest.raises(KeyboardInterrupt):
            train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "parts", preserve=anchor())
    found = train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "parts", preserve=anchor())
    assert without_seconds(found) == without_seconds(expected)
    assert found["preserve"]["seconds_per_step"] is None
    require_equal(deltas(tmp_path / "parts"), deltas(tmp_path / "whole"))


def test_an_unfinished_training_is_not_finished_with_other_texts(tmp_path, tokenizer, selection):
    def run(preserve, **more):
        train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "a", preserve=preserve, **more)

    with pytest.raises(KeyboardInterrupt):
        run(anchor(), track=interrupt)
    others = (anchor(TEXTS[:2]), anchor(weight=2), anchor(every=2), anchor(batch_size=1), anchor(window=8))
    for preserve in (None, *others, anchor(max_tokens=9)):
        with pytest.raises(ArtefactError, match="unfinished training of other preserve:"):
            run(preserve)
    run(anchor())


def test_the_record_says_what_was_kept_and_what_it_cost(tmp_path, tokenizer, selection, monkeypatch):
    passes = []
    monkeypatch.setattr(
        preserve_module, "chunked_divergence", lambda *args: passes.append(1) or chunked_divergence(*args)
    )
    record = train(
        make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "a", preserve=anchor(every=2, weight=3.0)
    )
    assert record == load_record(tmp_path / "a")
    kept = record["preserve"]
    assert {name: kept[name] for name in ("weight", "every", "batch_size", "window", "max_tokens", "num_tokens")} == {
        **{"weight": 3.0, "every": 2, "batch_size": 2, "window": 16, "max_tokens": 65_536},
        "num_tokens": sum(map(len, windows_of())),
    }
    assert [row["step"] for row in kept["history"]] == [2, 4, 6]
    assert len(passes) == 3
    assert (kept["kl_first"], kept["kl_last"]) == (kept["history"][0]["kl"], kept["history"][-1]["kl"])
    assert kept["kl_first"] > 0
    assert kept["seconds_per_step"] > kept["seconds_per_step_without"] > 0
    # Three passes in six steps.
    spent = sum(row["seconds"] for row in kept["history"])
    assert 6 * (kept["seconds_per_step"] - kept["seconds_per_step_without"]) == pytest.approx(spent)


def test_rows_go_where_one_asks(tmp_path):
    rows = []
    model = adapted(make_model(), LORA)
    kept = anchor(report=rows.append)
    trainer = plain_trainer(tmp_path, model, kept, max_steps=3)
    trainer.train()
    assert rows == kept.history == PreservePredictions.rows_of(trainer.state.log_history)
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_a_budget_watches_the_same_training(tmp_path, tokenizer, selection):
    budget = ForgettingBudget(TEXTS, probe_accuracy=False, every=3)
    record = train(
        *(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "a"),
        **{"budget": budget, "preserve": anchor()},
    )
    assert [row["step"] for row in record["budget"]["history"]] == [0, 3, 6]
    assert [row["step"] for row in record["preserve"]["history"]] == [1, 2, 3, 4, 5, 6]


def test_figures_reach_tensorboard(tmp_path, tokenizer, selection):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = replace(SETTINGS, report_to="tensorboard")
    kept = anchor(every=2)
    train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "a", preserve=kept)
    events = EventAccumulator(str(tmp_path / "a/tensorboard"))
    events.Reload()
    found = events.Scalars("train/preserve/kl")
    assert [event.value for event in found] == pytest.approx([row["kl"] for row in kept.history])
    assert [event.step for event in found] == [2, 4, 6]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_all_windows_are_read_before_one_is_read_again(count):
    kept = anchor(window=8)
    kept.read_with(make_tokenizer())
    num_windows = len(windows_of(window=8))
    assert num_windows > 7
    orders = []
    for seed in (0, 1):
        stream = [index for number in range(2 * num_windows) for index in kept._chosen(seed, number, count)]
        rounds = [stream[start : start + num_windows] for start in range(0, 2 * num_windows, num_windows)]
        assert all(sorted(one) == list(range(num_windows)) for one in rounds)
        assert rounds[0] != rounds[1]
        orders.append(stream)
    assert orders[0] != orders[1]


def test_windows_of_one_token_budget():
    kept = anchor(["abcdefghij", "klmnop"], window=4, max_tokens=7)
    kept.read_with(make_tokenizer())
    # Three predicted tokens in each whole window, then one; the first of each is not predicted.
    assert [len(ids_T) for ids_T in kept._windows] == [4, 4, 2]


def test_virtual_tokens_are_no_positions_of_the_text(tmp_path):
    model = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    total = positions = 0
    with torch.no_grad():
        for ids in map(torch.tensor, windows_of()):
            virtual = model.get_prompt(batch_size=1)
            embedded = torch.cat([virtual, make_model().model.embed_tokens(ids[None])], dim=1)
            after = make_model()(inputs_embeds=embedded).logits[0, 3:].log_softmax(-1)
            before = make_model()(ids[None]).logits[0].log_softmax(-1)
            total += float((before.exp() * (before - after)).sum())
            positions += len(ids)
    kept = anchor(batch_size=9)
    plain_trainer(tmp_path, model, kept).train()
    assert kept.history[0]["kl"] == pytest.approx(total / positions, rel=1e-4)
    assert kept.history[0]["kl"] > 0.01


def test_an_adapter_that_transformers_holds(tmp_path, positions):
    model = make_model()
    model.add_adapter(LokiConfig(positions=positions, task_type="CAUSAL_LM"))
    other = adapted(make_model(), LokiConfig(positions=positions, task_type="CAUSAL_LM"))
    for mine, theirs in zip(
        *([p for p in each.parameters() if p.requires_grad] for each in (model, other)), strict=True
    ):
        mine.data.copy_(theirs.data)
    kept = anchor(batch_size=9)
    plain_trainer(tmp_path, model, kept).train()
    expected = float(plain_divergence(make_model(), other, windows_of()).detach())
    assert kept.history[0]["kl"] == pytest.approx(expected, rel=1e-4)


def test_float16s_scale_is_taken_over(tmp_path):
    """A trainer in float16 multiplies its loss; gradients are divided again when they are all there."""
    model = adapted(make_model(), LORA)
    kept = anchor()
    trainer = plain_trainer(tmp_path, model, kept)
    trainer.state.max_steps = 1
    grads = []
    for scaler in (None, SimpleNamespace(scale=lambda loss: 1024 * loss)):
        model.zero_grad()
        optimizer = SimpleNamespace(scaler=scaler)
        kept.on_step_begin(trainer.args, trainer.state, trainer.control, model=model, optimizer=optimizer)
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0]
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], 1024 * value)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("nowhere.txt", {}, r"preserve: text 'nowhere.txt' cannot be read \(No such file.*\): name a text file"),
        ("nowhere.jsonl", {}, r"'nowhere.jsonl' cannot be read"),
        (["", " "], {}, "preserve: the text is empty: give some text"),
        ([], {}, "preserve: the text is empty: give some text"),
        (TEXTS, {"weight": 0}, "preserve: weight 0 is not possible: give a number above 0"),
        (TEXTS, {"weight": float("nan")}, "preserve: weight nan is not possible"),
        (TEXTS, {"weight": float("inf")}, "preserve: weight inf is not possible"),
        (TEXTS, {"every": 0}, "preserve: every 0 is not possible: give 1 or more"),
        (TEXTS, {"batch_size": 0}, "preserve: batch size 0 is not possible: give 1 or more"),
        (TEXTS, {"window": 1}, "preserve: window 1 is not possible: give 2 or more"),
        (TEXTS, {"max_tokens": 0}, "preserve: max tokens 0 is not possible: give 1 or more"),
        (["x", "y"], {"tokenizer": make_tokenizer()}, "preserve: the text has no two tokens in a row: give a longer"),
    ],
)
def test_impossible_settings(text, options, message):
    with pytest.raises(InputError, match=message):
        PreservePredictions(text, **options)


def test_texts_of_a_file(tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert PreservePredictions(tmp_path / "t.jsonl").texts == TEXTS
    assert len(PreservePredictions("probe").texts) > 8


def test_a_model_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(InputError, match="preserve needs an adapter, because the base is the model with its adapter"):
        plain_trainer(tmp_path, make_model(), anchor())
    late = plain_trainer(tmp_path, make_model())
    late.add_callback(anchor())
    with pytest.raises(InputError, match="preserve needs an adapter"):
        late.train()


def test_a_base_that_moves_is_refused(tmp_path):
    model = get_peft_model(make_model(), LORA)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(InputError, match=r"base_model.model.model.norm.weight is trained outside of the adapter"):
        plain_trainer(tmp_path, model, anchor())


def test_a_pass_that_never_comes_is_refused(tmp_path):
    trainer = plain_trainer(tmp_path, get_peft_model(make_model(), LORA), anchor(every=5), max_steps=4)
    with pytest.raises(InputError, match="every 5 is more than the 4 steps of this training: give 4 or less"):
        trainer.train()


def test_sharded_training_is_refused(tmp_path, monkeypatch):
    kept = anchor()
    trainer = plain_trainer(tmp_path, get_peft_model(make_model(), LORA), kept)
    trainer.state.max_steps = 1
    monkeypatch.setattr(
        "accelerate.state.AcceleratorState", lambda: SimpleNamespace(distributed_type=SimpleNamespace(value="FSDP"))
    )
    with pytest.raises(InputError, match="preserve does not work with FSDP: train in one process or with DDP"):
        kept.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_a_trainer_without_a_tokenizer_needs_one(tmp_path):
    trainer = plain_trainer(tmp_path, get_peft_model(make_model(), LORA))
    with pytest.raises(InputError, match="preserve needs a tokenizer: pass it as tokenizer"):
        anchor().on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    kept = anchor(tokenizer=make_tokenizer())
    kept.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
