from pathlib import Path

import pytest
import yaml

from loki.analysis.settings import RowScoreSettings
from loki.errors import InputError
from loki.study.settings import load_study, smoke

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
DRAWN = {"strategy": "random"}


def method(**changes):
    return {"m": {"kind": "full", "label": "m", "learning_rates": [1e-3], **changes}}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"methods": {}}, "has no methods: name at least one"),
        ({"methods": method(learning_rates=[])}, "method 'm' needs learning_rates"),
        ({"methods": method(learning_rates=[1e-3, 1e-3])}, "learning_rates must be above 0 and differ"),
        ({"methods": method(learning_rates=[0])}, "learning_rates must be above 0 and differ"),
        ({"methods": method(rows={"strategy": "random"})}, "method 'm' of kind 'full' takes no rows"),
        ({"methods": method(kind="loki")}, "method 'm' of kind 'loki' needs rows"),
        ({"methods": method(kind="lora")}, "method 'm' of kind 'lora' needs a rank of 1 or more"),
        ({"methods": method(variant="dora")}, "variant 'dora' is one of LoRA, not of 'full'"),
        ({"methods": method(kind="lora", rank=4, variant="corda")}, "calibration belongs to variant corda"),
        ({"methods": method(kind="loki", rows={"quota": 10})}, "rows need a log unless their strategy is random"),
        ({"methods": method(kind="loki", rows={"log": "x"})}, "method 'm' names the analysis 'x': there are none"),
        ({"methods": method(kind="loki", rows={"strategy": "random", "quota": 0})}, "quota"),
        ({"methods": method(kind="suppress", rows={"strategy": "random"})}, "method 'm' takes no learning_rates"),
        ({"methods": method(kind="magic")}, "methods.m.kind: input should be 'full', 'lora'"),
        ({"methods": {"../m": method()["m"]}}, "string should match pattern"),
        ({"train": {"steps": 0, "screen_steps": 1}}, "train.steps: input should be greater than or equal to 1, got 0"),
        ({"trian": {}}, "trian: extra inputs are not permitted"),
        ({"data_dir": "nowhere"}, "data folder 'nowhere' does not exist: give --data-dir"),
        ({"methods": method(preserve={})}, "method 'm' takes no preserve: its base is not the model with its adapter"),
        (
            {"methods": method(kind="lora", rank=4, variant="pissa", preserve={})},
            "method 'm' takes no preserve: its base is not the model with its adapter off",
        ),
        (
            {"methods": method(dial={"by": "layers"})},
            "method 'm' takes no dial by layers: LoKI does, and LoRA by layers",
        ),
        ({"methods": method(kind="lora", rank=4, dial={"by": "rows"})}, "method 'm' takes no dial by rows"),
        (
            {"methods": method(kind="lora", rank=4, variant="dora", dial={"by": "layers"})},
            "method 'm' takes no dial by layers",
        ),
        ({"methods": method(damage={"log": "a"})}, "method 'm' takes no damage: only LoKI without a rank does"),
        (
            {"methods": method(kind="loki", rows={"strategy": "random"}, damage={"log": "a"})},
            "method 'm' names the analysis 'a': there are none",
        ),
        (
            {"analyses": {"a": {"corpora": ["c4"], "score": "damage", "steps": 3}}},
            "analysis of score 'damage' has no steps: leave it out",
        ),
        (
            {"analyses": {"a": {"corpora": ["c4"], "score": "luck"}}},
            "analyses.a.score: input should be 'kva', 'damage'",
        ),
        ({"reference": "lora"}, "reference 'lora' is none of its methods: name one of them"),
        ({"pairs": [["full", "lora"]]}, "pairs names 'lora': name two methods that are trained"),
        ({"pairs": [["zeroed", "full"]]}, "pairs names 'zeroed': name two methods that are trained"),
        ({"pairs": [["full"]]}, "pairs.0.1"),
        ({"evaluate": {"scales": [0.5, 0.25]}}, "scales must ascend, not [0.5, 0.25]"),
        ({"evaluate": {"scales": [0.5, 0.5]}}, "scales must ascend, not [0.5, 0.5]"),
        ({"evaluate": {"scales": [1.0]}}, "evaluate.scales.0: input should be less than 1"),
        ({"analyses": {"a": {"corpora": ["mmlu"], "steps": 0}}}, "steps"),
        (
            {
                "analyses": {"a": {"corpora": ["mmlu"]}},
                "methods": method(kind="loki", rows={"log": "a", "site_module": "o_proj"}),
            },
            "method 'm' has rows of o_proj, and the analysis 'a' is of down_proj: give both the same site_module",
        ),
        (
            {
                "analyses": {"a": {"corpora": ["c4"], "score": "damage", "site_module": "o_proj"}},
                "methods": method(kind="loki", rows={"strategy": "random"}, damage={"log": "a"}),
            },
            "method 'm' has rows of down_proj, and the analysis 'a' is of o_proj",
        ),
        (
            {"methods": method(kind="loki", rows=DRAWN, more_rows=DRAWN)},
            "method 'm': more_rows are of another site_module than rows, and go with them",
        ),
        (
            {"methods": method(kind="lora", rank=2, more_rows=DRAWN)},
            "method 'm': more_rows are of another site_module than rows, and go with them",
        ),
        (
            {"methods": method(kind="loki", rows=DRAWN, more_rows={"site_module": "o_proj"})},
            "method 'm': rows need a log unless their strategy is random",
        ),
        (
            {"methods": method(kind="loki", rows=DRAWN, more_rows={"log": "a", "site_module": "o_proj"})},
            "method 'm' names the analysis 'a': there are none",
        ),
        (
            {
                "analyses": {"a": {"corpora": ["mmlu"]}},
                "methods": method(kind="loki", rows=DRAWN, more_rows={"log": "a", "site_module": "o_proj"}),
            },
            "method 'm' has rows of o_proj, and the analysis 'a' is of down_proj: give both the same site_module",
        ),
        (
            {
                "analyses": {"a": {"corpora": ["c4"], "score": "damage"}},
                "methods": method(
                    kind="loki", rows=DRAWN, more_rows={**DRAWN, "site_module": "o_proj"}, damage={"log": "a"}
                ),
            },
            "method 'm' takes no damage: its log is of one site_module, rows and more_rows of two",
        ),
    ],
)
def test_bad_settings_are_named(write_study, changes, text):
    with pytest.raises(InputError) as error:
        load_study(write_study(**changes))
    assert text in str(error.value)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_studies_are_possible(path, tmp_path):
    settings = load_study(path, data_dir=tmp_path)
    assert settings.data_dir == tmp_path
    assert "data_dir" in yaml.safe_load(path.read_text())


@pytest.mark.parametrize(("rates", "every", "is_possible"), [([1, 2], 3, True), ([1, 2], 4, False), ([1], 4, True)])
def test_no_run_is_shorter_than_the_steps_between_passes(write_study, rates, every, is_possible):
    anchored = method(kind="lora", rank=2, preserve={"every": every}, learning_rates=rates)
    path = write_study(train={"steps": 12, "screen_steps": 3}, methods=anchored)
    if is_possible:
        assert smoke(load_study(path)).methods["m"].preserve.every == 1
    else:
        with pytest.raises(InputError, match=r"method 'm': preserve\.every 4 is more than the 3 steps of its shortest"):
            load_study(path)


def test_a_smoke_of_any_score_and_of_a_dial_is_possible(write_study):
    analyses = {
        "damage": {"corpora": ["c4"], "num_prompts": 300, "score": "damage", "site_module": "o_proj"},
        "kva": {"corpora": ["mmlu"], "num_prompts": 400},
    }
    rows = method(kind="loki", rows={"quota": 10, "log": "damage", "site_module": "o_proj"}, dial={"by": "rows"})
    small = smoke(load_study(write_study(analyses=analyses, methods=rows)))
    assert small.analyses["damage"].settings() == RowScoreSettings("damage", site_module="o_proj")
    assert small.analyses["kva"].settings().steps == 2
    assert [analysis.num_prompts for analysis in small.analyses.values()] == [2, 2]
    assert small.methods["m"].dial.text_tokens == 64
