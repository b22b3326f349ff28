"""The forgetting budget: its figures against plain computations, and what it does when it is spent."""

import gzip
import json
import math
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from loki import LokiConfig
from loki.errors import ArtefactError, InputError
from loki.evaluation.knowledge import score_questions
from loki.prompts.questions import load_probe
from loki.rows import RowSelection
from loki.training import budget as budget_module
from loki.training import texts as texts_module
from loki.training.budget import ForgettingBudget, lower_learning_rate
from loki.training.settings import TrainSettings
from loki.training.sft import load_record, train

TEXTS = ["Water boils at 100 degrees.", "A cat is an animal; a stone is none."]
EXAMPLES = [
    {"prompt": [{"role": "user", "content": f"say {word}"}], "completion": [{"role": "assistant", "content": word}]}
    for word in ("one", "two", "three", "four", "five", "six", "seven")
]
SETTINGS = TrainSettings(learning_rate=3e-2, steps=6, batch_size=2, save_every=2, log_every=1, seed=3)


@pytest.fixture
def selection(positions):
    return RowSelection.from_lists(positions)


@pytest.fixture
def few_questions(monkeypatch):
    """Eight of the probe's questions are enough for a tiny model."""
    questions = load_probe("evaluation")[:8]
    for module in (budget_module, texts_module):
        monkeypatch.setattr(module, "load_probe", lambda _split: questions)
    return questions


def watch(texts=TEXTS, **options):
    return ForgettingBudget(texts, **{"probe_accuracy": False, "every": 2, **options})


def distributions(model, ids):
    """Log-probabilities (T−1, V) in float64, by plain transformers."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def movement(base, model, windows):
    """Rise of the loss and KL(base ‖ model), summed token by token."""
    rise = divergence = tokens = 0
    for ids in windows:
        before, after = distributions(base, ids), distributions(model, ids)
        for position, token in enumerate(ids[1:]):
            rise += float(before[position, token] - after[position, token])
            divergence += sum(float(p.exp() * (p - q)) for p, q in zip(before[position], after[position], strict=True))
            tokens += 1
    return rise / tokens, divergence / tokens


def moved_adapter(positions, seed=1):
    """A model with an adapter that changes its predictions."""
    model = get_peft_model(make_model(), LokiConfig(positions=positions, task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.5)
    return model


def plain_trainer(tmp_path, model, *callbacks, **changes):
    """A `Trainer` of transformers itself, on texts of equal length."""
    rows = [torch.arange(5 + index, 25 + index) for index in range(8)]
    options = {
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
        },
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False, "lr_scheduler_type": "linear"},
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path / "out"), **{**options, **changes}),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in rows],
        processing_class=make_tokenizer(),
        callbacks=list(callbacks),
    )


class Weights(TrainerCallback):
    """Keeps a copy of the model at the end of every step."""

    def __init__(self):
        self.at = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}


def test_figures_of_an_adapter_by_hand(tmp_path, positions, tokenizer):
    model = moved_adapter(positions)
    budget = watch(window=16)
    plain_trainer(tmp_path, model, budget, max_steps=1, learning_rate=1e-9).train()
    ids = [tokenizer(text).input_ids for text in TEXTS]
    windows = [part[start : start + 16] for part in ids for start in range(0, len(part), 16)]
    assert [len(part) for part in windows] == [16, 11, 16, 16, 4]
    rise, divergence = movement(make_model(), moved_adapter(positions), windows)
    # Sums of float32 log-probabilities against float64.
    assert budget.history[0] == {
        "step": 0,
        "loss_rise": pytest.approx(rise, rel=1e-4),
        "kl": pytest.approx(divergence, rel=1e-4),
    }
    assert abs(rise) > 0.01
    assert divergence > 0.01


def test_the_loss_is_the_one_of_transformers(tmp_path, positions, tokenizer):
    model = moved_adapter(positions)
    budget = watch(TEXTS[:1])
    plain_trainer(tmp_path, model, budget, max_steps=1, learning_rate=1e-9).train()
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    with torch.no_grad():
        after, before = (float(m(ids, labels=ids).loss) for m in (moved_adapter(positions).eval(), make_model()))
    assert budget.history[0]["loss_rise"] == pytest.approx(after - before, rel=1e-4)


def test_only_so_many_tokens_are_read(tmp_path, positions, tokenizer):
    budget = watch(max_tokens=20, window=16)
    plain_trainer(tmp_path, moved_adapter(positions), budget, max_steps=1, learning_rate=1e-9).train()
    ids = tokenizer(TEXTS[0]).input_ids
    # 15 tokens of the first window are predicted, and 5 of the second.
    rise, _ = movement(make_model(), moved_adapter(positions), [ids[:16], ids[16:22]])
    assert budget.history[0]["loss_rise"] == pytest.approx(rise, rel=1e-4)


def test_a_model_trained_as_a_whole_is_compared_with_its_start(tmp_path, tokenizer):
    model, weights = make_model(), Weights()
    budget = watch()
    trainer = plain_trainer(tmp_path, model, budget, weights)
    trainer.train()
    assert [row["step"] for row in budget.history] == [0, 2, 4]
    windows = [tokenizer(text).input_ids for text in TEXTS]
    for row in budget.history[1:]:
        now = make_model()
        now.load_state_dict(weights.at[row["step"]])
        rise, divergence = movement(make_model(), now, windows)
        # The base is kept in float16: half a unit in its 11th binary digit, over log-probabilities of about −6.
        assert row["loss_rise"] == pytest.approx(rise, abs=2e-3)
        assert row["kl"] == pytest.approx(divergence, rel=5e-3)
        assert row["kl"] > 1e-3
    assert abs(budget.history[0]["kl"]) < 1e-6
    assert [row["kl"] for row in trainer.state.log_history if "kl" in row] == [row["kl"] for row in budget.history]


def test_an_adapter_that_transformers_holds(tmp_path, positions, tokenizer):
    model = make_model()
    model.add_adapter(LokiConfig(positions=positions, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.5)
    budget = watch()
    plain_trainer(tmp_path, model, budget, max_steps=1, learning_rate=1e-9).train()
    expected = watch()
    plain_trainer(tmp_path / "peft", moved_adapter(positions), expected, max_steps=1, learning_rate=1e-9).train()
    assert budget.history[0]["kl"] == pytest.approx(expected.history[0]["kl"], rel=1e-6)
    # The adapter is on again afterwards.
    ids = tokenizer(TEXTS[0]).input_ids
    assert (distributions(model, ids) - distributions(make_model(), ids)).abs().max() > 0.01


def test_probe_accuracy_and_its_standard_error(tmp_path, positions, tokenizer, few_questions):
    budget = watch(probe_accuracy=True)
    plain_trainer(tmp_path, moved_adapter(positions), budget, max_steps=1, learning_rate=1e-9).train()
    scores, _ = score_questions(moved_adapter(positions).eval(), tokenizer, few_questions)
    right = sum(score.right for score in scores)
    assert 0 < right < 8
    assert budget.history[0]["probe_accuracy"] == pytest.approx(100 * right / 8)
    variance = (right * (8 - right) / 8) / 7  # of 0 and 1, with n − 1
    assert budget.history[0]["probe_standard_error"] == pytest.approx(100 * math.sqrt(variance / 8))


def test_measuring_changes_nothing(tmp_path, tokenizer, selection, few_questions):
    """The same adapter to the last bit, with dropout and a low-rank start that draw random numbers."""
    settings = replace(SETTINGS, rank=2)
    for name, budget in (("with", watch(probe_accuracy=True, every=1, max_kl=1e9)), ("without", None)):
        model = make_model(attention_dropout=0.3)
        train(model, tokenizer, selection, EXAMPLES, settings, tmp_path / name, budget=budget)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_model_is_left_as_it_was(positions, tmp_path):
    model = moved_adapter(positions)
    model.train()
    budget = watch()
    trainer = plain_trainer(tmp_path, model, budget)
    budget.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    assert model.training
    assert [name for name, p in model.named_parameters() if p.requires_grad]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("limits", [{"max_kl": 1e-6}, {"max_loss_rise": 1e-9, "max_kl": 1e9}])
def test_a_spent_budget_stops(tmp_path, tokenizer, selection, limits, caplog):
    # At a learning rate that hurts, on a text that has nothing to do with the examples.
    settings = replace(SETTINGS, learning_rate=0.5)
    with caplog.at_level("INFO", logger="loki"):
        record = train(
            make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "adapter", budget=watch(**limits)
        )
    assert [row["step"] for row in record["log"]] == [1, 2]
    assert [row["step"] for row in record["budget"]["history"]] == [0, 2]
    assert record["budget"]["spent"] is True
    assert record["budget"]["max_kl"] == limits["max_kl"]
    assert "step 2: the forgetting budget is spent, training stops" in caplog.text
    assert record == load_record(tmp_path / "adapter")
    # What is saved is the adapter after the second step.
    two = replace(settings, steps=6)
    expected = train_until(tmp_path, tokenizer, selection, two, step=2)
    found = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def train_until(tmp_path, tokenizer, selection, settings, *, step, budget=None):
    """The adapter in the checkpoint of a step."""

    def follow(items, what):
        for item in items:
            if item == step + 1:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        train(
            make_model(),
            *(tokenizer, selection, EXAMPLES, settings, tmp_path / "reference"),
            **{"budget": budget, "track": follow},
        )
    return load_file(tmp_path / f"reference.unfinished/checkpoint-{step}/adapter_model.safetensors")


def test_a_budget_that_is_not_spent_lets_training_end(tmp_path, tokenizer, selection):
    record = train(
        make_model(),
        tokenizer,
        selection,
        EXAMPLES,
        replace(SETTINGS, steps=5),
        tmp_path / "a",
        budget=watch(max_kl=99),
    )
    assert [row["step"] for row in record["budget"]["history"]] == [0, 2, 4, 5]
    assert record["budget"]["spent"] is False
    assert [row["step"] for row in record["log"]] == [1, 2, 3, 4, 5]
    assert record["budget"]["history"][0] == {"step": 0, "loss_rise": 0.0, "kl": 0.0}


def test_a_spent_budget_lowers_the_learning_rate(tmp_path, tokenizer, selection, monkeypatch, caplog):
    used, step = [], torch.optim.AdamW.step

    def follow(optimizer, *arguments):
        used.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", follow)
    budget = watch(max_kl=1e-9, action="lower", factor=0.25)
    with caplog.at_level("INFO", logger="loki"):
        record = train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "a", budget=budget)
    cosine = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    # Measured after steps 2 and 4: a quarter of the schedule from step 3 on, a sixteenth from step 5 on.
    expected = [3e-2 * part * factor for part, factor in zip(cosine, [1, 1, 1 / 4, 1 / 4, 1 / 16, 1 / 16], strict=True)]
    assert [row["learning_rate"] for row in record["log"]] == pytest.approx(expected)
    assert used == pytest.approx(expected)
    assert record["budget"]["spent"] is True
    said = [message.split("spent, ")[1] for message in caplog.messages if "budget is spent" in message]
    assert said == [*["the learning rate is multiplied by 0.25"] * 2, "and training is at its end"]


@pytest.mark.parametrize("options", [{"max_kl": 1e-9, "action": "lower", "factor": 0.25}, {"max_kl": 1e-9, "every": 5}])
def test_an_interrupted_training_with_a_budget_ends_equal(tmp_path, tokenizer, selection, options):
    settings = replace(SETTINGS, steps=8)

    def interrupt(items, what):
        for item in items:
            if item == 5:
                raise KeyboardInterrupt
            yield item

    expected = train(
        make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "whole", budget=watch(**options)
    )
    # Killed at the start of the fifth step, after the checkpoint of the fourth.
    with pytest.raises(KeyboardInterrupt):
        train(
            make_model(),
            *(tokenizer, selection, EXAMPLES, settings, tmp_path / "parts"),
            **{"budget": watch(**options), "track": interrupt},
        )
    found = train(make_model(), tokenizer, selection, EXAMPLES, settings, tmp_path / "parts", budget=watch(**options))
    assert {**found, "train_loss": 0} == {**expected, "train_loss": 0}
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_training_that_was_killed_after_its_budget_stopped_it_ends_there(tmp_path, tokenizer, selection, monkeypatch):
    options = {"max_kl": 1e-9}
    expected = train(
        make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "whole", budget=watch(**options)
    )

    def die(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("peft.PeftModel.save_pretrained", die, raising=True)
        patch.setattr("loki.training.trainer.CompletionTrainer._save", _save_adapter)
        with pytest.raises(KeyboardInterrupt):
            train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "parts", budget=watch(**options))
    assert (tmp_path / "parts.unfinished/checkpoint-2").is_dir()
    found = train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "parts", budget=watch(**options))
    assert {**found, "train_loss": 0} == {**expected, "train_loss": 0}
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_an_unfinished_training_is_not_finished_without_its_budget(tmp_path, tokenizer, selection):
    train_until(tmp_path, tokenizer, selection, SETTINGS, step=2, budget=watch(max_kl=99))
    for budget in (None, watch(max_kl=98)):
        with pytest.raises(ArtefactError, match="unfinished training of other budget"):
            train(make_model(), tokenizer, selection, EXAMPLES, SETTINGS, tmp_path / "reference", budget=budget)


def _save_adapter(trainer, output_dir, state_dict=None):
    """What a checkpoint holds of an adapter, written without `save_pretrained`."""
    from pathlib import Path

    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    Path(output_dir).mkdir(exist_ok=True)
    weights = {name: value.contiguous() for name, value in get_peft_model_state_dict(trainer.model).items()}
    save_file(weights, Path(output_dir) / "adapter_model.safetensors")


def test_a_schedule_is_lowered_for_good():
    """Constant, one that reads `base_lrs`, and one that goes on from the last rate."""
    for schedule, options in (
        ("LambdaLR", {"lr_lambda": lambda step: 1 / (1 + step)}),
        ("ExponentialLR", {"gamma": 0.5}),
    ):
        rates = []
        for factor in (1.0, 0.1):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=8.0)
            scheduler = getattr(torch.optim.lr_scheduler, schedule)(optimizer, **options)
            optimizer.step()
            lower_learning_rate(optimizer, scheduler, factor)
            seen = [optimizer.param_groups[0]["lr"]]
            for _ in range(3):
                optimizer.step()
                scheduler.step()
                seen.append(optimizer.param_groups[0]["lr"])
            rates.append(seen)
        assert rates[1] == pytest.approx([rate * 0.1 for rate in rates[0]])


def test_a_figure_that_is_no_number_spends_the_budget():
    assert watch(max_kl=1.0).spent({"loss_rise": 0.0, "kl": math.nan})
    assert watch(max_loss_rise=0.5).spent({"loss_rise": 0.50001, "kl": 9.0})
    assert not watch(max_loss_rise=0.5).spent({"loss_rise": 0.5, "kl": 9.0})
    assert not watch().spent({"loss_rise": 9.0, "kl": 9.0})


def test_rows_go_where_one_asks(tmp_path, positions):
    rows = []
    budget = watch(report=rows.append)
    plain_trainer(tmp_path, moved_adapter(positions), budget).train()
    assert rows == budget.history
    assert [row["step"] for row in rows] == [0, 2, 4]


def test_texts_may_be_given_in_several_ways(tmp_path, few_questions):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress((tmp_path / "t.jsonl").read_bytes()))
    (tmp_path / "t.txt").write_text(TEXTS[0])
    for path in (tmp_path / "t.jsonl", tmp_path / "t.jsonl.gz", str(tmp_path / "t.jsonl")):
        assert watch(path).texts == TEXTS
    assert watch(tmp_path / "t.txt").texts == TEXTS[:1]
    probe = watch("probe").texts
    assert len(probe) == 8
    first = few_questions[0]
    assert probe[0] == f"Question: {first.question}\nAnswer: {first.choices[first.answer]}"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("nowhere.txt", {}, r"text 'nowhere.txt' cannot be read \(No such file.*\): name a text file, JSON Lines"),
        ("nowhere.jsonl", {}, r"'nowhere.jsonl' cannot be read"),
        (["", " "], {}, "the text is empty"),
        (TEXTS, {"max_kl": 0}, "max KL 0 is not possible: give nats per token above 0"),
        (TEXTS, {"max_loss_rise": math.nan}, "max loss rise nan is not possible"),
        (TEXTS, {"every": 0}, "every 0 is not possible: give 1 or more"),
        (TEXTS, {"window": 1}, "window 1 is not possible: give 2 or more"),
        (TEXTS, {"max_tokens": 0}, "max tokens 0 is not possible"),
        (TEXTS, {"action": "explode"}, "action 'explode' is unknown: give 'stop' or 'lower'"),
        (TEXTS, {"factor": 1}, "factor 1 is not possible: give one between 0 and 1"),
    ],
)
def test_impossible_budgets(text, options, message):
    with pytest.raises(InputError, match=message):
        watch(text, **options)


def test_rows_without_text_are_named(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(InputError, match=r"t.jsonl, line 1: 'text' must be a text"):
        watch(tmp_path / "t.jsonl")


def test_a_text_of_one_token_is_too_short(tmp_path):
    with pytest.raises(InputError, match="the text has no two tokens in a row"):
        plain_trainer(tmp_path, make_model(), watch(["x"]))


def test_a_trainer_without_a_tokenizer_needs_one(tmp_path):
    trainer = plain_trainer(tmp_path, make_model())
    with pytest.raises(InputError, match="needs a tokenizer: pass it as tokenizer"):
        watch().on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    budget = watch(tokenizer=make_tokenizer())
    budget.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_the_base_of_a_resumed_full_training_must_be_known(tmp_path):
    """As the trainer is made, the model is the base; a checkpoint that is loaded later is not."""
    weights, first = Weights(), watch()
    plain_trainer(tmp_path, make_model(), first, weights).train()
    again = watch()
    resumed = plain_trainer(tmp_path, make_model(), again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert again.history == first.history
    late = plain_trainer(tmp_path, make_model())
    late.add_callback(watch())
    with pytest.raises(InputError, match=r"goes on from a checkpoint: pass the budget in Trainer\(callbacks"):
        late.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
