"""From files to what a report shows, and the command around it."""

import json
import logging

import numpy as np
import pytest

from loki.errors import ArtefactError, InputError, OutputError
from loki.log.reader import AttributionLog
from loki.reporting.reading import read_log, report_of_log
from loki.rows import RowSelection, meta_path
from loki.selection.run import Constraints, Request, select_to_file, select_to_files
from loki.selection.stability import stability
from loki.selection.strategies import select
from loki.stages import report


def test_stability_is_that_of_the_selection_itself(make_log):
    log_path, paths = make_log()
    reading = read_log(log_path, paths)
    assert [(selection.name, selection.how) for selection in reading.selections] == [
        ("10.json", "layer_balanced, 10\u00a0%"),
        ("25.json", "layer_balanced, 25\u00a0%"),
    ]
    with AttributionLog(log_path) as log:
        expected = stability(log, select(log, "10"))
    np.testing.assert_array_equal(reading.stability.shares_LD, expected.shares_LD)
    assert reading.stability.mean == expected.mean
    assert read_log(log_path, paths, with_stability=False).stability is None
    assert read_log(log_path, []).stability is None


@pytest.mark.parametrize("strategy", ["global_highest", "layer_balanced_magnitude", "adaptive"])
def test_stability_of_other_strategies(make_log, tmp_path, strategy):
    log_path, _ = make_log()
    select_to_file(log_path, tmp_path / "x.json", quota=20, strategy=strategy)
    assert read_log(log_path, [tmp_path / "x.json"]).stability is not None


def test_stability_minds_layers_and_excluded_rows(make_log, tmp_path):
    log_path, paths = make_log()
    constraints = Constraints(layers="1-2", exclude=paths[:1])
    select_to_files(log_path, [Request(tmp_path / "x.json", 10)], constraints)
    reading = read_log(log_path, [tmp_path / "x.json"])
    assert reading.stability.shares_LD[0].sum() == 0
    excluded = RowSelection.load(paths[0]).as_mask(40)
    assert reading.stability.shares_LD[excluded].sum() == 0


def test_stability_is_left_out_where_provenance_does_not_tell(make_log, tmp_path, caplog):
    log_path, (path, _) = make_log()
    caplog.set_level(logging.INFO, "loki")

    def note():
        caplog.clear()
        assert read_log(log_path, [path]).stability is None
        return caplog.text

    meta = json.loads(meta_path(path).read_text())
    for changes in ({"quota_percent": "25"}, {"strategy": "layer_highest"}):
        meta_path(path).write_text(json.dumps(meta | changes))
        assert "its provenance makes other rows of this log" in note()
    for changes in ({"strategy": "best"}, {"quota_percent": "many"}, {"layers": "many"}, {"excluded": ["gone.json"]}):
        meta_path(path).write_text(json.dumps(meta | changes))
        assert "its provenance does not tell how it was selected" in note()
    meta_path(path).unlink()
    assert "its provenance does not tell how it was selected" in note()


def test_random_rows_have_no_stability(make_log, tmp_path):
    log_path, _ = make_log()
    select_to_file(log_path, tmp_path / "r.json", quota=10, strategy="random")
    assert read_log(log_path, [tmp_path / "r.json"]).stability is None


def test_report_of_a_log_names_model_and_provenance(make_log):
    log_path, paths = make_log()
    data = report_of_log(log_path, paths)
    assert data.title == "Where Tiny keeps what it knows"
    assert data.model_label == "Tiny (invented)"
    assert data.provenance["attribution log"]["file"] == "kva.h5"
    assert data.provenance["attribution log"]["settings"]["steps"] == 7


def test_report_of_a_damage_log_is_called_so(write_damage_log, tmp_path):
    data = report_of_log(write_damage_log(tmp_path / "damage.h5", "damage", seed=0), [])
    assert data.title == "What a change of each row would cost Tiny"
    assert list(data.provenance) == ["damage log"]
    assert data.provenance["damage log"]["settings"]["seed"] == 0


def test_selections_from_logs_of_different_scores_are_told_apart(make_log, write_damage_log, tmp_path):
    log_path, (plain, _) = make_log()
    damage_path = write_damage_log(tmp_path / "damage.h5", "damage")
    select_to_file(damage_path, tmp_path / "d.json", quota=10, strategy="capped")
    select_to_file(damage_path, tmp_path / "r.json", quota=10, strategy="random")
    paths = [plain, tmp_path / "d.json", tmp_path / "r.json"]

    def told(path):
        return [selection.how.replace("\u00a0", " ") for selection in read_log(path, paths).selections]

    assert told(log_path) == ["layer_balanced, 10 %", "capped, 10 %, by damage", "random, 10 %"]
    assert told(damage_path) == ["layer_balanced, 10 %, by attribution", "capped, 10 %, by damage", "random, 10 %"]


@pytest.mark.parametrize("strategy", ["adaptive", "capped"])
def test_who_competed_where_is_known_without_stability_too(make_log, tmp_path, caplog, strategy):
    log_path, _ = make_log()
    caplog.set_level(logging.INFO, "loki")
    select_to_file(log_path, tmp_path / "x.json", quota=20, strategy=strategy)
    for with_stability in (True, False):
        reading = read_log(log_path, [tmp_path / "x.json"], with_stability=with_stability)
        assert reading.survey.rivals.scope == "layer"
        assert (reading.stability is not None) == with_stability
    meta_path(tmp_path / "x.json").unlink()
    assert read_log(log_path, [tmp_path / "x.json"], with_stability=False).survey.rivals.scope == "model"
    assert caplog.text == "", "of stability nobody asked"


def test_log_of_the_public_implementation_can_be_shown(make_log):
    data = report_of_log(*make_log(header=False))
    assert data.title == "Where the model keeps what it knows"
    assert data.survey.subjects is None


def test_page_of_a_log_stands_beside_it(make_log, tmp_path):
    log_path, paths = make_log()
    assert report(log_path, paths) == tmp_path / "kva.report.html"
    first = (tmp_path / "kva.report.html").read_bytes()
    assert b"Where Tiny keeps what it knows" in first
    other = report(log_path, paths, output=tmp_path / "deep/page.html", figures_dir=tmp_path / "deep/figures")
    assert other.read_bytes() == first
    assert (tmp_path / "deep/figures/votes_high.png").is_file()
    assert report(log_path, output=tmp_path / "bare.html").is_file()


def test_bad_input_is_refused_in_one_line(make_log, tmp_path):
    log_path, paths = make_log()
    with pytest.raises(
        InputError, match=r"no-such does not exist: name the directory of a finished `loki run`, an attr"
    ):
        report(tmp_path / "no-such")
    with pytest.raises(InputError, match=r"has no summary\.json: name the directory of a finished `loki run`"):
        report(tmp_path)
    with pytest.raises(ArtefactError, match=r"10\.json is not a result of loki: name a file such as study\.json"):
        report(paths[0])
    text_path = tmp_path / "text.h5"
    text_path.write_text("[[1], [2], [40]]")
    with pytest.raises(ArtefactError, match="is damaged or not HDF5"):
        report(text_path)
    paths[1].write_text("[[1], [2], [40]]")
    with pytest.raises(
        ArtefactError, match=r"positions file .*25\.json: layer 2 names row 40, but the model's rows are"
    ):
        report(log_path, paths)
    for options in ({"output": tmp_path / "10.json/x.html"}, {"figures_dir": tmp_path / "10.json"}):
        with pytest.raises(OutputError, match="cannot write"):
            report(log_path, **options)
    assert not list(tmp_path.glob("*.html"))


def test_command(make_log, tmp_path, monkeypatch, capsys):
    from loki.cli.main import run

    log_path, (first, second) = make_log()
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    arguments = ["loki", "report", log_path, "--positions", first, "--positions", second, "--no-stability"]
    monkeypatch.setattr("sys.argv", [*map(str, arguments), "--output", str(page), "--figures", str(figures)])
    with pytest.raises(SystemExit) as stop:
        run()
    assert not stop.value.code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.split() == ["wrote", f"{page},", "figures", "in", str(figures)]
    assert "Selections compared" in page.read_text()
    assert "How stable" not in page.read_text()
    assert len(list(figures.iterdir())) == 14
