"""Settings of `loki train`: YAML, options, and what is refused before anything starts."""

from pathlib import Path

import pytest

from loki.errors import InputError
from loki.training.config import TrainConfig, load_train_config
from loki.training.settings import TrainSettings

LEAST = "model: m\npositions: p.json\noutput_dir: out\nlearning_rate: 1e-3\nsteps: 4\n"


@pytest.fixture
def write(tmp_path):
    def call(text):
        path = tmp_path / "train.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return call


def test_a_file_is_enough(write):
    config = load_train_config(write(LEAST + "packing: true\nbudget: {max_kl: 0.1}\n"), {"model": None, "seed": None})
    assert (config.model, config.positions, config.learning_rate, config.packing) == (
        "m",
        (Path("p.json"),),
        1e-3,
        True,
    )
    assert config.budget is not None
    assert (config.budget.text, config.budget.every, config.budget.action) == ("probe", 20, "stop")


def test_options_are_enough_and_come_before_the_file(write):
    options = {"model": "n", "positions": Path("q.json"), "output_dir": Path("o"), "learning_rate": 2.0, "steps": 1}
    assert load_train_config(None, options).model == "n"
    config = load_train_config(write(LEAST + "packing: true\nseed: 3\n"), {"steps": 9, "packing": False, "seed": None})
    assert (config.model, config.steps, config.packing, config.seed) == ("m", 9, False, 3)


def test_epochs_and_steps_take_the_place_of_each_other(write):
    config = load_train_config(write(LEAST), {"epochs": 1.5})
    assert (config.steps, config.epochs) == (None, 1.5)
    assert (config.settings().steps, config.settings().epochs) == (None, 1.5)
    config = load_train_config(write(LEAST.replace("steps: 4", "epochs: 2")), {"steps": 3, "epochs": None})
    assert (config.steps, config.epochs) == (3, None)


def test_all_settings_of_the_library_can_be_given():
    """And those that are not given have the library's values."""
    config = TrainConfig(model="m", positions="p", output_dir="o", learning_rate=1.0, steps=1)
    assert config.settings() == TrainSettings(learning_rate=1.0, steps=1)
    changed = {"batch_size": 3, "rank": 2, "lora_alpha": 5.0, "answers": "last", "report_to": "tensorboard", "seed": 7}
    assert config.model_copy(update=changed).settings() == TrainSettings(learning_rate=1.0, steps=1, **changed)


def test_a_budget_is_made_of_its_section(write, tmp_path):
    (tmp_path / "t.txt").write_text("some text")
    text = LEAST + (
        f"budget: {{text: {tmp_path / 't.txt'}, max_loss_rise: 0.05, max_kl: 0.1, every: 7, action: lower, "
        "factor: 0.3, probe_accuracy: false, max_tokens: 9}\n"
    )
    section = load_train_config(write(text), {}).budget
    assert section is not None
    found = section.budget().as_dict()
    del found["texts"]
    assert found == {
        **{"num_questions": 0, "max_loss_rise": 0.05, "max_kl": 0.1, "every": 7, "action": "lower", "factor": 0.3},
        **{"max_tokens": 9, "window": 512},
    }


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("model: m\n", {}, "positions is missing: give --positions, or `positions: …` in a settings file"),
        (LEAST, {"steps": "many"}, "options: steps: input should be a valid integer.*, got 'many'"),
        (LEAST + "colour: red\n", {}, r"train.yaml: colour: extra inputs are not permitted, got 'red'"),
        (LEAST + "answers: some\n", {}, r"train.yaml: answers: input should be 'auto', 'all' or 'last', got 'some'"),
        (LEAST + "examples: 0\n", {}, r"train.yaml: examples: input should be greater than or equal to 1, got 0"),
        (LEAST + "budget: {limit: 1}\n", {}, r"train.yaml: budget.limit: extra inputs are not permitted, got 1"),
        (LEAST + "budget: {action: panic}\n", {}, "budget.action: input should be 'stop' or 'lower', got 'panic'"),
        (LEAST + "batch_size: 0\n", {}, "batch size 0 is not possible"),
        (LEAST.replace("steps: 4", ""), {}, r"steps is missing: give steps .*, or epochs"),
        (LEAST + "epochs: 2\n", {}, "steps 4 and epochs 2 are both given: leave one of them out"),
        (LEAST, {"steps": 4, "epochs": 2.0}, "steps 4 and epochs 2 are both given"),
        ("- a\n", {}, "must hold settings by name"),
        ("a: [1", {}, "is not YAML"),
    ],
)
def test_what_is_wrong_is_named(write, text, options, message):
    with pytest.raises(InputError, match=message):
        load_train_config(write(text), options)


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"settings file no.yaml cannot be read: No such file"):
        load_train_config(Path("no.yaml"), {})


def test_texts_to_preserve_are_a_section_an_option_or_both(write, tmp_path):
    (tmp_path / "t.txt").write_text("some text")
    section = f"preserve: {{text: {tmp_path / 't.txt'}, every: 3, batch_size: 2, window: 64, max_tokens: 99}}\n"
    kept = load_train_config(write(LEAST + section), {"preserve": None}).preserve
    assert kept is not None
    expected = {"every": 3, "batch_size": 2, "window": 64, "max_tokens": 99}
    assert kept.model_dump() == {"text": str(tmp_path / "t.txt"), "weight": 1.0, **expected}
    found = kept.preserve()
    assert (found.texts, found.every, found.batch_size, found.window) == (["some text"], 3, 2, 64)
    assert (found.weight, found.max_tokens) == (1.0, 99)
    # Each option takes the place of its own setting.
    both = load_train_config(write(LEAST + section), {"preserve": "other.txt", "preserve_weight": 2.0}).preserve
    assert both is not None
    assert both.model_dump() == {"text": "other.txt", "weight": 2.0, **expected}
    alone = load_train_config(write(LEAST), {"preserve": "other.txt"}).preserve
    assert alone is not None
    assert (alone.text, alone.weight, alone.every) == ("other.txt", 1.0, 1)
    listed = load_train_config(write(LEAST + "preserve: {text: [one text, another]}\n"), {}).preserve
    assert listed is not None
    assert listed.preserve().texts == ["one text", "another"]
    assert load_train_config(write(LEAST), {"preserve": None, "preserve_weight": None}).preserve is None


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {"preserve_weight": 2.0}, r"preserve.text is missing: give --preserve, or `preserve: \{text: …\}` in a"),
        ("preserve: {weight: 2}\n", {}, "preserve.text is missing: give --preserve"),
        ("preserve: {text: t, share: 1}\n", {}, r"settings file .*: preserve.share: extra inputs are not permitted"),
        ("preserve: t.txt\n", {}, r"settings file .*: preserve: input should be a valid dictionary"),
        ("mixed_precision: true\ndtype: bfloat16\n", {}, "mixed precision needs a float32 model, not dtype bfloat16"),
    ],
)
def test_what_cannot_be_preserved(write, text, options, message):
    with pytest.raises(InputError, match=message):
        load_train_config(write(LEAST + text), options)
