"""Logs of scores other than KVA: the same writer, plan, shards and resumption, and settings of their own."""

from functools import partial

import numpy as np
import pytest
import torch
from tiny import make_model, make_tokenizer

from loki.analysis import plan
from loki.analysis.row_scores import score_rows
from loki.analysis.run import Analysis, AnalysisOptions, analyse
from loki.analysis.settings import KVASettings, RowScoreSettings
from loki.errors import ArchitectureError, ArtefactError, InputError
from loki.log import AttributionLog, schema
from loki.log.merge import merge_logs
from loki.prompts.prompt import Prompt

TEXTS = ("the tide comes in", "oak", "a stone bridge over a brook", "rain", "seven boats", "north of the wall", "ice")
PROMPTS = [Prompt(f"t{number}", text=text) for number, text in enumerate(TEXTS)]
SETTINGS = RowScoreSettings(seed=5, max_tokens=12)


@pytest.fixture(autouse=True)
def _parts_of_two_prompts(monkeypatch):
    monkeypatch.setattr(plan, "PROMPTS_PER_PART", 2)


@pytest.fixture
def run(tmp_path):
    """Write a log, and give its scores by name."""

    def call(settings=SETTINGS, prompts=PROMPTS, output="log.h5", **options):
        analyse(
            *(make_model(), make_tokenizer(), prompts, settings, tmp_path / output),
            model_name="tiny",
            prompt_set="texts",
            **options,
        )
        return read(tmp_path / output)

    return call


def read(path):
    with AttributionLog(path) as log:
        _, ids = log.prompts()
        return dict(zip(ids, np.concatenate(list(log.chunks())), strict=True))


def ids_of(text):
    return make_tokenizer()(text, return_tensors="pt").input_ids


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(np.array_equal(found[name], expected[name]) for name in expected)


WINDOWS = {
    "t0#1": "the tide ",
    "t0#2": "comes in",
    "t1": "oak",
    "t2#1": "a stone b",
    "t2#2": "ridge ove",
    "t2#3": "r a brook",
    "t3": "rain",
    "t4": "seven boats",
    "t5#1": "north of ",
    "t5#2": "the wall",
    "t6": "ice",
}


@pytest.mark.parametrize("score", ["damage", "fisher", "first_order", "activation_norm"])
@pytest.mark.parametrize("module", ["down_proj", "o_proj"])
def test_the_log_holds_what_score_rows_returns(run, tmp_path, score, module):
    found = run(RowScoreSettings(score, 5, 12, module))
    assert list(found) == list(WINDOWS)
    for name, text in WINDOWS.items():
        expected = score_rows(make_model(), ids_of(text), score=score, seed=5, site_module=module)
        np.testing.assert_array_equal(found[name], expected[0].numpy())
    with AttributionLog(tmp_path / "log.h5") as log:
        assert log.column(schema.NUM_TOKENS).tolist() == [len(text) for text in WINDOWS.values()]
        assert np.isnan(log.column(schema.COMPLETENESS_GAPS)).all()
        targets = log.column(schema.TARGET_IDS)
        if score == "first_order":
            assert targets.tolist() == [int(ids_of(text)[0, -1]) for text in WINDOWS.values()]
        elif score == "activation_norm":
            assert set(targets.tolist()) == {-1}
        else:
            assert len(set(targets.tolist())) > 1
            assert targets.min() >= 0


def test_the_header_has_the_settings_of_the_score_alone(run, tmp_path):
    run()
    run(RowScoreSettings("first_order", 5), output="other.h5")
    with AttributionLog(tmp_path / "log.h5") as log, AttributionLog(tmp_path / "other.h5") as other:
        assert log.header.settings == {"score": "damage", "seed": 5, "max_tokens": 12, "site_module": "down_proj"}
        assert other.header.settings == {"score": "first_order", "max_tokens": 512, "site_module": "down_proj"}


def test_the_header_of_kva_is_as_it_was(tmp_path):
    """Logs and part folders of earlier versions go on: not a key more, in the order that there was."""
    analysis = Analysis.of(
        *(make_model(), make_tokenizer(), PROMPTS, KVASettings(), AnalysisOptions()),
        model_name="tiny",
        prompt_set="texts",
    )
    assert list(analysis.header.settings.items()) == [
        ("rule", "riemann_left"),
        ("steps", 7),
        ("objective", "probability"),
        ("multiply_by_activation", True),
        ("site", "auto"),
        ("engine", "branch"),
        ("site_module", "down_proj"),
        ("target", "predicted"),
    ]
    assert analysis.header.prompts == "texts 8a48d8430f97d1bf"


def interrupt_after(number):
    def track(items, _what, **_):
        for done, item in enumerate(items):
            if done == number:
                raise KeyboardInterrupt
            yield item

    return track


@pytest.mark.parametrize("num_done", [0, 2, 4])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(run, tmp_path, num_done):
    whole = run(output="whole.h5")
    with pytest.raises(KeyboardInterrupt):
        run(track=interrupt_after(num_done))
    seen = []
    found = run(track=lambda items, _what, **_: seen.extend(items) or items)
    assert seen == list(range(num_done, 6))
    assert same(found, whole)


@pytest.mark.parametrize(
    "changed",
    [
        RowScoreSettings("fisher", 5, 12),
        RowScoreSettings("damage", 6, 12),
        RowScoreSettings("damage", 5, 12, "o_proj"),
        RowScoreSettings("damage", 5, 11),
        KVASettings(),
    ],
)
def test_an_unfinished_log_of_another_score_is_refused(run, changed):
    with pytest.raises(KeyboardInterrupt):
        run(track=interrupt_after(1))
    with pytest.raises(ArtefactError, match=r"unfinished log of other .*settings"):
        run(changed)


@pytest.mark.parametrize("batch_size", [3, 100])
def test_batches_change_scores_by_rounding_only(run, batch_size):
    whole = run(output="whole.h5")
    found = run(options=AnalysisOptions(batch_size=batch_size))
    for name, scores_LD in whole.items():
        difference = np.linalg.norm(found[name] - scores_LD, axis=-1) / np.linalg.norm(scores_LD, axis=-1)
        assert difference.max() < 1e-5  # padding changes the order of summation, in float32


def test_shards_merge_into_the_log_of_a_single_run(run, tmp_path):
    whole = run(output="whole.h5")
    for number in (1, 2):
        run(output=f"{number}.h5", options=AnalysisOptions(shard=f"{number}/2"))
    merge_logs([tmp_path / "1.h5", tmp_path / "2.h5"], tmp_path / "merged.h5")
    assert same(read(tmp_path / "merged.h5"), whole)


@pytest.mark.parametrize(
    ("settings", "prompts", "options", "message"),
    [
        (SETTINGS, PROMPTS, {"target": "answer"}, "target 'answer' is for score kva: leave it out"),
        (SETTINGS, PROMPTS, {"max_branches": 3}, "max_branches 3 is for score kva: leave it out"),
        (SETTINGS, PROMPTS, {"log_dtype": "float16"}, "log dtype 'float16' is for score kva: it has no numbers below"),
        (
            RowScoreSettings("first_order"),
            [Prompt("one", text="a")],
            {},
            "prompt 'one' has 1 token, first_order needs a next one: give 2 or more, or another score",
        ),
        (SETTINGS, [], {}, "there are no prompts to analyse: give at least one"),
    ],
)
def test_what_is_refused_before_any_work(run, tmp_path, settings, prompts, options, message):
    with pytest.raises(InputError, match=message):
        run(settings, prompts, options=AnalysisOptions(**options))
    assert not list(tmp_path.iterdir())


def test_windows_longer_than_the_model_takes_are_refused_with_the_option(tmp_path):
    arguments = (make_model(max_position_embeddings=9), make_tokenizer(), [Prompt("long one", text="w" * 30)])
    call = partial(analyse, *arguments, output=tmp_path / "log.h5", model_name="tiny", prompt_set="texts")
    with pytest.raises(InputError, match="prompt 'long one#1' has 10 tokens, the model takes 9: give --max-tokens 9"):
        call(settings=RowScoreSettings(max_tokens=10))
    call(settings=RowScoreSettings(max_tokens=9))
    assert len(read(tmp_path / "log.h5")) == 4


def test_scores_that_overflow_stop_the_run_with_the_windows_name(tmp_path):
    model = make_model()
    torch.nn.init.constant_(model.lm_head.weight, float("inf"))
    with pytest.raises(InputError, match=r"attribution of prompt '.*' is not finite at layer 0, row 0"):
        analyse(
            *(model, make_tokenizer(), PROMPTS, SETTINGS, tmp_path / "log.h5"), model_name="tiny", prompt_set="texts"
        )


def test_a_mixture_of_experts_is_refused(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=260, num_key_value_heads=1, num_local_experts=2, **sizes))
    with pytest.raises(ArchitectureError, match="mixture of experts"):
        analyse(
            *(model, make_tokenizer(), PROMPTS, SETTINGS, tmp_path / "log.h5"), model_name="tiny", prompt_set="texts"
        )
