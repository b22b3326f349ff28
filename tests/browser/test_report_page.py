"""The report in a real browser: it loads in silence, answers to pointer, finger and keys, and fits page and paper."""

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from loki.log import schema
from loki.log.assembly import write_header
from loki.log.schema import LogHeader
from loki.reporting.data import Forgetting, ReportData
from loki.reporting.html import write_report
from loki.selection.run import select_to_file
from loki.stages import report

pytestmark = pytest.mark.browser

CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NUM_PROMPTS, NUM_LAYERS, NUM_ROWS = 30, 12, 1000
SUBJECTS = ("anatomy", "astronomy", "virology")


@pytest.fixture(scope="module", name="scores_NLD")
def make_scores():
    rng = np.random.default_rng(0)
    scale_LD = np.exp(rng.normal(size=(NUM_LAYERS, NUM_ROWS))) * 1e-4
    scores_NLD = rng.normal(size=(NUM_PROMPTS, NUM_LAYERS, NUM_ROWS)) * scale_LD
    for subject in range(len(SUBJECTS)):
        scores_NLD[subject::3] *= np.linspace(1, 1 + subject, NUM_LAYERS)[:, None]
    return scores_NLD.astype(np.float32)


def write_page(directory, name, scores_NLD, settings) -> Path:
    """The report of a log, with the rows selected from it beside it."""
    path = directory / f"{name}.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset(schema.SCORES, data=scores_NLD)
        ids = [f"{SUBJECTS[n % 3]}/test/{n}" for n in range(NUM_PROMPTS)]
        file.create_dataset(schema.PROMPT_IDS, data=ids, dtype=h5py.string_dtype())
        file[schema.PROMPT_INDEX] = np.arange(NUM_PROMPTS)
        write_header(file, LogHeader({}, "Tiny", "made up", settings, NUM_LAYERS, NUM_ROWS, num_prompts=NUM_PROMPTS))
    select_to_file(path, directory / "10.json", quota=10)
    return report(path, [directory / "10.json"])


@pytest.fixture(scope="module", name="page_path")
def make_page(scores_NLD, tmp_path_factory) -> Path:
    return write_page(tmp_path_factory.mktemp("report"), "kva", scores_NLD, {})


@pytest.fixture(scope="module", name="damage_path")
def make_damage_page(scores_NLD, tmp_path_factory) -> Path:
    return write_page(tmp_path_factory.mktemp("report"), "damage", np.abs(scores_NLD), {"score": "damage"})


@pytest.fixture(scope="module", name="browser")
def start_browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(name="open_page")
def make_open_page(browser, page_path):
    """Opens the report; afterwards, nothing may have been complained of or asked for."""
    contexts, complaints, requests = [], [], []

    def open_page(width=1100, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url for url in requests if not url.startswith("data:")} == {page_path.as_uri()}


def expected_lines(scores_NLD, layer, row, page_path, kind="signed"):
    """What the tooltip has to say of a row, counted here prompt by prompt."""
    votes = dict.fromkeys(("high", "low"), 0)
    count = NUM_LAYERS * NUM_ROWS * 5 // 100
    for scores_LD in scores_NLD:
        values = (np.abs(scores_LD) if kind == "magnitude" else scores_LD).reshape(-1)
        order = np.argsort(values)
        votes["low"] += layer * NUM_ROWS + row in order[:count]
        votes["high"] += layer * NUM_ROWS + row in order[-count:]
    positions = json.loads((page_path.parent / "10.json").read_text())
    return votes, row in positions[layer]


def tip_of(figure):
    """The tooltip's title and lines, in plain spaces and signs."""
    tip = figure.locator(".tip")
    assert tip.is_visible()
    title = tip.locator("b").inner_text()
    lines = {
        line.locator("span").first.inner_text(): line.locator("span").last.inner_text()
        for line in tip.locator("> div").all()
    }
    return title, {plain(name): plain(value) for name, value in lines.items()}


def plain(text):
    return re.sub(r"\s", " ", text).replace("−", "-")


def number(text):
    """`-1.65 × 10⁻⁴` as a float."""
    match = re.fullmatch(r"(-?[\d.]+)(?: × 10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+))?", text)
    exponent = (match[2] or "⁰").translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    return float(match[1]) * 10.0 ** int(exponent)


def require_right(figure, scores_NLD, page_path, kind="signed"):
    """The tooltip's numbers are those of the row that it names; returns layer and row."""
    title, lines = tip_of(figure)
    layer, row = map(int, re.fullmatch(r"Layer (\d+), row (\d+)", title).groups())
    votes, selected = expected_lines(scores_NLD, layer, row, page_path, kind)
    names = ("highest 5 %", "lowest 5 %") if kind == "signed" else ("largest 5 %", "smallest 5 %")
    for name, direction in zip(names, ("high", "low"), strict=True):
        share = 100 * votes[direction] / NUM_PROMPTS
        assert lines[name] == f"{votes[direction]} of 30 prompts ({share:.1f} %)".replace("(0.0 %)", "(0 %)")
    values_N = scores_NLD[:, layer, row].astype(np.float64)
    assert number(lines["mean attribution"]) == pytest.approx(values_N.mean(), rel=6e-3)
    assert number(lines["mean magnitude"]) == pytest.approx(np.abs(values_N).mean(), rel=6e-3)
    assert lines["selected"] == ("yes" if selected else "no")
    assert 0 <= int(lines["chosen in resamples"].removesuffix(" %")) <= 100
    return layer, row


def rows_figure(page, votes="signed"):
    return page.locator(f"figure[data-votes={votes}]")


def at(locator, across, down):
    box = locator.bounding_box()
    return box["x"] + across * box["width"], box["y"] + down * box["height"]


@pytest.mark.parametrize("votes", ["signed", "magnitude"])
def test_pointer_shows_the_row_under_it(open_page, scores_NLD, page_path, votes):
    page = open_page()
    figure = rows_figure(page, votes)
    assert figure.locator(".tip").is_hidden()
    for panel, across, down in ((0, 0.2503, 0.63), (1, 0.9, 0.1)):
        hit = figure.locator(".hit").nth(panel)
        hit.scroll_into_view_if_needed()
        page.mouse.move(*at(hit, across, down))
        assert require_right(figure, scores_NLD, page_path, votes) == (int(down * NUM_LAYERS), int(across * NUM_ROWS))
    page.mouse.move(2, 2)
    assert figure.locator(".tip").is_hidden()


def test_pointer_finds_the_row_that_is_drawn_there(open_page, scores_NLD):
    """The cell of the map under the cursor's mark is the one that the numbers speak of."""
    page = open_page()
    figure = rows_figure(page)
    hit = figure.locator(".hit").first
    frame = page.locator("figure[data-votes=signed] svg").first.bounding_box()
    box = hit.bounding_box()
    # 40 of 640 units from the left, 456 wide.
    assert box["x"] - frame["x"] == pytest.approx(frame["width"] * 40 / 640, abs=1)
    assert box["width"] == pytest.approx(frame["width"] * 456 / 640, abs=1)
    image = page.locator("figure[data-votes=signed] svg image.theme-light").first.bounding_box()
    for side in ("x", "y", "width", "height"):
        assert image[side] == pytest.approx(box[side], abs=2)


def test_keys_move_the_cursor(open_page, scores_NLD, page_path):
    page = open_page()
    figure = rows_figure(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "hit"
    layer, row = require_right(figure, scores_NLD, page_path)
    counts = [expected_lines(scores_NLD, layer, other, page_path)[0]["high"] for other in (row, 0, 1, 2)]
    assert counts[0] >= max(counts), "it starts at the row with most high votes"

    def press(key):
        page.keyboard.press(key)
        return require_right(figure, scores_NLD, page_path)

    assert press("Home") == (layer, 0)
    assert press("ArrowLeft") == (layer, 0)
    assert press("ArrowRight") == (layer, 1)
    assert press("PageDown") == (layer, 65)
    assert press("PageUp") == (layer, 1)
    assert press("End") == (layer, NUM_ROWS - 1)
    for expected in (*range(layer - 1, -1, -1), 0):
        assert press("ArrowUp") == (expected, NUM_ROWS - 1)
    assert press("ArrowDown") == (1, NUM_ROWS - 1)
    for expected in (*range(2, NUM_LAYERS), NUM_LAYERS - 1):
        assert press("ArrowDown") == (expected, NUM_ROWS - 1)
    spoken = figure.locator("[role=status]").inner_text()
    assert plain(spoken).startswith("Layer 11, row 999, highest 5 % ")
    assert figure.locator("[role=status]").get_attribute("aria-live") == "polite"
    page.keyboard.press("Escape")
    assert figure.locator(".tip").is_hidden()
    assert (
        figure.locator(".hit")
        .first.get_attribute("aria-label")
        .startswith("Among the 5\u00a0% highest: 1000 by 12 cells.")
    )


def test_keyboard_brings_the_cell_into_view(open_page):
    page = open_page(height=260)
    figure = rows_figure(page)
    figure.locator(".hit").first.focus()
    for key in ["ArrowUp"] * NUM_LAYERS + ["ArrowDown"] * NUM_LAYERS + ["ArrowUp"] * NUM_LAYERS:
        page.keyboard.press(key)
        for locator in (figure.locator(".tip"), figure.locator(".cell").first):
            box = locator.bounding_box()
            assert -1 <= box["y"] <= box["y"] + box["height"] <= 261


def test_finger_shows_a_row_until_the_next_touch(open_page, scores_NLD, page_path):
    page = open_page(360, 740, has_touch=True, is_mobile=True, device_scale_factor=2)
    figure = rows_figure(page)
    hit = figure.locator(".hit").first
    hit.scroll_into_view_if_needed()
    page.touchscreen.tap(*at(hit, 0.5, 0.5))
    require_right(figure, scores_NLD, page_path)
    box = figure.locator(".tip").bounding_box()
    assert 0 <= box["x"] <= box["x"] + box["width"] <= 360
    page.locator("h1").tap()
    assert figure.locator(".tip").is_hidden()
    lens = figure.locator(".lens svg")
    lens.scroll_into_view_if_needed()
    page.touchscreen.tap(*at(lens, 0.4, 0.5))
    require_right(figure, scores_NLD, page_path)
    page.locator("h1").tap()
    assert figure.locator(".tip").is_hidden()


def test_lens_shows_each_row_by_itself(open_page, scores_NLD, page_path):
    page = open_page()
    figure = rows_figure(page)
    hit = figure.locator(".hit").first
    hit.scroll_into_view_if_needed()
    page.mouse.move(*at(hit, 0.5005, 1.5 / NUM_LAYERS))
    lens = figure.locator(".lens svg")
    assert "rows 468 to 531 of layer 1" in lens.text_content()
    heights = [float(bar.get_attribute("height")) for bar in lens.locator("rect.high").all()]
    marks = [mark.get_attribute("visibility") == "visible" for mark in lens.locator("circle").all()]
    assert len(heights) == len(marks) == 64
    for place in range(0, 64, 7):
        votes, selected = expected_lines(scores_NLD, 1, 468 + place, page_path)
        assert (heights[place] > 0) == (votes["high"] > 0)
        assert marks[place] == selected
        if votes["high"]:
            # A logarithmic scale of as many decades as the map has: all prompts are 52 units high.
            decades = int(figure.get_attribute("data-decades"))
            assert heights[place] == pytest.approx(52 * (1 + np.log10(votes["high"] / 30) / decades), abs=0.01)

    lens.scroll_into_view_if_needed()
    box = lens.bounding_box()
    page.mouse.move(box["x"] + box["width"] * (40 + 456 * 10.5 / 64) / 640, box["y"] + box["height"] / 2)
    assert require_right(figure, scores_NLD, page_path) == (1, 478)
    assert "rows 468 to 531 of layer 1" in lens.text_content(), "bars stay while the pointer is on them"


def test_subject_map_answers(open_page, scores_NLD):
    page = open_page()
    figure = page.locator("figure[data-kind=subjects]")
    hit = figure.locator(".hit")
    hit.scroll_into_view_if_needed()
    names = set()
    means_SL = np.array([np.abs(scores_NLD[s::3]).mean(axis=(0, 2)) for s in range(3)])
    for down in (0.1, 0.5, 0.9):
        page.mouse.move(*at(hit, 0.6, down))
        title, lines = tip_of(figure)
        name, layer = title.split(", layer ")
        names.add(name)
        assert layer == "7"
        ratio = means_SL[SUBJECTS.index(name), 7] / means_SL[:, 7].mean()
        assert float(lines["of the layer’s mean"].removesuffix(" ×")) == pytest.approx(ratio, abs=0.006)
    assert names == set(SUBJECTS)


@pytest.mark.parametrize("width", [360, 768, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_the_screen_and_follows_the_theme(open_page, width, scheme):
    page = open_page(width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    page_light, ink_light = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (page_light > ink_light) == (scheme == "light")
    for theme in ("light", "dark"):
        assert page.locator(f"svg image.theme-{theme}").first.is_visible() == (theme == scheme)


def test_prints_on_paper(open_page):
    page = open_page(color_scheme="dark")
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for locator in (".lens", ".hint", ".tip"):
        assert page.locator(locator).first.is_hidden()
    assert page.locator("svg image.theme-light").first.is_visible()


def test_reads_well_without_script(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("figure").count() == 6
    assert page.locator(".lens").count() == page.locator(".hit").count() == 0
    assert page.locator(".hint").first.is_hidden()
    assert page.locator(".result").first.is_visible()


def test_nothing_moves_for_those_who_do_not_want_it(open_page):
    page = open_page(reduced_motion="reduce")
    hit = rows_figure(page).locator(".hit").first
    hit.scroll_into_view_if_needed()
    page.mouse.move(*at(hit, 0.5, 0.5))
    assert page.evaluate("getComputedStyle(document.querySelector('figure .tip')).animationName") == "none"


@pytest.mark.parametrize("width", [360, 1100])
def test_forgetting_is_drawn_within_its_frame(browser, tmp_path, width):
    """Three panels; no word leaves the drawing or lies on another, on a telephone either."""
    history = [
        {"step": 20 * n, "loss_rise": 0.031 * n, "kl": 1e-5 * n, "probe_accuracy": 45 - n, "probe_standard_error": 4.7}
        for n in range(6)
    ]
    data = ReportData("A run", "Tiny", forgetting=Forgetting(history, max_loss_rise=0.1, max_kl=2.5e-5))
    write_report(tmp_path / "report.html", data)
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    frame = page.locator("svg").bounding_box()
    boxes = [(text.text_content(), text.bounding_box()) for text in page.locator("svg text").all()]
    page.close()
    assert {"dashed: limit 0.1", "bars: standard error", "100"} <= {words.strip() for words, _ in boxes}
    for words, box in boxes:
        assert frame["x"] <= box["x"] <= box["x"] + box["width"] <= frame["x"] + frame["width"], words
        assert frame["y"] <= box["y"] <= box["y"] + box["height"] <= frame["y"] + frame["height"] + 1, words
    for index, (words, one) in enumerate(boxes):
        for others, two in boxes[:index]:
            apart = [
                one[side] + one[size] <= two[side] + 0.5 or two[side] + two[size] <= one[side] + 0.5
                for side, size in (("x", "width"), ("y", "height"))
            ]
            assert any(apart), (words, others)


@pytest.mark.parametrize("width", [360, 1100])
def test_damage_is_called_so_and_has_one_sign(browser, scores_NLD, damage_path, width):
    """Tooltip, lens and spoken words have the score's own names, and no line on magnitudes, which would be the same."""
    page, complaints = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(damage_path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("figure[data-kind=rows]").count() == 1
    figure = rows_figure(page)
    figure.locator(".hit").first.focus()
    page.keyboard.press("Home")
    title, lines = tip_of(figure)
    layer = int(re.fullmatch(r"Layer (\d+), row 0", title)[1])
    assert list(lines) == ["highest 5 %", "lowest 5 %", "mean damage", "chosen in resamples", "selected"]
    votes, selected = expected_lines(np.abs(scores_NLD), layer, 0, damage_path)
    assert lines["highest 5 %"].startswith(f"{votes['high']} of 30 windows (")
    assert lines["lowest 5 %"].startswith(f"{votes['low']} of 30 windows (")
    assert number(lines["mean damage"]) == pytest.approx(np.abs(scores_NLD[:, layer, 0]).mean(), rel=6e-3)
    assert lines["selected"] == ("yes" if selected else "no")
    assert plain(figure.locator(".lens svg").text_content()).startswith(
        "highest 5 %• selectedlowest 5 %100 % of windows"
    )
    seen = page.locator("main").inner_text().split("Provenance")[0]
    page.close()
    assert complaints == []
    assert not re.search("attribut|prompt|answer", seen, flags=re.IGNORECASE)


def test_foreign_script_is_refused(page_path, browser, tmp_path):
    """The policy lets only the page's own script run."""
    text = page_path.read_text().replace("</main>", "</main><script>document.title = 'taken over'</script>")
    (tmp_path / "page.html").write_text(text)
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert page.title() == "Where Tiny keeps what it knows"
    assert page.locator(".hit").count() == 5
    page.close()
