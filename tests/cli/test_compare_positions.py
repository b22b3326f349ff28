"""`loki compare-positions`: what it prints, in words, tables and JSON, and what it refuses."""

import json

import pytest

from loki.rows import RowSelection


@pytest.fixture
def save(tmp_path):
    def write(name, *layers, num_rows=None):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        meta = {"log": {"model": {"architecture": "llama-2x20x24"}, "num_rows": num_rows}} if num_rows else None
        RowSelection.from_lists(layers).save(path, meta=meta)
        return path

    return write


@pytest.fixture
def first(save):
    return save("a.json", [0, 1, 2], [4], num_rows=8)


@pytest.fixture
def second(save):
    return save("b.json", [1, 2, 5, 7], [3])


@pytest.fixture
def third(save):
    return save("c.json", [2], [3, 4])


def lines(text):
    """Every line with text, words apart by one space."""
    words = [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in words if line.strip("─")]


def test_two_files(loki, first, second):
    """The case that is computed by hand in `test_overlap.py`."""
    done = loki("compare-positions", first, second)
    assert (done.code, done.err) == (0, "")
    assert lines(done.out) == [
        "rows in the other by chance",
        "1 a.json 4 50.0 % 40.6 %",
        "2 b.json 5 40.0 % 32.5 %",
        "2 rows in both, Jaccard index 0.286; by chance 1.6 ± 0.8 rows, z = +0.5",
        "layer rows in 1 in 2 in both share of 1 of 2 by chance z",
        "0 3 4 2 66.7 % 50.0 % 1.5 ± 0.7 +0.7",
        "1 1 1 0 0.0 % 0.0 % 0.1 ± 0.3 -0.4",
    ]
    assert "layer" not in loki("compare-positions", first, second, "--no-layers").out


def test_more_files(loki, first, second, third):
    """By chance: 4·1/8 + 1·2/8 = 0.75 of b's rows in c, and 3·4·1/64 + 1·1·2/64 = 0.21875 in all three."""
    done = loki("compare-positions", first, second, third)
    assert (done.code, done.err) == (0, "")
    assert lines(done.out) == [
        "share of each file's rows that another file has too, and below it what chance gives",
        "rows in 1 in 2 in 3",
        "1 a.json 4 · 50.0 % 50.0 %",
        "40.6 % 15.6 %",
        "2 b.json 5 40.0 % · 40.0 %",
        "32.5 % 15.0 %",
        "3 c.json 3 66.7 % 66.7 % ·",
        "20.8 % 25.0 %",
        "1 rows in all 3, Jaccard index 0.143; by chance 0.2 ± 0.4 rows, z = +1.8",
    ]
    assert lines(loki("compare-positions", first, second, third, "--layers").out)[9:] == [
        "layer 1 ∩ 2 1 ∩ 3 2 ∩ 3 in all by chance z",
        "0 2 1 1 1 0.2 ± 0.4 +2.1",
        "1 0 1 1 0 0.0 ± 0.2 -0.2",
    ]


def test_as_json(loki, first, second, third):
    done = loki("compare-positions", first, second, third, "--json")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert result["kind"] == "compare"
    assert result["settings"] == {"positions": [str(first), str(second), str(third)], "num_rows": None, "model": None}
    figures = result["figures"]
    assert (figures["num_layers"], figures["num_rows"]) == (2, 8)
    assert [pair["positions"] for pair in figures["pairs"]] == [
        [str(first), str(second)],
        [str(first), str(third)],
        [str(second), str(third)],
    ]
    assert [pair["total"]["num_common"] for pair in figures["pairs"]] == [2, 2, 2]
    assert [layer["num_common"] for layer in figures["pairs"][0]["layers"]] == [2, 0]
    assert figures["pairs"][2]["total"]["chance"]["expected"] == 0.75
    assert figures["common_to_all"]["total"]["num_common"] == 1
    assert figures["common_to_all"]["total"]["chance"]["expected"] == 0.21875


def test_without_the_rows_of_a_layer_chance_is_not_given(loki, second, third, model_dir, save):
    done = loki("compare-positions", second, third)
    assert done.code == 0
    assert "chance" not in done.out
    assert lines(done.out)[-1] == "1 1 2 1 100.0 % 50.0 %"
    assert "chance is not known, because no file tells the rows of a layer: give --num-rows" in done.err
    known = loki("compare-positions", second, third, "--num-rows", 8)
    assert "by chance 0.8 ±" in known.out
    assert known.err == ""
    pair = [save(name, [0, 1], [2], [19]) for name in ("x.json", "y.json")]
    # The tiny model has 20 rows: 2·2/20 + 2·1·1/20 = 0.3.
    assert "by chance 0.3 ±" in loki("compare-positions", *pair, "--model", model_dir).out


def test_provenance_that_a_shell_pattern_brings_along_is_left_out(loki, first, second, tmp_path):
    files = sorted(tmp_path.glob("*.json"))
    assert tmp_path / "a.meta.json" in files
    assert loki("compare-positions", *files).out == loki("compare-positions", first, second).out
    alone = loki("compare-positions", tmp_path / "a.meta.json", second)
    assert alone.code == 2
    assert "a.meta.json must be a list with one list of row indices for each layer" in alone.err


def test_files_of_the_same_name_are_told_apart(loki, first, second, save):
    other = save("[bold]/a.json", [1], [2])
    found = lines(loki("compare-positions", first, other, second).out)
    assert found[2].startswith(f"1 {first.parent.name}/a.json 4")
    assert found[4].startswith("2 [bold]/a.json 2")
    same = lines(loki("compare-positions", first, first).out)
    assert [line[:8] for line in same[1:3]] == ["1 a.json", "2 a.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{first}"], "1 positions file given: name two or more to compare"),
        (["{first}", "no.json"], "positions file no.json does not exist"),
        (["{first}", "{longer}"], "has 2 layers, "),
        (["{first}", "{second}", "--num-rows", 20], "--num-rows says 20 rows a layer; positions file "),
        (["{second}", "{third}", "--num-rows", 7], "layer 0 names row 7, but the model's rows are 0 to 6"),
        (["{second}", "{third}", "--num-rows", 0], "num-rows 0 is not possible"),
        (["{second}", "{third}", "--num-rows", "many"], "Invalid value for '--num-rows'"),
        (["{second}", "{third}", "--model", "{model}"], "have 2 layers, the model has 3"),
        (["{second}", "{third}", "--model", "/none"], "model folder '/none' does not exist"),
        (["{second}", "{third}", "--num-rows", 8, "--model", "{model}"], "exclude each other: give one of them"),
        ([], "Missing argument 'positions'"),
    ],
)
def test_bad_input(loki, first, second, third, model_dir, save, options, message):
    places = {
        "first": first,
        "second": second,
        "third": third,
        "longer": save("l.json", [0], [1], [2]),
        "model": model_dir,
    }
    done = loki("compare-positions", *(str(option).format(**places) for option in options))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("loki: ")
    assert done.err.count("\n") == 1
    assert message in done.err


def test_help(loki):
    assert "Example: loki compare-positions" in loki("compare-positions", "--help").out
