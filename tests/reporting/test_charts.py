import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from loki.errors import InputError
from loki.reporting.charts import (
    crowding_bars,
    forgetting_curves,
    linear_unit,
    score_ridges,
    stability_histogram,
    training_curve,
)
from loki.reporting.data import Forgetting
from loki.reporting.wording import UNKNOWN, WORDINGS


def words(picture):
    return [
        text.replace("\u202f", " ")
        for text in ET.fromstring(picture.inline()).itertext()  # noqa: S314 - made by the code under test
        if text.strip()
    ]


def curve(log):
    return training_curve(log, title="Training")


def test_curve_has_a_line_for_what_is_logged():
    log = [{"step": 1, "loss": 2.0, "learning_rate": 1e-3}, {"step": 2, "loss": 1.0, "learning_rate": 5e-4}]
    both, alone = curve(log), curve([{"step": 1, "loss": 2.0}])

    assert "learning rate (thin)" in words(both)
    assert "0.001" in words(both)
    assert "learning rate (thin)" not in words(alone)
    assert "loss" in words(alone)
    np.testing.assert_array_equal(both.figure.axes[0].lines[0].get_xydata(), [[1, 2], [2, 1]])


def test_curve_passes_over_rows_without_loss_and_breaks_at_what_is_not_finite():
    log = [{"step": step, "loss": float("nan") if step == 3 else 1.0} for step in range(1, 6)]
    svg = curve([*log, {"step": 5, "train_runtime": 3.0}]).inline()

    line = next(path for path in re.findall(r'<path d="([^"]+)"[^>]*var\(--accent', svg) if path.count("L") == 2)
    assert line.count("M") == 2


def test_curve_needs_a_loss():
    with pytest.raises(InputError, match="no row with `step` and a finite `loss`"):
        curve([{"step": 1, "learning_rate": 0.1}])


def test_crowding_bars_are_shares_up_and_down():
    high_LD, low_LD = np.array([[3, 0], [1, 0], [0, 0]]), np.array([[0, 1], [0, 2], [1, 0]])
    picture = crowding_bars(high_LD, low_LD, title="c")
    heights = [patch.get_height() for patch in picture.figure.axes[0].patches]
    np.testing.assert_allclose(heights, [0.75, 0.25, 0, -0.25, -0.5, -0.25])
    assert {"share of the highest", "share of the lowest", "dashed: equal, 33 %", "60 %"} <= set(words(picture))


def test_stability_histogram_counts_every_row():
    picture = stability_histogram(np.array([1.0, 1.0, 0.97, 0.52]), title="s")
    heights = [patch.get_height() for patch in picture.figure.axes[0].patches]
    assert [(place, height) for place, height in enumerate(heights) if height] == [(10, 1), (19, 3)]
    assert picture.figure.axes[0].lines[0].get_xdata()[0] == pytest.approx(0.8725)


def test_ridges_stand_where_the_rows_are():
    means_LD = np.full((2, 100), 1e-3)
    means_LD[1] = -1e-3
    means_LD[1, :5] = 0.5
    picture = score_ridges(means_LD, title="r")
    axes = picture.figure.axes[0]
    curves = [line.get_xydata() for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(curves) == 2
    tops = [curve[curve[:, 1].argmin(), 0] for curve in curves]
    assert tops[0] > 0 > tops[1]
    assert tops[0] == pytest.approx(-tops[1])
    depths = [layer - curve[:, 1].min() for layer, curve in enumerate(curves)]
    assert depths[1] / depths[0] == pytest.approx(0.95), "one scale for all layers"
    assert {"on average against the answer", "on average for the answer", "10⁻²", "\u221210⁻²"} <= set(words(picture))
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first layer is at the top"


def test_ridges_of_scores_without_a_sign_have_one_side():
    means_LD = np.full((2, 100), 1e-3)
    means_LD[1] = 0.5
    picture = score_ridges(means_LD, title="r", wording=WORDINGS["fisher"], signed=False)
    axes = picture.figure.axes[0]
    curves = [line.get_xydata() for line in axes.lines if len(line.get_xdata()) > 2]
    tops = [curve[curve[:, 1].argmin(), 0] for curve in curves]
    # A tenth of the rows and more lie at 10⁻³, which is the unit: at log10(2) and log10(501), give or take half a bin.
    np.testing.assert_allclose(tops, np.log10([2, 501]), atol=np.log10(501) / 160 + 1e-9)
    assert axes.get_xlim() == pytest.approx((0, np.log10(501)))
    found = set(words(picture))
    assert {"mean Fisher information of a row", "0", "10⁻²", "10⁻¹"} <= found
    assert not any("on average" in text or "\u2212" in text for text in found)


def test_ridges_of_a_signed_score_that_argues_for_nothing():
    picture = score_ridges(np.array([[-1.0, 1.0]]), title="r", wording=UNKNOWN)
    assert {"on average negative", "on average positive", "mean score of a row"} <= set(words(picture))


def test_ridges_of_nothing_but_zeros_can_be_drawn():
    assert "layer" in words(score_ridges(np.zeros((2, 3)), title="r"))


def test_linear_unit_lies_below_nine_tenths_of_the_rows():
    means_LD = np.array([[*np.full(19, -3e-4), 2e-6]])
    assert linear_unit(means_LD) == pytest.approx(1e-4)
    assert linear_unit(np.zeros((1, 2))) == 1.0


def watched(rises, divergences, right=None, **limits):
    """A history of measurements every ten steps, over a hundred questions of which so many are answered right."""
    rows = [
        {"step": 10 * n, "loss_rise": rise, "kl": kl}
        for n, (rise, kl) in enumerate(zip(rises, divergences, strict=True))
    ]
    for row, count in zip(rows, right or [], strict=False):
        row |= {"probe_accuracy": float(count), "probe_standard_error": 10 * (count * (100 - count) / 9900) ** 0.5}
    return Forgetting(rows, **limits)


def test_forgetting_has_a_panel_for_each_measure_and_its_limit():
    data = watched([0.0, 0.02, 0.06], [0.0, 0.01, 0.03], [50, 45, 40], max_loss_rise=0.05)
    picture = forgetting_curves(data, title="f")
    rise, divergence, accuracy = picture.figure.axes
    curves = [max(axes.lines, key=lambda line: line.get_linewidth()) for axes in picture.figure.axes]
    np.testing.assert_array_equal(curves[0].get_xydata(), [[0, 0], [10, 0.02], [20, 0.06]])
    np.testing.assert_array_equal(curves[1].get_xydata(), [[0, 0], [10, 0.01], [20, 0.03]])
    np.testing.assert_array_equal(curves[2].get_xydata(), [[0, 50], [10, 45], [20, 40]])

    def dashed(axes):
        return [set(line.get_ydata()) for line in axes.lines if line.is_dashed()]

    assert [dashed(axes) for axes in (rise, divergence, accuracy)] == [[{0.05}], [], []]
    shown = words(picture)
    assert [text for text in shown if "limit" in text] == ["dashed: limit 0.05"]
    assert {"rise of the loss, nats per token", "probe accuracy, %", "bars: standard error", "step"} <= set(shown)

    # By hand: 100 · √(0.4 · 0.6 / 99), and as far up as down.
    (bars,) = accuracy.collections
    low, high = bars.get_segments()[2][:, 1]
    assert (40 - low, high - 40) == (pytest.approx(4.9237, abs=1e-4), pytest.approx(4.9237, abs=1e-4))


@pytest.mark.parametrize("limit", [1e-6, 0.5, 40.0])
def test_a_limit_is_in_sight_wherever_it_lies(limit):
    (axes, _) = forgetting_curves(watched([0.0, -0.02], [0.0, 0.1], max_loss_rise=limit), title="f").figure.axes
    low, high = axes.get_ylim()
    assert low < -0.02 < limit < high


def test_forgetting_breaks_at_what_is_not_finite_and_leaves_out_what_never_was():
    data = watched([0.0, float("nan"), 0.02], [float("nan")] * 3, max_kl=0.1)
    (axes,) = forgetting_curves(data, title="f").figure.axes
    line = max(axes.lines, key=lambda line: line.get_linewidth())
    np.testing.assert_array_equal(line.get_ydata(), [0, np.nan, 0.02])
    with pytest.raises(InputError, match="history has no finite value: pass that of a training's record"):
        forgetting_curves(watched([float("inf")], [float("nan")]), title="f")


def test_a_model_that_has_not_moved_can_be_drawn():
    assert "0" in words(forgetting_curves(watched([0.0], [0.0]), title="f"))
