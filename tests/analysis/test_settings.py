import json
from dataclasses import FrozenInstanceError
from typing import get_args

import pytest

from loki.analysis.quadrature import Rule
from loki.analysis.settings import EngineName, KVASettings, Objective
from loki.architecture import SiteName
from loki.errors import InputError


def test_defaults_are_those_of_the_published_positions():
    assert KVASettings().as_dict() == {
        "rule": "riemann_left",
        "steps": 7,
        "objective": "probability",
        "multiply_by_activation": True,
        "site": "auto",
        "engine": "branch",
        "site_module": "down_proj",
    }


def test_as_dict_is_json_and_makes_the_settings_again():
    settings = KVASettings("gausslegendre", 3, "logit", False, "down_proj", "recompute")
    assert KVASettings(**json.loads(json.dumps(settings.as_dict()))) == settings


@pytest.mark.parametrize(
    ("name", "choices"), [("rule", Rule), ("objective", Objective), ("site", SiteName), ("engine", EngineName)]
)
def test_choices_are_accepted_by_name_and_others_refused_with_the_list(name, choices):
    for value in get_args(choices):
        assert getattr(KVASettings(**{name: value}), name) == value
    for value in ("nonsense", "", None, get_args(choices)[0].upper()):
        with pytest.raises(InputError) as caught:
            KVASettings(**{name: value})
        assert str(caught.value) == f"{name} {value!r} is unknown: choose one of {', '.join(get_args(choices))}"


@pytest.mark.parametrize("rule", get_args(Rule))
def test_too_few_steps_are_refused(rule):
    least = 2 if rule == "riemann_trapezoid" else 1
    assert KVASettings(rule, least).steps == least
    for steps in (least - 1, -3):
        with pytest.raises(InputError, match=f"steps {steps} is too few for the rule {rule}: give {least} or more"):
            KVASettings(rule, steps)


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        KVASettings().steps = 3
