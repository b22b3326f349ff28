import json
import logging
from pathlib import Path

import h5py
import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from loki.architecture import shape_of
from loki.errors import ArtefactError, InputError, OutputError
from loki.log import AttributionLog
from loki.log.assembly import write_header
from loki.log.schema import LogHeader
from loki.provenance import fingerprint_model
from loki.rows import RowSelection, load_meta
from loki.selection.run import (
    Constraints,
    Request,
    check_model,
    default_positions_dir,
    default_positions_name,
    select_to_file,
    select_to_files,
)
from loki.selection.stability import stability
from loki.selection.strategies import select

SCORES_NLD = np.random.default_rng(0).normal(size=(3, 2, 8))


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def log_path(write_log, model):
    """A log of ours: it says which model made it."""
    path = write_log(SCORES_NLD)
    header = LogHeader(
        model=fingerprint_model(model).as_dict(),
        model_name="tiny",
        prompts="probe",
        settings={"steps": 7},
        num_layers=2,
        num_rows=8,
    )
    with h5py.File(path, "a") as file:
        write_header(file, header)
    return path


@pytest.mark.parametrize(
    ("strategy", "quota", "name"),
    [
        ("layer_balanced", "10", "10.json"),
        ("layer_balanced", 0.50, "0.5.json"),
        ("layer_balanced", "12.50", "12.5.json"),
        ("global_lowest", 30, "global_lowest_30.json"),
        ("layer_highest", "1.0", "layer_highest_1.json"),
        ("layer_highest_magnitude", "10", "layer_highest_magnitude_10.json"),
    ],
)
def test_default_names(strategy, quota, name):
    assert default_positions_name(strategy, quota) == name


def test_no_name_for_what_is_no_quota():
    with pytest.raises(InputError, match="quota 'most' is not a number"):
        default_positions_name("layer_balanced", "most")


def test_the_positions_file_is_the_selection(log_path, tmp_path):
    output = tmp_path / "pos_json" / "tiny" / "25.json"
    selection = select_to_file(log_path, output, quota="25")
    lists = json.loads(output.read_text())
    assert lists == selection.rows.as_lists()
    assert [len(rows) for rows in lists] == [2, 2]
    assert all(rows == sorted(rows) for rows in lists)
    assert RowSelection.load(output) == selection.rows


def test_meta_says_where_the_positions_come_from(log_path, tmp_path, model):
    select_to_file(log_path, tmp_path / "gh.json", quota="37.50", strategy="global_highest")
    meta = json.loads((tmp_path / "gh.meta.json").read_text())
    header = meta.pop("log")
    assert meta == {
        "strategy": "global_highest",
        "quota_percent": "37.5",
        "votes_on": "signed",
        "votes_per_prompt": 6,
        "num_prompts": 3,
        "num_abstentions": 0,
    }
    assert header["model"] == fingerprint_model(model).as_dict()
    assert header["settings"] == {"steps": 7}


def test_the_meta_of_capped_rows_has_no_votes_since_means_decide(log_path, tmp_path):
    select_to_file(log_path, tmp_path / "c.json", quota="25", strategy="capped")
    meta = json.loads((tmp_path / "c.meta.json").read_text())
    assert meta.pop("log")["settings"] == {"steps": 7}
    assert meta == {"strategy": "capped", "quota_percent": "25", "num_prompts": 3}


@pytest.mark.parametrize(
    ("strategy", "votes_on"),
    [("layer_balanced", "signed"), ("adaptive", "magnitude"), ("layer_highest_magnitude", "magnitude")],
)
def test_the_meta_names_what_the_votes_are_on_apart_from_the_score_of_the_log(log_path, tmp_path, strategy, votes_on):
    select_to_file(log_path, tmp_path / "x.json", quota="25", strategy=strategy)
    meta = json.loads((tmp_path / "x.meta.json").read_text())
    assert meta["votes_on"] == votes_on
    assert "score" not in meta


def test_abstentions_reach_the_meta(write_log, tmp_path):
    scores_NLD = SCORES_NLD.copy()
    scores_NLD[1, 0] = 4.0
    select_to_file(write_log(scores_NLD), tmp_path / "25.json", quota=25)
    assert load_meta(tmp_path / "25.json")["num_abstentions"] == 1


def test_a_log_of_the_public_implementation_has_no_header(write_log, tmp_path):
    select_to_file(write_log(SCORES_NLD), tmp_path / "25.json", quota=25)
    assert load_meta(tmp_path / "25.json")["log"] is None


def test_the_meta_has_the_quota_that_was_asked_for(write_log, tmp_path):
    select_to_file(write_log(SCORES_NLD), tmp_path / "rows.json", quota="24.999999", strategy="global_lowest")
    meta = load_meta(tmp_path / "rows.json")
    assert meta["votes_per_prompt"] == 3
    assert meta["quota_percent"] == "24.999999"


def test_a_bad_quota_writes_nothing(log_path, tmp_path):
    with pytest.raises(InputError, match="outside"):
        select_to_file(log_path, tmp_path / "out" / "x.json", quota=0)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_an_error(log_path, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        select_to_file(log_path, tmp_path / "file" / "10.json", quota=25)


def test_a_log_of_this_shape_is_accepted(log_path, write_log, tmp_path, model):
    shape = shape_of(model)
    with_header = select_to_file(log_path, tmp_path / "a.json", quota=25, shape=shape)
    without = select_to_file(write_log(SCORES_NLD, "public.h5"), tmp_path / "b.json", quota=25, shape=shape)
    assert with_header.rows == without.rows


@pytest.mark.parametrize("dimensions", [(3, 3, 8), (3, 2, 9)], ids=["layers", "rows"])
def test_a_log_of_another_shape_is_refused(write_log, tmp_path, model, dimensions):
    path = write_log(np.random.default_rng(0).normal(size=dimensions))
    with pytest.raises(ArtefactError, match=r"not of this llama-2x8x12 model: analyse this model"):
        select_to_file(path, tmp_path / "10.json", quota=25, shape=shape_of(model))
    assert not (tmp_path / "10.json").exists()


def test_positions_of_this_model_pass_without_a_word(log_path, tmp_path, model, caplog):
    select_to_file(log_path, tmp_path / "25.json", quota=25)
    with caplog.at_level(logging.WARNING):
        check_model(tmp_path / "25.json", model, strict=True)
    assert caplog.records == []


def test_positions_of_other_weights_are_a_warning_and_an_error_when_strict(log_path, tmp_path, model, caplog):
    select_to_file(log_path, tmp_path / "25.json", quota=25)
    other = LlamaForCausalLM(model.config).eval()
    with caplog.at_level(logging.WARNING):
        check_model(tmp_path / "25.json", other, strict=False)
    assert "made with other weights of the same architecture" in caplog.text
    with pytest.raises(ArtefactError, match=r"25\.json was made with other weights .*leave out --strict"):
        check_model(tmp_path / "25.json", other, strict=True)


@pytest.mark.parametrize("log", [3, ["log"], {}, {"model": "llama"}])
def test_damaged_provenance(tmp_path, model, log):
    RowSelection.from_lists([[0], [1]]).save(tmp_path / "rows.json", meta={"log": log})
    with pytest.raises(
        ArtefactError, match=r"rows\.meta\.json does not say for which model: select again, or remove it"
    ):
        check_model(tmp_path / "rows.json", model, strict=False)


def test_positions_without_provenance_are_not_checked(tmp_path, model):
    RowSelection.from_lists([[0], [1]]).save(tmp_path / "rows.json")
    check_model(tmp_path / "rows.json", model, strict=True)


QUOTAS_AND_STRATEGIES = [(25, "layer_balanced"), (50, "adaptive"), (37.5, "global_highest"), (25, "random")]


def requests_in(folder):
    return [
        Request(folder / default_positions_name(strategy, quota), quota, strategy)
        for quota, strategy in QUOTAS_AND_STRATEGIES
    ]


def test_several_files_in_one_pass(log_path, tmp_path, monkeypatch):
    passes = []
    read = AttributionLog.stored_chunks
    monkeypatch.setattr(AttributionLog, "stored_chunks", lambda log: passes.append(1) or read(log))
    made = select_to_files(log_path, requests_in(tmp_path), Constraints(seed=5))
    assert len(passes) == 1
    names = ["25.json", "adaptive_50.json", "global_highest_37.5.json", "random_25.json"]
    assert [selected.request.output.name for selected in made] == names
    for selected, name, (quota, strategy) in zip(made, names, QUOTAS_AND_STRATEGIES, strict=True):
        with AttributionLog(log_path) as log:
            alone = select(log, quota, strategy, seed=5)
        assert RowSelection.load(tmp_path / name) == selected.selection.rows == alone.rows
        assert load_meta(tmp_path / name)["strategy"] == strategy
        assert selected.stability is None


def test_the_meta_of_random_rows_has_their_seed_and_no_votes(log_path, model, tmp_path):
    (with_log,) = select_to_files(log_path, requests_in(tmp_path)[3:], Constraints(seed=5))
    assert load_meta(tmp_path / "random_25.json").pop("log")["settings"] == {"steps": 7}
    (without,) = select_to_files(None, requests_in(tmp_path)[3:], Constraints(seed=5), shape=shape_of(model))
    assert load_meta(tmp_path / "random_25.json") == {
        "strategy": "random",
        "quota_percent": "25",
        "seed": 5,
        "log": None,
    }
    assert with_log.selection.rows == without.selection.rows


def test_layers_and_excluded_rows_hold_and_reach_the_meta(log_path, tmp_path):
    first = tmp_path / "first.json"
    RowSelection.from_lists([[], [0, 1, 2, 3]]).save(first)
    made = select_to_files(log_path, requests_in(tmp_path), Constraints("1", [first]))
    for selected in made:
        mask_LD = selected.selection.rows.as_mask(8)
        assert not mask_LD[0].any()
        assert not mask_LD[1, :4].any()
        # 25 % of a layer, 50 %, 37.5 % of the one layer that is selected from, 25 %.
        assert mask_LD.sum() == {"25": 2, "50": 4, "37.5": 3}[str(selected.request.quota)]
        meta = load_meta(selected.request.output)
        assert (meta["layers"], meta["excluded"]) == ("1", [str(first)])


def test_stability_reaches_the_meta(log_path, tmp_path):
    (selected,) = select_to_files(log_path, requests_in(tmp_path)[:1], Constraints(seed=2, resamples=11))
    with AttributionLog(log_path) as log:
        expected = stability(log, selected.selection, resamples=11, seed=2)
    assert selected.stability.mean == expected.mean
    meta = load_meta(tmp_path / "25.json")
    assert (meta["stability"], meta["num_resamples"], meta["seed"]) == (expected.mean, 11, 2)


@pytest.mark.parametrize(
    ("last", "constraints", "message"),
    [
        ((5, "layer_balanced"), Constraints(), "quota 5 gives no row out of 8"),
        ((75, "layer_balanced"), Constraints("0", ["first.json"]), "takes 6 rows, but layer 0 has 5 left to select"),
        (
            (25.0, "layer_balanced"),
            Constraints(),
            r"25\.json is to be written twice: give each strategy and quota once",
        ),
        ((25, "best"), Constraints(), "strategy 'best' is unknown"),
        ((50, "layer_highest"), Constraints("2"), "layers '2' name layer 2, but the model's layers are 0 to 1"),
        ((50, "layer_highest"), Constraints(exclude=["none.json"]), "positions file none.json does not exist"),
        ((50, "layer_highest"), Constraints(exclude=["long.json"]), "excluded positions have 3 layers, the model has"),
        ((50, "random"), Constraints(resamples=3), "strategy 'random' draws rows without a log"),
        ((50, "layer_highest"), Constraints(resamples=1), "1 resamples are too few"),
    ],
)
def test_nothing_is_written_when_one_of_several_is_impossible(
    log_path, tmp_path, monkeypatch, last, constraints, message
):
    monkeypatch.chdir(tmp_path)
    RowSelection.from_lists([[0, 1, 2], []]).save("first.json")
    RowSelection.from_lists([[0], [], []]).save("long.json")
    (quota, strategy), folder = last, tmp_path / "out"
    output = folder / (f"{strategy}.json" if quota != 25.0 or strategy == "best" else "25.json")
    with pytest.raises((InputError, ArtefactError), match=message):
        select_to_files(log_path, [*requests_in(folder)[:1], Request(output, quota, strategy)], constraints)
    assert not folder.exists()


def test_a_stability_of_random_rows_is_refused_before_the_log_is_read(log_path, tmp_path, monkeypatch):
    monkeypatch.delattr(AttributionLog, "stored_chunks")
    with pytest.raises(InputError, match="its stability says nothing"):
        select_to_files(log_path, requests_in(tmp_path), Constraints(resamples=5))


@pytest.mark.parametrize(
    ("strategy", "with_shape", "constraints", "message"),
    [
        ("random", False, Constraints(), "neither log nor model is given: rows come from a log, random rows from a"),
        ("adaptive", True, Constraints(), "strategy 'adaptive' needs an attribution log: make one with `loki analyse`"),
        ("random", True, Constraints(resamples=9), "stability needs a log: it asks how much of a selection depends"),
    ],
)
def test_without_a_log(model, tmp_path, strategy, with_shape, constraints, message):
    shape = shape_of(model) if with_shape else None
    with pytest.raises(InputError, match=message):
        select_to_files(None, [Request(tmp_path / "out" / "x.json", 25, strategy)], constraints, shape=shape)
    assert not (tmp_path / "out").exists()


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match=r"^seed -1 is not possible: give 0 or more$"):
        Constraints(seed=-1)


@pytest.mark.parametrize(
    ("model_name", "folder"),
    [
        ("owner/Model-1B", "Model-1B"),
        ("/models/tiny/", "tiny"),
        ("SmolLM2-135M-Instruct (Q4_1, dequantised)", "SmolLM2-135M-Instruct"),
        ("../..", "a-model"),
        ("", "a-model"),
    ],
)
def test_the_default_folder_is_named_after_the_model(tmp_path, model_name, folder):
    path = tmp_path / "a-model" / "kva.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file.create_dataset("dataset", data=SCORES_NLD)
        write_header(file, LogHeader({}, model_name, "probe", {}, *SCORES_NLD.shape[1:]))
    assert default_positions_dir(path) == Path("kva_result/pos_json") / folder
