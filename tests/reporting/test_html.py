import base64
import hashlib
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from loki.errors import InputError
from loki.reporting import NamedSelection, ReportData, render_report, write_report
from loki.reporting.comparison import table_row, verdict
from loki.reporting.data import Forgetting
from loki.reporting.statistics import SubjectProfile
from loki.reporting.survey import LogSurvey
from loki.results import Comparison, Measure, Result
from loki.rows import RowSelection
from loki.selection.stability import Stability
from loki.selection.votes import Votes

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Tags with their attributes, the visible text, and whether every element is closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "svg", "script"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def count(self, tag, **attributes):
        return sum(name == tag and attributes.items() <= attrs.items() for name, attrs in self.tags)


def comparison(value, error, *, higher_is_better=True):
    return Comparison("x", None, None, Measure(value, error), higher_is_better=higher_is_better)


SUMMARY = Result(
    "summary",
    {"learning_rate": 1e-05, "steps": 7},
    {
        "analyse": {"num_prompts": 171, "seconds_per_prompt": 0.93125},
        "train": {"trainable_parameters": 2_626_560},
        "evaluate": {},
    },
    (
        Comparison(
            "calls",
            Measure(4.0, 1.4, 200, "%"),
            Measure(61.5, 3.4, 200, "%"),
            Measure(57.5, 3.6, 200, "points"),
        ),
        Comparison("loss", Measure(2.9, 0.02), Measure(3.1, 0.02), Measure(0.2, 0.01), higher_is_better=False),
        Comparison("knowledge", Measure(35.0), None, None, note="probe"),
    ),
    seed=20251,
    versions={"torch": "2.13.0"},
)


@pytest.fixture(name="make_data", scope="module")
def make_data_factory(reading):
    """All parts of a report; changes replace or remove some."""

    def make(**changes):
        values = {
            "title": "A run",
            "model_label": "Tiny model (Q4_1, dequantised)",
            "summary": SUMMARY,
            "survey": reading.survey,
            "selections": reading.selections,
            "stability": reading.stability,
            "training_log": [
                {"step": 5, "loss": 2.25, "learning_rate": 1e-3},
                {"step": 10, "loss": 1.5, "learning_rate": 0.0},
            ],
        }
        return ReportData(**(values | changes))

    return make


@pytest.fixture(name="whole", scope="module")
def make_whole(make_data):
    """The page with all its parts."""
    return render_report(make_data())


EMPTY = {"summary": None, "survey": None, "selections": (), "stability": None, "training_log": []}


def test_all_parts_are_shown(whole):
    page = Page(whole)

    assert page.count("figure") == page.count("figcaption") == 7
    assert page.count("svg") == 9, "two figures have two maps each"
    for number in range(1, 8):
        assert f"Figure {number}." in page.text
    assert page.text.count("How to read this.") == 9, "figures and two tables"
    for part in (
        "A run",
        "Tiny model (Q4_1, dequantised)",
        "Before and after",
        "Figures",
        "Provenance",
        "20251",
        "2.13.0",
        "prompts analysed",
        "Rows most specific to a subject",
        "Selections compared",
    ):
        assert part in page.text


def test_every_comparison_has_its_row_with_a_scope(make_data):
    page = Page(render_report(make_data(**(EMPTY | {"summary": SUMMARY}))))

    assert page.count("th", scope="row") == len(SUMMARY.comparisons) == 3
    assert page.count("th", scope="col") == 4
    for text in (
        "4.0 ± 1.4 %",
        "61.5 ± 3.4 %",
        "+57.5 ± 3.6 points",
        "2.900 ± 0.020",
        "+0.200 ± 0.010",
        "n = 200",
        "probe",
    ):
        assert text in page.text.replace("\u00a0", " ")
    assert page.text.count("not measured") == 2


def test_verdict_is_in_colour_words_and_arrow(whole):
    text = whole
    assert re.search(r'<td class="better">.*▲</span> better', text)
    assert re.search(r'<td class="worse">.*▲</span> worse', text)


@pytest.mark.parametrize(
    ("value", "error", "higher_is_better", "expected"),
    [
        (2.0, 1.0, True, "better"),
        (2.0, 1.0, False, "worse"),
        (-2.0, 1.0, True, "worse"),
        (-2.0, 1.0, False, "better"),
        (1.99, 1.0, True, "unclear"),
        (-1.99, 1.0, True, "unclear"),
        (0.0, 0.0, True, "unclear"),
        (0.1, 0.0, True, "better"),
        (5.0, None, True, ""),
        (float("nan"), 1.0, True, ""),
        (1.0, float("nan"), True, ""),
    ],
)
def test_verdict(value, error, higher_is_better, expected):
    assert verdict(comparison(value, error, higher_is_better=higher_is_better)) == expected


def test_arrow_gives_the_direction_whatever_is_better():
    assert table_row(comparison(-2.0, 0.5, higher_is_better=False)).arrow == "▼"
    assert table_row(comparison(2.0, 0.5, higher_is_better=False)).arrow == "▲"
    assert table_row(comparison(0.0, 0.5)).arrow == ""


def test_unit_in_words_is_said_once_and_counts_that_differ_are_both_said():
    before, after = Measure(2.9, 0.1, 120, "nats"), Measure(3.0, 0.1, 100, "nats")
    row = table_row(Comparison("x", before, after, Measure(0.1, 0.1, None, "points"), note="why"))

    assert [text.replace("\u00a0", " ") for text in row.asides] == ["nats, n = 120 / 100", "why"]
    assert row.before.unit == row.after.unit == ""
    assert row.change.unit == "points"


def test_counts_without_error_are_shown_whole():
    assert table_row(Comparison("x", Measure(12), Measure(9.0), Measure(-3.0))).change.value == "\u22123"


@pytest.mark.parametrize(
    ("missing", "heading", "num_figures"),
    [
        ({"survey": None, "stability": None}, "The same by magnitude", 1),
        ({"stability": None}, "How stable is the selection?", 6),
        ({"selections": (), "stability": None}, "Selections compared", 6),
        ({"training_log": []}, "over 2 logged steps", 6),
        ({"training_log": [{"step": 3, "loss": float("nan")}]}, "The loss goes from", 6),
    ],
)
def test_a_missing_part_is_left_out_and_the_figures_are_renumbered(make_data, whole, missing, heading, num_figures):
    assert heading in whole
    text = render_report(make_data(**missing))
    page = Page(text)

    assert heading not in text
    assert page.count("figure") == num_figures
    assert f"Figure {num_figures}." in page.text
    assert f"Figure {num_figures + 1}." not in page.text


def test_without_data_only_the_title_block_remains(make_data):
    page = Page(render_report(make_data(**EMPTY)))

    assert "A run" in page.text
    for tag in ("table", "figure", "dl", "details", "h2", "script"):
        assert page.count(tag) == 0


def test_stage_without_figures_and_missing_seed_are_left_out(make_data):
    def text_of(summary):
        return Page(render_report(make_data(**(EMPTY | {"summary": summary})))).text

    assert "evaluate" not in text_of(SUMMARY)
    assert "seed" in text_of(SUMMARY)
    assert "seed" not in text_of(Result("summary", {"a": 1}, {}, versions={}))


def test_figures_are_written_for_reading_and_settings_as_given(whole):
    text = whole
    assert "num prompts 171" in Page(text).text
    assert "seconds per prompt 0.9313" in Page(text).text
    assert "trainable parameters 2\u202f626\u202f560" in text.replace("</dt><dd>", " ")
    assert "learning rate 1e-05" in Page(text).text


def test_provenance_of_artefacts_stands_beside_the_settings(make_data):
    provenance = {"attribution log": {"settings": {"rule": "riemann_left"}, "shard": None}, "nothing": {}}
    text = Page(render_report(make_data(**(EMPTY | {"provenance": provenance})))).text
    assert "Provenance attribution log settings rule riemann_left shard none" in text
    assert "nothing" not in text


def test_figures_nest_and_take_measures_lists_and_loose_values(make_data):
    figures = {
        "kind": None,
        "evaluate": {
            "forgetting": {"value": 2.31, "standard_error": 0.9, "count": 5, "unit": "%"},
            "by_task": {"a_b": [1, 2], "exact": True},
            "empty": {},
        },
    }
    page = Page(render_report(make_data(**(EMPTY | {"summary": Result("summary", {}, figures, versions={})}))))

    text = page.text.replace("\u00a0", " ")
    assert "kind none evaluate forgetting 2.3 ± 0.9 % by task a b 1, 2 exact yes" in text
    assert "empty" not in text


def test_whatever_comes_from_outside_is_escaped(make_data):
    evil = "<script>alert(1)</script>"
    summary = Result(
        "summary",
        {evil: evil},
        {evil: {evil: evil}},
        (Comparison(evil, None, Measure(1.0), None, note=evil),),
        versions={evil: evil},
    )
    named = NamedSelection(evil, RowSelection.from_lists([[0], [1], [2]]), evil)
    text = render_report(
        make_data(title=evil, model_label=evil, summary=summary, selections=(named, named), stability=None)
    )

    assert text.count("<script>") == 1, "our own"
    assert evil not in text
    page = Page(text)
    assert page.count("script") == 3
    assert page.text.count(evil) >= 12 + 4


def test_page_is_self_contained_and_identifiers_are_unique(whole):
    text = whole
    page = Page(text)

    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "xlink:href")]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    without_namespace = text.replace('"http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?://|@import|url\((?!#)", without_namespace)
    assert page.count("link") == 0
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    assert {link for link in links if link.startswith("#")} <= {f"#{name}" for name in identifiers}


def test_policy_allows_exactly_the_script_of_the_page(make_data, whole):
    text = whole
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    script = re.search(r"<script>(.*?)</script>", text, flags=re.DOTALL)[1]
    found = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{found}'")
    bare = render_report(make_data(**EMPTY)).replace("&#39;", "'")
    assert "script-src 'none'" in bare


def test_script_is_short_and_readable(whole):
    script = re.search(r"<script>(.*?)</script>", whole, flags=re.DOTALL)[1]
    lines = script.splitlines()
    assert len(lines) < 400
    assert max(map(len, lines)) <= 120
    assert "innerHTML" not in script


def test_data_for_the_script_is_json(whole):
    text = whole
    found = dict(re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', text))
    assert json.loads(found["rows-data"])["rows"] == 40
    assert json.loads(found["subjects-data"])["layers"] == 3


def test_every_drawing_has_an_accessible_name(whole):
    page = Page(whole)
    names = {attrs.get("aria-label") for tag, attrs in page.tags if tag == "svg"}
    assert len(names) == 9
    assert all(names)
    assert page.count("svg", role="img") == 9


def test_subjects_without_a_specific_row_are_explained_without_a_table(make_data, reading):
    profile = replace(reading.survey.subjects, best=(), num_above=0)
    page = Page(render_report(make_data(survey=replace(reading.survey, subjects=profile))))
    assert "0 of 360 pairs of a row and a subject" in page.text
    assert "the threshold is what the largest of them reaches" in page.text
    assert "The most specific row of each subject" not in page.text


def large_survey(num_layers=32, num_rows=4096):
    rng = np.random.default_rng(0)
    shape = (num_layers, num_rows)

    def votes():
        return Votes(rng.integers(0, 2800, shape), rng.standard_t(3, shape) * 1e-3, 14_042, 0)

    profile = SubjectProfile(
        np.full(57, 246), rng.random((57, num_layers)) + 0.5, (), 5.0, 0, 57 * num_layers * num_rows
    )
    names = tuple(f"subject_{s}" for s in range(57))
    return LogSurvey(14_042, votes(), votes(), votes(), votes(), subject_names=names, subjects=profile)


def test_page_of_a_large_model_stays_below_five_megabytes(make_data, tmp_path):
    path = tmp_path / "report.html"
    rows = tuple(tuple(range(layer, 4096, 10)) for layer in range(32))
    selection = NamedSelection("10.json", RowSelection(rows))
    stability = Stability(np.random.default_rng(1).random((32, 4096)), 0.5, 100)
    write_report(path, make_data(survey=large_survey(), selections=(selection,), stability=stability))
    assert 2_000_000 < path.stat().st_size < 5_000_000
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_figures_are_written_as_files(make_data, tmp_path):
    written = write_report(tmp_path / "report.html", make_data(), figures_dir=tmp_path / "figures")
    names = (
        *("votes_high", "votes_low", "magnitude_high", "magnitude_low", "attribution_by_layer", "crowding"),
        *("subjects", "stability", "training"),
    )
    assert [path.name for path in written] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert all(path.stat().st_size > 1000 for path in written)
    assert write_report(tmp_path / "again.html", make_data()) == []
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "report.html").read_bytes()


def test_forgetting_follows_the_training(tmp_path, make_data):
    history = [{"step": 0, "loss_rise": 0.0, "kl": 0.0}, {"step": 10, "loss_rise": 0.02, "kl": 0.01}]
    data = make_data(forgetting=Forgetting(history, max_kl=0.005))
    written = write_report(tmp_path / "report.html", data, figures_dir=tmp_path / "figures")
    assert [path.name for path in written[-4:]] == ["training.png", "training.svg", "forgetting.png", "forgetting.svg"]
    page = Page((tmp_path / "report.html").read_text())
    assert page.count("figure") == 8
    assert "was spent at step 10 by the KL divergence, and training stopped there." in page.text


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_missing_package_names_the_remedy(monkeypatch, make_data, package):
    data = make_data()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        InputError, match=r"^the report needs matplotlib and jinja2: run `pip install 'loki-peft\[report\]'`$"
    ):
        render_report(data)
