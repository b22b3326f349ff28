"""The names of the paper's public implementation."""

import inspect
import json

import numpy as np
import pytest
from plain_selection import plain_selection

from loki import constants
from loki.errors import ArtefactError, InputError
from loki.selection import (
    load_attributions_from_hdf5,
    save_positions_to_json,
    select_trainable_nodes_global_highest,
    select_trainable_nodes_global_lowest,
    select_trainable_nodes_layer_balanced,
)

SELECT = {
    "layer_balanced": select_trainable_nodes_layer_balanced,
    "global_lowest": select_trainable_nodes_global_lowest,
    "global_highest": select_trainable_nodes_global_highest,
}
SCORES_NLD = np.random.default_rng(0).normal(size=(5, 3, 16))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("strategy", SELECT)
def test_parity_with_a_plain_sort(strategy, dtype):
    scores_NLD = (SCORES_NLD * 4).astype(dtype)
    rows = SELECT[strategy](scores_NLD, 20)
    assert rows == plain_selection(scores_NLD.tolist(), 20, strategy)
    assert {type(row) for layer in rows for row in layer} == {int}
    assert sum(map(len, rows)) == 9  # 3 of 16 rows in each layer, 9 of 48 in all


def test_double_precision_is_ranked_as_such():
    """In single precision, both rows would tie."""
    assert select_trainable_nodes_layer_balanced(np.array([[[1 + 1e-12, 1.0]]]), 50) == [[1]]


def test_the_scores_are_left_as_they_were():
    scores_NLD = SCORES_NLD.copy()
    for select in SELECT.values():
        select(scores_NLD, "12.5")
    np.testing.assert_array_equal(scores_NLD, SCORES_NLD)


def test_parameters_have_the_public_names():
    for select in SELECT.values():
        assert list(inspect.signature(select).parameters) == ["attribution_scores", "quota"]
    assert list(inspect.signature(load_attributions_from_hdf5).parameters) == ["hdf5_path"]
    parameters = inspect.signature(save_positions_to_json).parameters
    assert list(parameters) == ["positions", "output_path", "create_dirs"]
    assert parameters["create_dirs"].default is True


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 2, 3, 4), (0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_scores_of_another_form_are_refused(shape):
    with pytest.raises(InputError) as caught:
        select_trainable_nodes_layer_balanced(np.zeros(shape), 10)
    assert str(caught.value) == (
        f"attribution scores of shape {shape} and type float64 are not possible: "
        "give finite numbers of shape (prompts, layers, rows), at least one of each"
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_scores_that_are_not_finite_are_refused(bad, dtype):
    scores_NLD = SCORES_NLD.astype(dtype)
    scores_NLD[3, 1, 4] = bad
    with pytest.raises(
        InputError, match=r"shape \(5, 3, 16\) and type float\d\d are not possible: give finite numbers"
    ):
        select_trainable_nodes_global_lowest(scores_NLD, 10)


@pytest.mark.parametrize("scores", [[[["a", "b"]]], [[[None, 1.0]]], [[[True, False]]], [[[1j, 2j]]]])
def test_scores_that_are_no_real_numbers_are_refused(scores):
    with pytest.raises(InputError, match=r"shape \(1, 1, 2\) and type .* are not possible"):
        select_trainable_nodes_global_highest(scores, 50)


@pytest.mark.parametrize(
    ("quota", "message"), [(0, "outside"), ("ten", "is not a number"), (1, "gives no row out of 16")]
)
def test_a_bad_quota_is_refused(quota, message):
    with pytest.raises(InputError, match=message):
        select_trainable_nodes_layer_balanced(SCORES_NLD, quota)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_scores_are_loaded_whole(write_log, monkeypatch, dtype):
    monkeypatch.setattr("loki.log.reader.CHUNK_BYTES", 2 * 4 * 3 * 16)
    scores_NLD = load_attributions_from_hdf5(str(write_log(SCORES_NLD, dtype=dtype)))
    assert scores_NLD.dtype == np.float32
    np.testing.assert_array_equal(scores_NLD, SCORES_NLD.astype(dtype).astype(np.float32))


def test_a_missing_log_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="does not exist"):
        load_attributions_from_hdf5(tmp_path / "kva.h5")


def test_positions_are_saved_sorted_and_folders_made(tmp_path):
    save_positions_to_json([[3, 1], []], tmp_path / "new" / "10.json")
    assert json.loads((tmp_path / "new" / "10.json").read_text()) == [[1, 3], []]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["10.json"]


def test_folders_are_made_only_if_wanted(tmp_path):
    with pytest.raises(InputError, match=r"^folder .*new does not exist: make it, or set create_dirs=True$"):
        save_positions_to_json([[1]], tmp_path / "new" / "10.json", create_dirs=False)
    assert list(tmp_path.iterdir()) == []
    save_positions_to_json([[1]], str(tmp_path / "10.json"), create_dirs=False)
    assert json.loads((tmp_path / "10.json").read_text()) == [[1]]


@pytest.mark.parametrize("positions", [[[1, 1]], [[-1]], [[]], [1, 2]])
def test_what_are_no_positions_is_not_saved(tmp_path, positions):
    with pytest.raises(ArtefactError):
        save_positions_to_json(positions, tmp_path / "10.json")
    assert list(tmp_path.iterdir()) == []


def test_constants_have_the_public_values():
    assert constants.DEFAULT_IG_METHOD == "riemann_trapezoid"
    assert constants.DEFAULT_IG_STEPS == 7
