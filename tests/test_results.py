import json
import math

import pytest

from loki.errors import ArtefactError
from loki.results import SCHEMA_VERSION, Comparison, Measure, Result, finite


def example():
    return Result(
        kind="evaluate",
        settings={"steps": 7, "rule": "riemann_left", "quota": "10"},
        figures={"num_questions": 114, "by_layer": [1, 2]},
        comparisons=(
            Comparison("accuracy", Measure(50.0, 2.5, 114, "%"), Measure(48.0, 2.5, 114, "%"), None, note="114 items"),
            Comparison("loss", None, Measure(1.25, unit="nats"), Measure(-0.5), higher_is_better=False),
        ),
        seed=3,
        model="tiny",
        versions={"torch": "2.6"},
    )


def saved(tmp_path, **changes):
    """A result file in which some values are replaced, or left out where the new value is `None`."""
    path = tmp_path / "result.json"
    example().save(path)
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return path


def test_a_saved_result_is_read_back_with_all_its_types(tmp_path):
    example().save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == example()


def test_a_result_says_which_versions_and_schema_made_it(tmp_path):
    Result("select", {}, {}).save(tmp_path / "result.json")
    values = json.loads((tmp_path / "result.json").read_text())
    assert values["schema_version"] == SCHEMA_VERSION
    assert {"torch", "transformers", "peft"} <= values["versions"].keys()


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, str(SCHEMA_VERSION)])
def test_another_schema_is_refused(tmp_path, version):
    with pytest.raises(ArtefactError, match=rf"another schema: this version reads {SCHEMA_VERSION}; run again"):
        Result.load(saved(tmp_path, schema_version=version))


@pytest.mark.parametrize("text", ["[]", "{}", '{"a": 1}', "3"])
def test_a_file_that_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"result\.json is not a result of loki: name a file such as study\.json"):
        Result.load(tmp_path / "result.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": None},
        {"comparisons": None},
        {"surprise": 1},
        {"comparisons": [{"name": "loss"}]},
        {"comparisons": [3]},
        {"comparisons": 3},
    ],
)
def test_missing_or_surplus_values_are_refused(tmp_path, changes):
    with pytest.raises(ArtefactError, match="is not a result of this version: run again"):
        Result.load(saved(tmp_path, **changes))


def test_a_missing_result_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match=r"result .*none\.json does not exist"):
        Result.load(tmp_path / "none.json")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_never_written(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Result("evaluate", {}, {"loss": value}).save(tmp_path / "result.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        (Measure(12.345, 0.678, 100, "%"), "12.3 ± 0.7 %"),
        (Measure(12.345, unit="%"), "12.3 %"),
        (Measure(-4.26, 1.0, 9, "points"), "-4.3 ± 1.0"),
        (Measure(1.23456, 0.0123, 9, "nats per token"), "1.235 ± 0.012"),
        (Measure(2.0), "2.000"),
    ],
)
def test_text_of_a_measure(measure, text):
    assert str(measure) == text


def test_null_stands_for_what_json_cannot_say():
    value = {"a": [1.5, math.nan], "b": {"c": (math.inf, "text", None)}, "d": -math.inf, "e": 3}
    assert finite(value) == {"a": [1.5, None], "b": {"c": [None, "text", None]}, "d": None, "e": 3}
