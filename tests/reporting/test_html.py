import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from loki.errors import ArtefactError, InputError
from loki.reporting import ReportData, render_report, write_report
from loki.reporting.html import table_row, verdict
from loki.results import Comparison, Measure, Result
from loki.rows import RowSelection

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
        if not {"style", "svg"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def count(self, tag, **attributes):
        return sum(name == tag and attributes.items() <= attrs.items() for name, attrs in self.tags)


def comparison(value, error, *, higher_is_better=True):
    return Comparison("x", None, None, Measure(value, error), higher_is_better=higher_is_better)


def make_data(num_layers=3, num_rows=32, **changes):
    rng = np.random.default_rng(1)
    values = {
        "title": "A run",
        "model_label": "Tiny model (Q4_1, dequantised)",
        "summary": Result(
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
        ),
        "frequency_high_LD": rng.integers(0, 40, (num_layers, num_rows)) / 200,
        "frequency_low_LD": rng.integers(0, 40, (num_layers, num_rows)) / 200,
        "selection": RowSelection(tuple((0, 2, num_rows - 1) for _ in range(num_layers))),
        "training_log": [
            {"step": 5, "loss": 2.25, "learning_rate": 1e-3},
            {"step": 10, "loss": 1.5, "learning_rate": 0.0},
        ],
    }
    return ReportData(**(values | changes))


EMPTY = {
    "summary": Result("summary", {}, {}, versions={}),
    "frequency_high_LD": None,
    "frequency_low_LD": None,
    "selection": None,
    "training_log": [],
}


def test_all_parts_are_shown():
    page = Page(render_report(make_data()))

    assert page.count("svg") == page.count("figure") == page.count("figcaption") == 4
    for number in range(1, 5):
        assert f"Figure {number}." in page.text
    assert page.text.count("How to read this.") == 4
    for part in (
        "A run",
        "Tiny model (Q4_1, dequantised)",
        "Before and after",
        "Figures",
        "Provenance",
        "20251",
        "2.13.0",
    ):
        assert part in page.text


def test_every_comparison_has_its_row_with_a_scope():
    data = make_data()
    page = Page(render_report(data))

    assert page.count("th", scope="row") == len(data.summary.comparisons) == 3
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


def test_verdict_is_in_colour_words_and_arrow():
    text = render_report(make_data())
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
    ("missing", "heading"),
    [
        ({"frequency_high_LD": None}, "highest attributions"),
        ({"frequency_low_LD": None}, "lowest attributions"),
        ({"selection": None}, "Which rows are selected"),
        ({"training_log": []}, "Training."),
        ({"training_log": [{"step": 3, "loss": float("nan")}]}, "Training."),
    ],
)
def test_a_missing_figure_is_left_out_and_the_others_are_renumbered(missing, heading):
    assert heading in Page(render_report(make_data())).text
    page = Page(render_report(make_data(**missing)))

    assert heading not in page.text
    assert page.count("figure") == 3
    assert "Figure 3." in page.text
    assert "Figure 4." not in page.text


def test_without_data_only_the_title_block_remains():
    page = Page(render_report(make_data(**EMPTY)))

    assert "A run" in page.text
    for tag in ("table", "figure", "dl", "details", "h2"):
        assert page.count(tag) == 0


def test_heading_of_the_drawings_names_only_what_is_there():
    assert "Rows and training" in Page(render_report(make_data())).text
    alone = Page(render_report(make_data(**(EMPTY | {"training_log": [{"step": 1, "loss": 2.0}]})))).text
    assert "Rows" not in alone
    assert "Training" in alone


def test_stage_without_figures_and_missing_seed_are_left_out():
    data = make_data()
    assert "evaluate" not in Page(render_report(data)).text
    assert "seed" not in Page(render_report(make_data(summary=Result("summary", {"a": 1}, {}, versions={})))).text


def test_figures_are_written_for_reading_and_settings_as_given():
    page = Page(render_report(make_data()))
    assert "num prompts 171" in page.text
    assert "seconds per prompt 0.9313" in page.text
    assert "trainable parameters 2\u202f626\u202f560" in render_report(make_data()).replace("</dt><dd>", " ")
    assert "learning rate 1e-05" in page.text


def test_figures_nest_and_take_measures_lists_and_loose_values():
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


def test_captions_say_what_is_in_the_data():
    frequency_LD = np.zeros((3, 32))
    frequency_LD[2, :6], frequency_LD[0, :2] = 0.5, 0.5
    text = Page(render_report(make_data(frequency_high_LD=frequency_LD))).text.replace("\u00a0", " ")

    assert "How often each of the 32 rows in 3 layers is among the 5 % highest." in text
    assert "Most votes fall on layers 2 and 0, which take 75.0 % and 25.0 % of them;" in text
    assert "an equal share would be 33.3 %." in text
    assert "91.7 % of the rows are never among them." in text
    assert "3 of 32 rows are selected in every layer, 9 in all (9.4 %)." in text
    assert "The loss goes from 2.25 at step 5 to 1.5 at step 10." in text


def test_selection_without_frequencies_claims_no_number_of_rows():
    selection = RowSelection(((0, 2), (30,)))
    text = Page(render_report(make_data(**(EMPTY | {"selection": selection})))).text
    assert "Between 1 and 2 rows are selected in a layer, 3 in all." in text
    assert "The map ends at the highest selected row." in text


def test_whatever_comes_from_outside_is_escaped():
    evil = "<script>alert(1)</script>"
    summary = Result(
        "summary",
        {evil: evil},
        {evil: {evil: evil}},
        (Comparison(evil, None, Measure(1.0), None, note=evil),),
        versions={evil: evil},
    )
    text = render_report(make_data(title=evil, model_label=evil, summary=summary))

    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 12
    assert Page(text).text.count(evil) == 12


def test_page_is_self_contained_and_identifiers_are_unique():
    text = render_report(make_data())
    page = Page(text)

    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "xlink:href")]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert page.count("script") == page.count("link") == 0
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    assert {link for link in links if link.startswith("#")} <= {f"#{name}" for name in identifiers}


def test_every_drawing_has_an_accessible_name():
    page = Page(render_report(make_data()))
    names = {attrs.get("aria-label") for tag, attrs in page.tags if tag == "svg"}
    assert len(names) == 4
    assert all(names)
    assert page.count("svg", role="img") == 4


def test_page_of_a_large_model_stays_small(tmp_path):
    path = tmp_path / "report.html"
    rows = tuple(tuple(range(layer, 4096, 10)) for layer in range(32))
    write_report(path, make_data(32, 4096, selection=RowSelection(rows)))
    assert path.stat().st_size < 3_000_000
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_selection_of_another_model_is_refused():
    with pytest.raises(ArtefactError, match="have 2 layers, the model has 3"):
        render_report(make_data(selection=RowSelection(((0,), (1,)))))


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_missing_package_names_the_remedy(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        InputError, match=r"^the report needs matplotlib and jinja2: run `pip install 'loki-peft\[report\]'`$"
    ):
        render_report(make_data())
