import base64
import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from loki.errors import ArtefactError, InputError
from loki.reporting.charts import training_curve
from loki.reporting.drawing import WIDTH
from loki.reporting.maps import colour_scale, density_maps, subject_map
from loki.rows import RowSelection

TITLES = ("highs", "lows")


def images(svg, theme="light"):
    """The PNGs of a drawing as RGBA arrays: the map first, then the colour scale."""
    found = re.findall(rf'<image[^>]*class="theme-{theme}"[^>]*>', svg)
    data = [re.search(r'href="data:image/png;base64,([^"]+)"', tag).group(1) for tag in found]
    return [imread(io.BytesIO(base64.b64decode(text))) for text in data]


def map_cells(svg, num_layers, num_bins, theme="light"):
    """One colour for each cell, read in the upper part of each layer's band, and the same for its marks."""
    pixels = images(svg, theme)[0]
    assert pixels.shape[0] == num_layers * 20
    columns = pixels[:, :: -(-1152 // num_bins)]
    assert columns.shape[1] == num_bins
    return columns[2::20], columns[15::20]


def words(svg):
    return [
        text.replace("\u202f", " ")
        for text in ET.fromstring(svg).itertext()  # noqa: S314 - made by the code under test
        if text.strip()
    ]


def maps(high_LD, low_LD=None, selection=None, titles=TITLES):
    pictures = density_maps(high_LD, high_LD if low_LD is None else low_LD, selection, titles=titles)
    return [picture.inline() for picture in pictures]


@pytest.fixture(name="shares_LD")
def make_shares():
    shares_LD = np.random.default_rng(0).integers(0, 200, (5, 64)) / 200
    shares_LD[0] = 0.0
    shares_LD[4, 10] = 0.005
    return shares_LD


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_map_has_a_cell_for_every_row_and_leaves_exact_zeros_blank(shares_LD, theme):
    for svg, cells_LD in zip(maps(shares_LD, shares_LD[::-1]), (shares_LD, shares_LD[::-1]), strict=True):
        cells_LD4, _ = map_cells(svg, 5, 64, theme)
        assert cells_LD4.shape == (5, 64, 4)
        np.testing.assert_array_equal(cells_LD4[..., 3] > 0, cells_LD > 0)


def test_colour_is_monotone_in_the_share_and_the_same_in_both_maps():
    shares_D = np.array([[0.001, 0.01, 0.1, 1.0]])
    high, low = maps(shares_D, shares_D[:, ::-1])
    light = map_cells(high, 1, 4, "light")[0][0, :, :3].sum(axis=-1)
    dark = map_cells(high, 1, 4, "dark")[0][0, :, :3].sum(axis=-1)

    assert (np.diff(light) < 0).all()
    assert (np.diff(dark) > 0).all()
    np.testing.assert_array_equal(map_cells(low, 1, 4)[0][0, ::-1], map_cells(high, 1, 4)[0][0])


def test_both_maps_share_one_scale():
    # 0.1 % occurs in the low map only, and sets the scale of both: 10 % is at two thirds of three decades.
    high, low = maps(np.array([[0.1, 1.0]]), np.array([[0.001, 1.0]]))
    expected = np.array(colormaps["magma"](0.9 + (0.14 - 0.9) * 2 / 3))
    np.testing.assert_allclose(map_cells(high, 1, 2)[0][0, 0], expected, atol=1 / 255)
    assert colour_scale(np.array([[0.1, 1.0]]), np.array([[0.001, 1.0]])) == (3, 0.001)
    assert "0.1 %" in words(low)


def test_map_marks_the_selected_rows_and_no_others(shares_LD):
    selection = RowSelection.from_lists([[0, 63], [5], [], [7, 8], [1]])
    for svg in maps(shares_LD, selection=selection):
        _, marks_LD4 = map_cells(svg, 5, 64)
        assert [list(np.flatnonzero(row[:, 3])) for row in marks_LD4] == selection.as_lists()
    assert "selected rows" in words(maps(shares_LD, selection=selection)[1])
    assert "selected rows" not in words(maps(shares_LD)[1])


def test_marks_of_many_rows_are_stronger_the_more_rows_are_selected():
    selection = RowSelection.from_lists([[0, 1, 2, 4]])
    _, marks_LB4 = map_cells(maps(np.ones((1, 576)), selection=selection)[0], 1, 288)
    whole, second, third, none = marks_LB4[0, :4, 3]
    assert whole == 1
    assert second == third == pytest.approx(0.6, abs=1 / 255)
    assert none == 0


def test_labels(shares_LD):
    high, low = maps(shares_LD)
    for svg, labels in (
        (high, ("highs", "layer", "share of these votes", "dashed: equal, 20 %", "63")),
        (low, ("lows", "layer", "row", "never", "0.1 %", "1 %", "10 %", "100 %", "share of prompts")),
    ):
        assert set(labels) <= set(words(svg))
    assert "never" not in words(high), "one legend for both"


def test_bars_are_the_layers_shares_of_the_votes(shares_LD):
    picture, _ = density_maps(shares_LD, shares_LD[::-1], None, titles=TITLES)
    bars = [patch.get_width() for patch in picture.figure.axes[1].patches]
    np.testing.assert_allclose(bars, shares_LD.sum(axis=1) / shares_LD.sum())


def test_place_of_the_cells_is_that_of_the_map(shares_LD):
    for picture in density_maps(shares_LD, shares_LD, None, titles=TITLES):
        left, top, width, height = picture.map_box
        box = picture.figure.axes[0].get_position()
        np.testing.assert_allclose(
            [box.x0 * WIDTH, (1 - box.y1) * picture.height, box.width * WIDTH, box.height * picture.height],
            [left, top, width, height],
        )


def test_map_says_where_its_scale_ends_for_very_rare_rows():
    shares_LD = np.zeros((1, 8192))
    shares_LD[0, ::50] = 1 / 14_000
    assert any(label.startswith("≤ 0.01 %") for label in words(maps(shares_LD)[1]))


def test_map_without_a_vote_is_blank():
    cells_LD4, _ = map_cells(maps(np.zeros((2, 8)))[0], 2, 8)
    assert not cells_LD4[..., 3].any()


def test_title_is_escaped_and_is_the_accessible_name(shares_LD):
    svg = maps(shares_LD, titles=('<script>"&', "lows"))[0]
    assert 'role="img" aria-label="&lt;script&gt;&quot;&amp;"' in svg
    assert "<script" not in svg


@pytest.mark.parametrize("shares", [[[0.5, 1.5]], [[-0.1, 0.2]], [[float("nan"), 0.2]]])
def test_frequencies_must_be_shares(shares):
    for pair in ((shares, [[0.1, 0.2]]), ([[0.1, 0.2]], shares)):
        with pytest.raises(
            InputError, match="must be shares of prompts, 0 to 1: divide the votes by the number of prompts"
        ):
            density_maps(np.array(pair[0]), np.array(pair[1]), None, titles=TITLES)


def test_frequencies_must_be_layers_by_rows():
    with pytest.raises(InputError, match=r"shape \(3,\); they must be \(layers, rows\)"):
        density_maps(np.zeros(3), np.zeros(3), None, titles=TITLES)


def test_selection_of_another_model_is_refused(shares_LD):
    with pytest.raises(ArtefactError, match="have 1 layers"):
        maps(shares_LD, selection=RowSelection(((0,),)))


def test_subject_map_has_a_cell_for_each_pair_in_its_colour():
    relative_SL = np.array([[1.0, 0.5], [2.0, 1.0], [1.0, 1.0]])
    svg = subject_map(relative_SL, ["us_history", "anatomy", "virology"], title="s").inline()
    cells_SL3 = images(svg)[0][12::24, 12::24, :3]
    assert cells_SL3.shape == (3, 2, 3)
    expected_SL3 = colormaps["PuOr_r"]([[0.5, 0.0], [1.0, 0.5], [0.5, 0.5]])[..., :3]
    np.testing.assert_allclose(cells_SL3, expected_SL3, atol=1 / 255)
    assert {"us history", "anatomy", "virology", "0.5 ×", "1 ×", "2 ×"} <= set(words(svg))
    dark = images(svg, "dark")[0][12::24, 12::24, :3].sum(axis=-1)
    assert dark[0, 0] < min(dark[0, 1], dark[1, 0]), "on a dark page the middle recedes"


def test_subject_map_says_where_its_colours_end():
    svg = subject_map(np.array([[9.0, 1.0], [0.0, 1.0]]), ["a", "b"], title="s").inline()
    assert {"≤ 0.25 ×", "≥ 4 ×"} <= set(words(svg))


def test_drawings_follow_the_theme_and_refer_to_nothing_outside(shares_LD):
    curve = training_curve([{"step": 1, "loss": 1.0}], title="c").inline()
    for svg in (*maps(shares_LD), curve):
        assert "http" not in svg
        assert "currentColor" in svg
        assert "DejaVu" not in svg
        assert "#211f24" not in svg
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in re.findall(r'href="([^"]*)', svg))
    assert "var(--high" in maps(shares_LD)[0]
    assert "var(--low" in maps(shares_LD)[1]


def test_rounding_leaves_the_places_of_images_alone(shares_LD):
    """A map of 64 rows fills its frame to a hundredth of a unit."""
    tag = re.search(r"<image[^>]*>", maps(shares_LD)[0])[0]
    scale = float(re.search(r'transform="matrix\(([\d.]+)', tag)[1])
    assert scale * float(re.search(r'width="([\d.]+)"', tag)[1]) == pytest.approx(456, abs=0.01)


def test_drawings_are_the_same_every_time(shares_LD):
    assert maps(shares_LD) == maps(shares_LD)


def test_files_stand_alone_in_the_light_theme(shares_LD, tmp_path):
    picture, _ = density_maps(shares_LD, shares_LD, None, titles=TITLES)
    before = picture.inline()
    png, svg = picture.save(tmp_path / "votes.high")
    assert [path.name for path in (png, svg)] == ["votes.high.png", "votes.high.svg"]
    pixels = imread(png)
    assert pixels.shape[1] == pytest.approx(WIDTH / 72 * 200, abs=1)
    assert (pixels[0, 0, :3] == 1).all(), "on white"
    text = svg.read_text()
    root = ET.fromstring(text)  # noqa: S314 - made by the code under test
    assert root.tag.endswith("svg")
    assert text.count("<image") == 1, "the map of the dark theme is left out"
    assert "var(--" not in text
    assert "currentColor" not in text
    assert "#b35806" in text
    assert picture.inline() == before, "saving changes nothing in the drawing"
    first = png.read_bytes(), svg.read_bytes()
    assert tuple(path.read_bytes() for path in picture.save(tmp_path / "votes.high")) == first


def test_drawing_leaves_settings_of_matplotlib_alone(shares_LD, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    maps(shares_LD)
    density_maps(shares_LD, shares_LD, None, titles=TITLES)[0].save(tmp_path / "x")
    assert dict(matplotlib.rcParams) == before


def test_drawing_needs_no_pyplot():
    program = (
        "import sys, numpy; from loki.reporting.maps import density_maps; "
        "density_maps(numpy.ones((1, 2)), numpy.ones((1, 2)), None, titles=('a', 'b'))[0].inline(); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_missing_matplotlib_names_the_remedy(monkeypatch, shares_LD):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'loki-peft\[report\]'"):
        density_maps(shares_LD, shares_LD, None, titles=TITLES)
