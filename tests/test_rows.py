import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loki.errors import ArtefactError, InputError
from loki.rows import RowSelection, load_by_module, load_meta, meta_path, module_of

row_lists = st.lists(st.lists(st.integers(0, 999), unique=True, max_size=8), min_size=1, max_size=5).filter(any)


@settings(deadline=None)
@given(row_lists)
def test_rows_are_sorted_and_otherwise_kept(lists):
    selection = RowSelection.from_lists(lists)
    assert selection.as_lists() == [sorted(rows) for rows in lists]
    assert selection.num_layers == len(lists)
    assert selection.num_selected == sum(len(rows) for rows in lists)


def test_order_of_the_published_files_does_not_matter():
    assert RowSelection.from_lists([[5, 0, 3], []]) == RowSelection.from_lists([[0, 3, 5], []])


@pytest.mark.parametrize("lists", [{"0": [1]}, "12", 3, None, [[1], 2], [[1], "2"], [1, 2], [[1], {"2": 3}]])
def test_anything_but_a_list_of_lists_is_refused(lists):
    with pytest.raises(ArtefactError, match=r"positions must be a list with one list of row indices for each layer"):
        RowSelection.from_lists(lists)


@pytest.mark.parametrize("row", [-1, 1.0, "1", True, None, [1]])
def test_anything_but_a_row_index_is_refused_with_its_layer(row):
    with pytest.raises(ArtefactError, match=r"layer 1 has .*which is not a row index") as caught:
        RowSelection.from_lists([[0], [2, row]])
    assert repr(row) in str(caught.value)


def test_a_row_named_twice_is_refused_by_name():
    with pytest.raises(ArtefactError, match=r"my file: layer 1 names row 7 twice"):
        RowSelection.from_lists([[7], [4, 7, 9, 7]], what="my file")


@pytest.mark.parametrize("lists", [[], [[]], [[], []]])
def test_no_row_at_all_is_refused(lists):
    with pytest.raises(ArtefactError, match="name no row at all; select with a larger quota"):
        RowSelection.from_lists(lists)


def test_a_saved_selection_is_read_back(tmp_path):
    selection = RowSelection.from_lists([[4, 1], [], [0]])
    selection.save(tmp_path / "new" / "10.json")
    assert json.loads((tmp_path / "new" / "10.json").read_text()) == [[1, 4], [], [0]]
    assert RowSelection.load(tmp_path / "new" / "10.json") == selection


def test_provenance_stands_beside_the_positions(tmp_path):
    path = tmp_path / "10.json"
    RowSelection.from_lists([[0]]).save(path, meta={"quota_percent": "10"})
    assert meta_path(path) == tmp_path / "10.meta.json"
    assert json.loads((tmp_path / "10.meta.json").read_text()) == {"quota_percent": "10"}
    assert load_meta(path) == {"quota_percent": "10"}


@pytest.mark.parametrize(
    ("name", "expected"), [("10.json", "10.meta.json"), ("0.5.json", "0.5.meta.json"), ("rows", "rows.meta.json")]
)
def test_name_of_the_provenance_file(tmp_path, name, expected):
    assert meta_path(tmp_path / name) == tmp_path / expected


def test_positions_without_provenance_have_none(tmp_path):
    path = tmp_path / "10.json"
    RowSelection.from_lists([[0]]).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["10.json"]
    assert load_meta(path) is None


def test_saving_over_positions_leaves_no_provenance_of_the_old_ones(tmp_path):
    path = tmp_path / "10.json"
    RowSelection.from_lists([[0]]).save(path, meta={"strategy": "layer_balanced"})
    RowSelection.from_lists([[1]]).save(path)
    assert load_meta(path) is None


def test_provenance_must_be_an_object(tmp_path):
    (tmp_path / "10.meta.json").write_text("[1]")
    with pytest.raises(ArtefactError, match=r"10\.meta\.json must be a JSON object"):
        load_meta(tmp_path / "10.json")


@pytest.mark.parametrize(
    ("text", "words"), [("[[0], [1", "is not JSON"), ("[[0, 0]]", r"bad\.json: layer 0 names row 0 twice")]
)
def test_a_damaged_positions_file_is_refused_with_its_path(tmp_path, text, words):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ArtefactError, match=words):
        RowSelection.load(tmp_path / "bad.json")


def test_a_missing_positions_file_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match=r"positions file .*10\.json does not exist"):
        RowSelection.load(tmp_path / "10.json")


@settings(deadline=None)
@given(row_lists)
def test_a_mask_marks_the_rows_and_no_others(lists):
    mask_LD = RowSelection.from_lists(lists).as_mask(1000)
    assert mask_LD.shape == (len(lists), 1000)
    assert mask_LD.dtype == bool
    assert [np.flatnonzero(mask_D).tolist() for mask_D in mask_LD] == [sorted(rows) for rows in lists]


def test_rows_that_exist_fit():
    RowSelection.from_lists([[0, 7], []]).require_fit(num_layers=2, num_rows=8)


def test_another_number_of_layers_does_not_fit():
    with pytest.raises(ArtefactError, match=r"have 2 layers, the model has 3: use the positions .* for this model"):
        RowSelection.from_lists([[0], [1]]).require_fit(num_layers=3, num_rows=8)


def test_the_first_row_beyond_the_model_does_not_fit():
    with pytest.raises(ArtefactError, match=r"layer 1 names row 8, but the model's rows are 0 to 7"):
        RowSelection.from_lists([[7], [8, 0]]).require_fit(num_layers=2, num_rows=8)


def save(path, settings):
    """Positions whose log had these settings; None is a file without provenance, `{}` of before there was a choice."""
    meta = None if settings is None else {"log": {"settings": settings}}
    RowSelection.from_lists([[0]]).save(path, meta=meta)
    return path


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        (None, None, "down_proj"),
        (None, "o_proj", "o_proj"),
        ({}, None, "down_proj"),
        ({"site_module": "o_proj"}, None, "o_proj"),
        ({"site_module": "o_proj"}, "o_proj", "o_proj"),
        ({"site_module": "down_proj"}, None, "down_proj"),
    ],
)
def test_whose_rows_a_file_names(tmp_path, settings, given, expected):
    assert module_of(save(tmp_path / "p.json", settings), given) == expected


def test_provenance_without_a_log_says_nothing(tmp_path):
    """Random rows have none."""
    RowSelection.from_lists([[0]]).save(tmp_path / "p.json", meta={"strategy": "random"})
    assert module_of(tmp_path / "p.json", "o_proj") == "o_proj"


@pytest.mark.parametrize("settings", [{}, {"site_module": "down_proj"}])
def test_rows_of_another_projection_are_refused(tmp_path, settings):
    path = save(tmp_path / "p.json", settings)
    with pytest.raises(InputError, match="names rows of down_proj, where o_proj's are wanted: give a file of those"):
        module_of(path, "o_proj")


@pytest.mark.parametrize("module", ["up_proj", ["o_proj"], None, 3])
def test_provenance_of_an_unknown_projection(tmp_path, module):
    with pytest.raises(ArtefactError, match="does not say whose rows they are: select again, or remove it"):
        module_of(save(tmp_path / "p.json", {"site_module": module}))


@pytest.mark.parametrize("log", [3, [], "damaged", {"settings": None}, {"settings": ["o_proj"]}])
def test_damaged_provenance_of_a_projection(tmp_path, log):
    RowSelection.from_lists([[0]]).save(tmp_path / "p.json", meta={"log": log})
    with pytest.raises(ArtefactError, match="does not say whose rows they are"):
        module_of(tmp_path / "p.json")


def test_files_of_both_projections(tmp_path):
    ffn, attention = save(tmp_path / "a.json", {}), save(tmp_path / "b.json", {"site_module": "o_proj"})
    silent = save(tmp_path / "c.json", None)
    assert list(load_by_module([attention, silent])) == ["o_proj", "down_proj"]
    assert list(load_by_module([ffn, silent], "o_proj")) == ["down_proj", "o_proj"]
    for paths, module in (([ffn, silent], None), ([ffn, silent], "down_proj"), ([silent, silent], None)):
        with pytest.raises(InputError, match=r"c\.json names rows of down_proj, as another does: give one of them"):
            load_by_module(paths, module)
    with pytest.raises(InputError, match=r"a\.json names rows of down_proj, where o_proj's are wanted"):
        load_by_module([ffn], "o_proj")
