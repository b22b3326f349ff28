"""`loki select-nodes`: the files it writes, what it prints, and what it refuses."""

import json

import h5py
import numpy as np
import pytest
from tiny import NUM_LAYERS, NUM_ROWS

from loki.choices import StrategyName
from loki.log.assembly import write_header
from loki.log.schema import SCORES, LogHeader
from loki.rows import RowSelection, load_meta
from loki.selection.strategies import STRATEGIES

ALL_NAMES = ", ".join(STRATEGIES)
SCORES_NLD = np.random.default_rng(0).normal(size=(6, NUM_LAYERS, NUM_ROWS)).astype(np.float32)


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "kva.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset(SCORES, data=SCORES_NLD)
        write_header(file, LogHeader({}, "owner/Tiny-1B", "probe", {}, NUM_LAYERS, NUM_ROWS))
    return path


@pytest.fixture
def select(loki, log, tmp_path):
    """Selects from the log into the folder `out`."""
    return lambda *options: loki("select-nodes", "--hdf5-path", log, "--output-dir", tmp_path / "out", *options)


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def lowest(num_rows):
    """The layer-balanced selection of the log: one prompt's votes at a time, with numpy's stable sort."""
    selected = []
    for scores_ND in SCORES_NLD.transpose(1, 0, 2).astype(np.float64):
        votes_D = np.zeros(NUM_ROWS)
        for scores_D in scores_ND:
            votes_D[np.argsort(scores_D, kind="stable")[:num_rows]] += 1
        order = np.lexsort((np.arange(NUM_ROWS), scores_ND.mean(axis=0), -votes_D))
        selected.append(sorted(order[:num_rows].tolist()))
    return selected


def test_the_default_is_ten_percent_of_every_layer(select, tmp_path):
    done = select()
    assert (done.code, done.out) == (0, "")
    assert done.err == f"wrote {tmp_path / 'out' / '10.json'}: 6 rows in 3 layers\n"
    assert names(tmp_path / "out") == ["10.json", "10.meta.json"]
    assert json.loads((tmp_path / "out" / "10.json").read_text()) == lowest(2)
    meta = load_meta(tmp_path / "out" / "10.json")
    assert (meta["strategy"], meta["quota_percent"], meta["num_prompts"]) == ("layer_balanced", "10", 6)


def test_the_default_folder_is_named_after_the_model(loki, log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = loki("select-nodes", "--hdf5-path", log, "--strategy", "global_lowest", "--quota", 30)
    assert done.err == "wrote kva_result/pos_json/Tiny-1B/global_lowest_30.json: 18 rows in 3 layers\n"
    assert names(tmp_path / "kva_result" / "pos_json" / "Tiny-1B") == [
        "global_lowest_30.json",
        "global_lowest_30.meta.json",
    ]


def test_underscores_do_as_in_the_public_command(loki, log, tmp_path):
    options = ("--hdf5_path", log, "--output_dir", tmp_path / "out", "--output_name", "rows.json", "--quota", 10)
    assert loki("select-nodes", *options, "--strategy", "layer_balanced").code == 0
    assert json.loads((tmp_path / "out" / "rows.json").read_text()) == lowest(2)


def test_quotas_and_strategies_may_be_repeated(select, tmp_path):
    done = select("--quota", 10, "--quota", "5.5", "--strategy", "layer_balanced", "--strategy", "adaptive")
    assert done.code == 0
    files = ["10.json", "5.5.json", "adaptive_10.json", "adaptive_5.5.json"]
    assert [line.split(": ")[0] for line in done.err.splitlines()] == [f"wrote {tmp_path / 'out' / n}" for n in files]
    assert [name for name in names(tmp_path / "out") if not name.endswith("meta.json")] == files
    assert RowSelection.load(tmp_path / "out" / "10.json").as_lists() == lowest(2)
    assert RowSelection.load(tmp_path / "out" / "5.5.json").as_lists() == lowest(1)
    assert RowSelection.load(tmp_path / "out" / "adaptive_10.json").num_selected == 6


def test_quotas_that_differ_in_their_decimals_do_not_collide(loki, tmp_path):
    with h5py.File(tmp_path / "wide.h5", "w") as file:
        file.create_dataset(SCORES, data=np.random.default_rng(0).normal(size=(2, 1, 1000)))
    out = tmp_path / "out"
    done = loki(
        *("select-nodes", "--hdf5-path", tmp_path / "wide.h5", "--output-dir", out),
        *("--quota", "0.5", "--quota", "0.9", "--quota", "0.90001", "--strategy", "layer_highest"),
    )
    assert done.code == 0
    sizes = {name: RowSelection.load(out / name).num_selected for name in names(out) if "meta" not in name}
    assert sizes == {"layer_highest_0.5.json": 5, "layer_highest_0.9.json": 9, "layer_highest_0.90001.json": 9}


def test_layers_and_excluded_rows(select, tmp_path):
    used = RowSelection.from_lists([[0], lowest(2)[1], lowest(2)[2]])
    used.save(tmp_path / "used.json")
    done = select("--layers", "1-2", "--exclude", tmp_path / "used.json", "--json")
    assert done.code == 0
    assert "6 rows in 2 layers" not in done.err
    assert "4 rows in 2 layers" in done.err
    mask_LD = RowSelection.load(tmp_path / "out" / "10.json").as_mask(NUM_ROWS)
    assert mask_LD.sum(axis=1).tolist() == [0, 2, 2]
    assert not (mask_LD & used.as_mask(NUM_ROWS)).any()
    result = json.loads(done.out)
    assert result["settings"]["layers"] == "1-2"
    assert result["settings"]["exclude"] == [str(tmp_path / "used.json")]


def test_exclude_may_be_repeated(select, tmp_path):
    for name, rows in (("a.json", [0, 1, 2]), ("b.json", [3, 4])):
        RowSelection.from_lists([rows] * NUM_LAYERS).save(tmp_path / name)
    assert select("--quota", 75, "--exclude", tmp_path / "a.json", "--exclude", tmp_path / "b.json").code == 0
    assert RowSelection.load(tmp_path / "out" / "75.json").as_lists() == [list(range(5, 20))] * NUM_LAYERS


def test_stability_is_one_number_between_chance_and_one(select, tmp_path):
    done = select("--stability", "--json")
    figures = json.loads(done.out)["figures"]["selections"][0]
    assert 0.1 < figures["stability"] < 1
    assert done.err.endswith(f": 6 rows in 3 layers; stability {figures['stability']:.3f}\n")
    meta = load_meta(tmp_path / "out" / "10.json")
    assert (meta["stability"], meta["num_resamples"]) == (figures["stability"], 100)
    assert json.loads(select("--stability", "--json").out)["figures"]["selections"][0] == figures
    assert json.loads(select("--stability", "--seed", 1, "--json").out)["figures"]["selections"][0] != figures


def test_json(select, log, tmp_path):
    done = select("--quota", 10, "--strategy", "global_highest", "--strategy", "random", "--seed", 3, "--json")
    result = json.loads(done.out)
    assert (result["kind"], result["seed"]) == ("select", 3)
    assert result["settings"] == {"log": str(log), "layers": None, "exclude": []}
    rows = RowSelection.load(tmp_path / "out" / "global_highest_10.json")
    assert result["figures"]["selections"] == [
        {
            "positions": str(tmp_path / "out" / "global_highest_10.json"),
            "strategy": "global_highest",
            "quota": "10",
            "num_selected_rows": 6,
            "num_layers": sum(map(bool, rows.rows)),
            "num_prompts": 6,
            "stability": None,
        },
        {
            "positions": str(tmp_path / "out" / "random_10.json"),
            "strategy": "random",
            "quota": "10",
            "num_selected_rows": 6,
            "num_layers": 3,
            "num_prompts": None,
            "stability": None,
        },
    ]


def test_random_rows_of_a_model_need_no_log(loki, model_dir, tmp_path):
    options = ("--strategy", "random", "--quota", 50, "--model", model_dir, "--output-dir", tmp_path / "out")
    first = loki("select-nodes", *options)
    assert first.code == 0
    assert first.err == f"wrote {tmp_path / 'out' / 'random_50.json'}: 30 rows in 3 layers\n"
    rows = RowSelection.load(tmp_path / "out" / "random_50.json")
    assert [len(layer) for layer in rows.rows] == [10] * NUM_LAYERS
    assert load_meta(tmp_path / "out" / "random_50.json") == {
        "strategy": "random",
        "quota_percent": "50",
        "seed": 0,
        "log": None,
    }
    loki("select-nodes", *options)
    assert RowSelection.load(tmp_path / "out" / "random_50.json") == rows
    loki("select-nodes", *options, "--seed", 1)
    assert RowSelection.load(tmp_path / "out" / "random_50.json") != rows


def test_a_log_of_the_model_is_accepted(select, model_dir):
    assert select("--model", model_dir).code == 0


def test_a_path_with_brackets_is_printed_as_it_is(loki, log, tmp_path):
    done = loki("select-nodes", "--hdf5-path", log, "--output-dir", tmp_path / "[bold]")
    assert done.err.startswith(f"wrote {tmp_path / '[bold]' / '10.json'}: ")


@pytest.fixture
def refused(loki, log, tmp_path, model_dir):
    """Everything that must be refused leaves nothing behind."""
    RowSelection.from_lists([list(range(NUM_ROWS))] * NUM_LAYERS).save(tmp_path / "all.json")
    RowSelection.from_lists([[0]] * 2).save(tmp_path / "short.json")
    places = {"log": log, "out": tmp_path / "out", "model": model_dir, "dir": tmp_path}

    def call(*options):
        before = sorted(tmp_path.rglob("*"))
        done = loki("select-nodes", *(str(option).format(**places) for option in options))
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("loki: ")
        assert done.err.count("\n") == 1, done.err
        assert sorted(tmp_path.rglob("*")) == before
        return done.err

    return call


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategy", "best"], f"strategy 'best' is unknown: choose one of {ALL_NAMES}"),
        (["--strategy", "layer_balanced", "--strategy", ""], f"strategy '' is unknown: choose one of {ALL_NAMES}"),
        (["--quota", 10, "--quota", 4], "quota 4 gives no row out of 20: give at least 5"),
        (["--quota", 10, "--quota", "10.0"], "10.json is to be written twice: give each strategy and quota once"),
        (["--strategy", "adaptive", "--strategy", "adaptive"], "adaptive_10.json is to be written twice"),
        (["--quota", 5, "--quota", 10, "--output-name", "x.json"], "--output-name x.json is one name for 2 selections"),
        (["--output-name", "x.json", "--strategy", "random", "--strategy", "adaptive"], "is one name for 2 selections"),
        (["--layers", "3"], "layers '3' name layer 3, but the model's layers are 0 to 2"),
        (["--layers", "2-1"], "layers '2-1' are not possible: give numbers and ranges, such as 8-29 or 0,5,8-29"),
        (["--exclude", "{dir}/all.json"], "layer 0 has no row left to select from: exclude fewer rows"),
        (["--exclude", "{dir}/short.json"], "excluded positions have 2 layers, the model has 3"),
        (["--exclude", "{dir}/none.json"], "none.json does not exist"),
        (["--strategy", "random", "--stability"], "strategy 'random' draws rows without a log: its stability says"),
        (["--strategy", "random", "--seed", "-1"], "seed -1 is not possible: give 0 or more"),
        (["--seed", "one"], "Invalid value for '--seed'"),
        (["--model", "{dir}/none"], "none' does not exist"),
    ],
)
def test_bad_options(refused, options, message):
    assert message in refused("--hdf5-path", "{log}", "--output-dir", "{out}", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no --hdf5-path: name the log, or for random rows give --model and --output-dir instead"),
        (["--strategy", "random"], "no --hdf5-path: name the log, or for random rows give --model and --output-dir"),
        (["--strategy", "random", "--model", "{model}"], "no --hdf5-path: name the log, or for random rows give"),
        (["--output-dir", "{out}"], "neither log nor model is given: rows come from a log, random rows from a model's"),
        (["--output-dir", "{out}", "--model", "{model}"], "strategy 'layer_balanced' needs an attribution log: make"),
        (
            ["--output-dir", "{out}", "--model", "{model}", "--strategy", "random", "--stability"],
            "stability needs a log: it asks how much of a selection depends on its prompts",
        ),
    ],
)
def test_bad_options_without_a_log(refused, options, message):
    assert message in refused(*options)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_logs_that_cannot_be(refused, loki, tmp_path, dtype):
    """In one line each; the reader's own tests have every kind of damage."""

    def write(scores_NLD, schema_version=None):
        with h5py.File(tmp_path / "bad.h5", "w") as file:
            file.create_dataset(SCORES, data=scores_NLD.astype(dtype), chunks=True if scores_NLD.size else None)
            if schema_version is not None:
                file.attrs["header"] = json.dumps({"schema_version": schema_version})
        return ("--hdf5-path", "{dir}/bad.h5", "--output-dir", "{out}", "--strategy", "adaptive", "--stability")

    scores_NLD = SCORES_NLD.copy()
    scores_NLD[4, 2, 19] = np.nan
    assert "bad.h5 has nan at prompt 4, layer 2, row 19: analyse again in float32 or bfloat16" in refused(
        *write(scores_NLD)
    )
    scores_NLD[4, 1, 0] = -np.inf
    assert "bad.h5 has -inf at prompt 4, layer 1, row 0: analyse again" in refused(*write(scores_NLD))
    assert "bad.h5 is empty (0, 3, 20): analyse at least one prompt" in refused(*write(SCORES_NLD[:0]))
    assert "bad.h5 has schema 99, this version reads" in refused(*write(SCORES_NLD, 99))
    options = write(SCORES_NLD)
    (tmp_path / "bad.h5").write_bytes((tmp_path / "bad.h5").read_bytes()[:-400])
    assert "bad.h5 is damaged or not HDF5: make it again" in refused(*options)
    # One prompt, and scores that are all equal, are no errors.
    assert loki("select-nodes", *(str(o).format(dir=tmp_path, out=tmp_path) for o in write(SCORES_NLD[:1]))).code == 0
    assert load_meta(tmp_path / "adaptive_10.json")["stability"] == 1.0
    assert loki("select-nodes", *(str(o).format(dir=tmp_path, out=tmp_path) for o in write(0 * SCORES_NLD))).code == 0
    assert load_meta(tmp_path / "adaptive_10.json")["num_abstentions"] == 6 * NUM_LAYERS
    assert RowSelection.load(tmp_path / "adaptive_10.json").as_lists() == [[0, 1]] * NUM_LAYERS


def test_help_names_all_strategies(loki):
    done = loki("select-nodes", "--help")
    text = " ".join(done.out.replace("│", " ").split())
    assert "Example: loki select-nodes --hdf5-path kva.h5" in text
    for name in StrategyName.__args__:
        assert name in text
