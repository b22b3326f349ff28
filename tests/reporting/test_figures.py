import base64
import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.image import imread

from loki.errors import ArtefactError, InputError
from loki.reporting.drawing import MAX_BINS
from loki.reporting.figures import (
    bin_rows,
    density_heatmap,
    format_number,
    layer_shares,
    selection_map,
    training_curve,
)
from loki.rows import RowSelection


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


@pytest.fixture(name="frequency_LD")
def make_frequency():
    shares_LD = np.random.default_rng(0).integers(0, 200, (5, 64)) / 200
    shares_LD[0] = 0.0
    shares_LD[4, 10] = 0.005
    return shares_LD


def test_bins_are_means_over_neighbours_and_the_last_may_be_short():
    values_LD = np.arange(2 * 577, dtype=np.float64).reshape(2, 577)

    binned_LB, bin_size = bin_rows(values_LD)

    assert bin_size == 3
    assert binned_LB.shape == (2, 193)
    assert binned_LB[0, 0] == 1.0
    assert binned_LB[0, -1] == 576.0
    assert binned_LB[1, 1] == 577 + 4


@pytest.mark.parametrize(
    ("num_rows", "num_bins"),
    [(1, 1), (MAX_BINS, MAX_BINS), (MAX_BINS + 1, 145), (576, 288), (4096, 274), (8192, 283)],
)
def test_number_of_bins(num_rows, num_bins):
    assert bin_rows(np.zeros((1, num_rows)))[0].shape == (1, num_bins)


def test_layer_shares_sum_to_one_and_survive_no_votes():
    np.testing.assert_array_equal(layer_shares(np.array([[0.5, 0.25], [0.25, 0.0]])), [0.75, 0.25])
    np.testing.assert_array_equal(layer_shares(np.zeros((2, 3))), [0.0, 0.0])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_heatmap_has_a_cell_for_every_row_and_leaves_exact_zeros_blank(frequency_LD, theme):
    cells_LD4, _ = map_cells(density_heatmap(frequency_LD, None, title="t"), 5, 64, theme)

    assert cells_LD4.shape == (5, 64, 4)
    np.testing.assert_array_equal(cells_LD4[..., 3] > 0, frequency_LD > 0)


def test_heatmap_colour_is_monotone_in_the_share():
    shares_D = np.array([[0.001, 0.01, 0.1, 1.0]])
    svg = density_heatmap(shares_D, None, title="t")
    light = map_cells(svg, 1, 4, "light")[0][0, :, :3].sum(axis=-1)
    dark = map_cells(svg, 1, 4, "dark")[0][0, :, :3].sum(axis=-1)

    assert (np.diff(light) < 0).all()
    assert (np.diff(dark) > 0).all()


def test_heatmap_marks_the_selected_rows_and_no_others(frequency_LD):
    selection = RowSelection.from_lists([[0, 63], [5], [], [7, 8], [1]])
    svg = density_heatmap(frequency_LD, selection, title="t")
    _, marks_LD4 = map_cells(svg, 5, 64)

    assert [list(np.flatnonzero(row[:, 3])) for row in marks_LD4] == selection.as_lists()
    assert "selected rows" in words(svg)
    assert "selected rows" not in words(density_heatmap(frequency_LD, None, title="t"))


def test_heatmap_labels(frequency_LD):
    labels = words(density_heatmap(frequency_LD, None, title="t"))

    for label in (
        "layer",
        "row",
        "never",
        "0.1 %",
        "1 %",
        "10 %",
        "100 %",
        "share of all votes",
        "dashed: equal, 20 %",
    ):
        assert label in labels
    assert "63" in labels


def test_heatmap_says_where_its_scale_ends_for_very_rare_rows():
    shares_LD = np.zeros((1, 8192))
    shares_LD[0, ::50] = 1 / 14_000
    assert any(label.startswith("≤ 0.01 %") for label in words(density_heatmap(shares_LD, None, title="t")))


def test_heatmap_without_a_vote_is_blank():
    cells_LD4, _ = map_cells(density_heatmap(np.zeros((2, 8)), None, title="t"), 2, 8)
    assert not cells_LD4[..., 3].any()


def test_title_is_escaped_and_is_the_accessible_name(frequency_LD):
    svg = density_heatmap(frequency_LD, None, title='<script>"&')
    assert 'role="img" aria-label="&lt;script&gt;&quot;&amp;"' in svg
    assert "<script" not in svg


@pytest.mark.parametrize("shares", [[[0.5, 1.5]], [[-0.1, 0.2]], [[float("nan"), 0.2]]])
def test_frequencies_must_be_shares(shares):
    with pytest.raises(
        InputError, match="must be shares of prompts, 0 to 1: divide the votes by the number of prompts"
    ):
        density_heatmap(np.array(shares), None, title="t")


def test_frequencies_must_be_layers_by_rows():
    with pytest.raises(InputError, match=r"shape \(3,\); they must be \(layers, rows\)"):
        density_heatmap(np.zeros(3), None, title="t")


def test_selection_of_another_model_is_refused(frequency_LD):
    with pytest.raises(ArtefactError, match="have 1 layers"):
        density_heatmap(frequency_LD, RowSelection(((0,),)), title="t")
    with pytest.raises(ArtefactError, match="names row 9"):
        selection_map(RowSelection(((9,),)), 9)


def test_selection_map_shows_exactly_the_selected_rows():
    selection = RowSelection.from_lists([[0, 3], [], [31]])
    svg = selection_map(selection, 32)
    cells_LD4, _ = map_cells(svg, 3, 32)

    assert [list(np.flatnonzero(row[:, 3])) for row in cells_LD4] == selection.as_lists()
    assert len(images(svg)) == 1, "one row a cell needs no colour scale"
    assert "Map of the 3 selected rows in 3 layers" in svg


def test_selection_map_of_many_rows_is_coloured_by_the_share_selected():
    selection = RowSelection.from_lists([[0, 1, 2, 15, 4095]])
    svg = selection_map(selection, 4096)
    cells_LB4, _ = map_cells(svg, 1, 274)

    assert list(np.flatnonzero(cells_LB4[0, :, 3])) == [0, 1, 273]
    assert cells_LB4[0, 0, :3].sum() < cells_LB4[0, 1, :3].sum()
    assert "≥ 20 %" in words(svg), "the last bin has one row, which must not set the scale"


def test_curve_has_a_line_for_what_is_logged():
    log = [{"step": 1, "loss": 2.0, "learning_rate": 1e-3}, {"step": 2, "loss": 1.0, "learning_rate": 5e-4}]
    both, alone = training_curve(log), training_curve([{"step": 1, "loss": 2.0}])

    assert "learning rate (thin)" in words(both)
    assert "0.001" in words(both)
    assert "learning rate (thin)" not in words(alone)
    assert "loss" in words(alone)


def test_curve_passes_over_rows_without_loss_and_breaks_at_what_is_not_finite():
    log = [{"step": step, "loss": float("nan") if step == 3 else 1.0} for step in range(1, 6)]
    svg = training_curve([*log, {"step": 5, "train_runtime": 3.0}])

    assert "over 5 logged steps" in svg
    line = next(path for path in re.findall(r'<path d="([^"]+)"[^>]*var\(--accent', svg) if path.count("L") == 2)
    assert line.count("M") == 2


def test_curve_needs_a_loss():
    with pytest.raises(InputError, match="no row with `step` and a finite `loss`"):
        training_curve([{"step": 1, "learning_rate": 0.1}])


def test_drawings_follow_the_theme_and_refer_to_nothing_outside(frequency_LD):
    for svg in (density_heatmap(frequency_LD, None, title="t"), training_curve([{"step": 1, "loss": 1.0}])):
        assert "http" not in svg
        assert "currentColor" in svg
        assert "DejaVu" not in svg
        assert "#010203" not in svg
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in re.findall(r'href="([^"]*)', svg))


def test_drawings_are_the_same_every_time(frequency_LD):
    assert density_heatmap(frequency_LD, None, title="t") == density_heatmap(frequency_LD, None, title="t")


def test_drawing_leaves_settings_of_matplotlib_alone(frequency_LD):
    import matplotlib

    before = dict(matplotlib.rcParams)
    density_heatmap(frequency_LD, None, title="t")
    assert dict(matplotlib.rcParams) == before


def test_drawing_needs_neither_pyplot_nor_torch():
    program = (
        "import sys, numpy; from loki.reporting.figures import density_heatmap; "
        "density_heatmap(numpy.ones((1, 2)), None, title='t'); "
        "sys.exit(len({'matplotlib.pyplot', 'torch'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-3, "\u22123"),
        (4096, "4096"),
        (2_626_560, "2\u202f626\u202f560"),
        (0.61234, "0.6123"),
        (12345.6, "12\u202f346"),
        (3.2e-5, "3.2\u2009\u00d7\u200910⁻⁵"),
        (-1e-12, "\u22121\u2009\u00d7\u200910⁻¹²"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_for_reading(value, text):
    assert format_number(value) == text


def test_missing_matplotlib_names_the_remedy(monkeypatch, frequency_LD):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'loki-peft\[report\]'"):
        density_heatmap(frequency_LD, None, title="t")
