import base64
import json

import numpy as np
import pytest

from loki.log.reader import AttributionLog
from loki.reporting.interactive import map_place, rows_data, subjects_data
from loki.reporting.maps import density_maps
from loki.reporting.survey import survey_log
from loki.rows import RowSelection

TYPES = {"Uint8Array": "<u1", "Uint16Array": "<u2", "Uint32Array": "<u4", "Float32Array": "<f4"}


def unpacked(column):
    return np.frombuffer(base64.b64decode(column["data"]), TYPES[column["type"]])


@pytest.fixture(name="survey")
def make_survey(write_log, tmp_path, scores_NLD):
    with AttributionLog(write_log(tmp_path / "kva.h5", scores_NLD)) as log:
        return survey_log(log)


def test_columns_hold_every_row_layer_by_layer(survey, scores_NLD):
    selection = RowSelection.from_lists([[0, 39], [], [8, 9]])
    stability_LD = np.random.default_rng(0).random((3, 40)).astype(np.float32)
    data = json.loads(rows_data(survey, selection, stability_LD))
    columns = {name: unpacked(column) for name, column in data["columns"].items()}

    assert (data["layers"], data["rows"], data["prompts"]) == (3, 40, 60)
    for name, votes in (
        ("signed_high", survey.high),
        ("signed_low", survey.low),
        ("magnitude_high", survey.high_magnitude),
        ("magnitude_low", survey.low_magnitude),
    ):
        np.testing.assert_array_equal(columns[name].reshape(3, 40), votes.counts_LD)
    np.testing.assert_allclose(columns["mean"].reshape(3, 40), scores_NLD.mean(axis=0, dtype="f8"), rtol=1e-6)
    np.testing.assert_allclose(columns["magnitude"].reshape(3, 40), np.abs(scores_NLD).mean(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(columns["stability"].reshape(3, 40), np.round(stability_LD * 100))
    bits = columns["selected"]
    chosen = [cell for cell in range(120) if bits[cell // 8] >> (7 - cell % 8) & 1]
    assert chosen == [0, 39, 88, 89]


def test_columns_that_are_not_known_are_left_out(survey):
    assert {"selected", "stability"}.isdisjoint(json.loads(rows_data(survey, None, None))["columns"])


def test_words_and_columns_are_those_of_the_score(survey, write_damage_log, tmp_path):
    data = json.loads(rows_data(survey, None, None))
    assert data["words"] == {"score": "attribution", "entries": "prompts"}
    with AttributionLog(write_damage_log(tmp_path / "damage.h5", "damage")) as log:
        data = json.loads(rows_data(survey_log(log), None, None))
    assert data["words"] == {"score": "damage", "entries": "windows"}
    assert list(data["columns"]) == ["signed_high", "signed_low", "mean"]


def test_votes_of_very_many_prompts_take_four_bytes(survey):
    from dataclasses import replace

    many = replace(survey, num_prompts=70_000, high=replace(survey.high, counts_LD=survey.high.counts_LD + 69_000))
    column = json.loads(rows_data(many, None, None))["columns"]["signed_high"]
    assert column["type"] == "Uint32Array"
    np.testing.assert_array_equal(unpacked(column).reshape(3, 40), many.high.counts_LD)


def test_subjects_cannot_end_the_script_element():
    text = subjects_data(np.array([[1.5, 0.5]]), ["</script><b>_x"])
    assert "<" not in text
    data = json.loads(text)
    assert data["names"] == ["</script><b> x"]
    assert data["layers"] == 2
    assert unpacked(data["relative"]).tolist() == [1.5, 0.5]


def test_place_is_in_percent_of_the_drawing():
    picture, _ = density_maps(np.ones((20, 4)), np.ones((20, 4)), None, titles=("a", "b"))
    left, top, width, height = map(float, map_place(picture).split())
    assert left == pytest.approx(100 * 40 / 640)
    assert width == pytest.approx(100 * 456 / 640)
    assert top == pytest.approx(100 * 42 / picture.height, abs=1e-3)
    assert height == pytest.approx(100 * 320 / picture.height, abs=1e-3)
