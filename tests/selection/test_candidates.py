import pytest

from loki.errors import ArtefactError, InputError
from loki.rows import RowSelection
from loki.selection.candidates import candidate_rows, parse_layers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, list(range(12))),
        ("3", [3]),
        ("8-11", [8, 9, 10, 11]),
        ("5-5", [5]),
        ("0,5,8-9", [0, 5, 8, 9]),
        (" 7 , 2 - 3 ", [2, 3, 7]),
        ("4-6,5-7,5", [4, 5, 6, 7]),
        ("011", [11]),
    ],
)
def test_layers_by_number_and_range(text, expected):
    assert parse_layers(text, 12) == expected


@pytest.mark.parametrize("text", ["", " ", ",", "1,", "5-3", "-3", "1-", "1-2-3", "a", "1.5", "1;2", "٣", "0x1", "+1"])
def test_what_names_no_layers_is_refused(text):
    with pytest.raises(InputError) as caught:
        parse_layers(text, 12)
    assert str(caught.value) == (f"layers {text!r} are not possible: give numbers and ranges, such as 8-29 or 0,5,8-29")


@pytest.mark.parametrize(("text", "layer"), [("12", 12), ("0-12", 12), ("3,99", 99)])
def test_layers_that_the_model_does_not_have_are_refused(text, layer):
    with pytest.raises(InputError) as caught:
        parse_layers(text, 12)
    assert str(caught.value) == f"layers {text!r} name layer {layer}, but the model's layers are 0 to 11"


def test_all_rows_stand_when_nothing_is_said():
    assert candidate_rows(2, 3).tolist() == [[True] * 3] * 2
    assert candidate_rows(2, 3).dtype == bool


def test_rows_of_other_layers_and_excluded_rows_do_not_stand():
    first, second = RowSelection.from_lists([[0], [1, 3], []]), RowSelection.from_lists([[], [0], [2]])
    candidates_LD = candidate_rows(3, 4, layers="1-2", exclude=[first, second])
    assert candidates_LD.tolist() == [[False] * 4, [False, False, True, False], [True, True, False, True]]


def test_a_layer_without_rows_is_refused_only_where_it_is_asked_for():
    used = RowSelection.from_lists([[0, 1], [0]])
    with pytest.raises(InputError, match=r"^layer 0 has no row left to select from: exclude fewer rows, or leave it o"):
        candidate_rows(2, 2, exclude=[used])
    assert candidate_rows(2, 2, layers="1", exclude=[used]).tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0], [1], [2]], r"excluded positions have 3 layers, the model has 2: use the positions that were"),
        ([[0], [4]], r"excluded positions: layer 1 names row 4, but the model's rows are 0 to 3"),
    ],
)
def test_excluded_positions_of_another_shape_are_refused(rows, message):
    with pytest.raises(ArtefactError, match=message):
        candidate_rows(2, 4, exclude=[RowSelection.from_lists(rows)])
