import math

import numpy as np
import pytest

from loki.study.equal_score import Curve
from loki.study.pairs import PLACES, compare_pair, mean_differences

WEIGHTS = {"wiki": np.array([1.0, 3.0])}


def curve(learned_SPN, forgotten_SPM):
    return Curve(np.array(learned_SPN, dtype=float), {"wiki": np.array(forgotten_SPM, dtype=float)})


def gain(one, other):
    """In what was learned, over the logarithm of what was forgotten."""
    (learned, forgotten), (other_learned, other_forgotten) = one, other
    points = np.log(forgotten), learned, np.log(other_forgotten), other_learned
    return mean_differences(*(np.array(values, dtype=float)[None] for values in points))[0]


def test_two_curves_by_hand():
    """Over 0.1 to 0.4 nats, two doublings, one curve rises from 10 to 30 and the other stays at 10."""
    assert gain(([10, 30], [0.1, 0.4]), ([10, 10], [0.1, 0.4])) == pytest.approx(10)
    # Of the second only the upper half is in common, where the first stands between 20 and 30.
    assert gain(([10, 30], [0.1, 0.4]), ([10, 10], [0.2, 0.8])) == pytest.approx(15)
    assert gain(([10, 10], [0.2, 0.8]), ([10, 30], [0.1, 0.4])) == pytest.approx(-15)


def test_against_a_fine_sum_over_the_divergences():
    one = ([31.0, 47.0, 40.0], [0.01, 0.03, 0.07])
    other = ([20.0, 44.0, 46.0], [0.02, 0.035, 0.09])

    at = np.linspace(math.log(0.02), math.log(0.07), 100_001)
    heights = [np.interp(at, np.log(forgotten), learned) for learned, forgotten in (one, other)]
    assert gain(one, other) == pytest.approx((heights[0] - heights[1]).mean(), abs=0.02)


def test_many_curves_at_once_are_each_by_itself():
    """Against numpy's own interpolation, with points in any order, some of them at the same place."""
    draw = np.random.default_rng(2)
    x_RP, other_x_RP = (draw.integers(0, 6, (200, num_points)).astype(float) for num_points in (3, 4))
    x_RP[:, 1], other_x_RP[:, 1] = x_RP[:, 0], other_x_RP[:, 2] + 0.5
    y_RP, other_y_RP = draw.normal(size=x_RP.shape), draw.normal(size=other_x_RP.shape)
    y_RP[:, 1] = y_RP[:, 0]
    y_RP[::7, 2] = -math.inf
    other_x_RP[::5, 0] = x_RP[::10, 2] = -math.inf  # the logarithm of a change that moved nothing
    with np.errstate(invalid="ignore"):
        found_R = mean_differences(x_RP, y_RP, other_x_RP, other_y_RP)
    assert 20 < np.isnan(found_R).sum() < 180
    assert np.isfinite(found_R[5::10]).sum() > 5
    assert np.isnan(found_R[::10]).all()
    for found, x_P, y_P, other_x_P, other_y_P in zip(found_R, x_RP, y_RP, other_x_RP, other_y_RP, strict=True):
        ends = max(x_P.min(), other_x_P.min()), min(x_P.max(), other_x_P.max())
        if math.isnan(found):
            assert ends[0] >= ends[1] or ends[0] == -math.inf
            continue
        at = np.linspace(*ends, PLACES)
        heights = [np.interp(at, np.sort(x), y[np.argsort(x)]) for x, y in ((x_P, y_P), (other_x_P, other_y_P))]
        assert found == pytest.approx(np.trapezoid(heights[0] - heights[1], at) / (ends[1] - ends[0]), abs=1e-12)


def test_curves_without_a_divergence_in_common_have_no_gain():
    assert math.isnan(gain(([1, 2], [0.1, 0.2]), ([1, 2], [0.3, 0.4])))
    assert math.isnan(gain(([1, 2], [0.1, 0.2]), ([1, 2], [0.2, 0.4])))


def test_a_pair_by_hand():
    """Two seeds, four items; the base has nothing right, and its point counts nowhere."""
    one = curve(
        [[[0] * 4, [100, 0, 0, 0], [100] * 4], [[0] * 4, [100, 100, 100, 0], [100] * 4]],
        [[[0, 0], [0.1, 0.1], [0.2, 0.6]], [[0, 0], [0.1, 0.1], [0.4, 0.4]]],
    )
    other = curve(
        [[[0] * 4, [0] * 4, [100, 0, 0, 0]], [[0] * 4, [0] * 4, [100, 0, 0, 0]]],
        [[[0, 0], [0.1, 0.1], [0.25, 0.25]], [[0, 0], [0.1, 0.1], [0.15, 0.55]]],
    )
    held_out = np.array([[[1.0, 2.0]], [[3.0, 4.0]]]), np.array([[[1.5, 2.5]], [[3.0, 3.0]]])
    found = compare_pair(one, other, held_out, WEIGHTS)
    # Parts: 50 against 0; wholes: 100 against 25.
    assert found.learned.value == pytest.approx(62.5)
    assert found.held_out.value == pytest.approx(0.0)
    # Windows weigh 1 and 3: 0.5 and 0.4, against 0.25 and 0.45.
    assert found.forgotten_ratio["wiki"].value == pytest.approx(0.45 / 0.35)
    # Both have 0.1 nats for the part; the whole of the other is reached first.
    share = math.log(3.5) / math.log(4.5)
    assert found.learned_at_equal_divergence["wiki"].value == pytest.approx((50 - 0 + 50 + 50 * share - 25) / 2)


def test_what_both_share_is_no_noise():
    """The same items right in both, and seeds that differ alike: the difference is certain."""
    draw = np.random.default_rng(0)
    learned_SPN = 100.0 * (draw.random((2, 3, 50)) < 0.4)
    forgotten_SPM = draw.gamma(4, 0.01, (2, 3, 20)) * np.array([0, 1, 2])[None, :, None]
    held_out_SPH = draw.random((2, 2, 30)) + np.array([1, 0])[:, None]
    one, other = Curve(learned_SPN, {"wiki": 2 * forgotten_SPM}), Curve(learned_SPN, {"wiki": forgotten_SPM})
    found = compare_pair(one, other, (held_out_SPH - 0.25, held_out_SPH), {"wiki": np.ones(20)})
    assert (found.learned.low, found.learned.value, found.learned.high) == (0, 0, 0)
    assert (found.held_out.low, found.held_out.high) == pytest.approx((-0.25, -0.25))
    ratio = found.forgotten_ratio["wiki"]
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((2, 2, 2))
    found = compare_pair(one, other, (held_out_SPH, held_out_SPH), {"wiki": np.ones(20)})
    ratio = found.forgotten_ratio_at_equal_loss["wiki"]
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((2, 2, 2))


def test_intervals_are_those_of_the_plain_bootstrap():
    """Against resamples drawn one by one, with other random numbers."""
    draw = np.random.default_rng(1)
    shares = np.array([0.0, 0.3, 0.5])[None, :, None]
    learned = [100.0 * (draw.random((3, 3, 60)) < share * shares) for share in (1.0, 0.8)]
    forgotten = [draw.gamma(4, 0.01, (3, 3, 20)) * np.array([0, 1, 3])[None, :, None] for _ in range(2)]
    lost = [draw.random((3, 2, 40)) + np.array([1.0, 0.2 * number])[:, None] for number in range(2)]
    curves = [Curve(values, {"wiki": moved}) for values, moved in zip(learned, forgotten, strict=True)]
    found = compare_pair(*curves, (lost[0], lost[1]), {"wiki": np.ones(20)})
    plain = {"learned": [], "equal": [], "held_out": [], "ratio": [], "at_equal_loss": []}
    for _ in range(2000):
        seeds, items = draw.integers(0, 3, 3), draw.integers(0, 60, 60)
        windows, examples = draw.integers(0, 20, 20), draw.integers(0, 40, 40)
        l_P = [values[seeds][:, 1:, items].mean(axis=(0, 2)) for values in learned]
        f_P = [values[seeds][:, 1:, windows].mean(axis=(0, 2)) for values in forgotten]
        plain["learned"].append((l_P[0] - l_P[1]).mean())
        plain["equal"].append(gain((l_P[0], f_P[0]), (l_P[1], f_P[1])))
        h_P = [values[seeds][:, :, examples].mean(axis=(0, 2)) for values in lost]
        plain["held_out"].append(h_P[0][1] - h_P[1][1])
        plain["ratio"].append(f_P[0][-1] / f_P[1][-1])
        plain["at_equal_loss"].append(ratio_at_equal_loss((h_P[0], f_P[0]), (h_P[1], f_P[1])))
    estimates = {
        "learned": found.learned,
        "equal": found.learned_at_equal_divergence["wiki"],
        "held_out": found.held_out,
        "ratio": found.forgotten_ratio["wiki"],
        "at_equal_loss": found.forgotten_ratio_at_equal_loss["wiki"],
    }
    for name, values in plain.items():
        low, high = np.percentile(values, [2.5, 97.5])
        assert abs(estimates[name].low - low) < 0.1 * (high - low), name
        assert abs(estimates[name].high - high) < 0.1 * (high - low), name


def ratio_at_equal_loss(one, other):
    """Two points a curve: a fine sum over the losses that both reach."""
    (lost, forgotten), (other_lost, other_forgotten) = one, other
    at = np.linspace(max(lost[1], other_lost[1]), min(lost[0], other_lost[0]), 1001)
    logs = [
        np.interp(at, losses[::-1], np.log(moved)[::-1])
        for losses, moved in ((lost, forgotten), (other_lost, other_forgotten))
    ]
    return math.exp((logs[0] - logs[1]).mean())


def at_equal_loss(lost, other_lost, forgotten=(0.1, 0.2, 0.8), other_forgotten=(0.1, 0.2, 0.8)):
    """The estimate for curves of one example, one window and these points."""
    still = [[[0]] * (1 + len(forgotten))]
    one, other = (
        Curve(np.array(still, dtype=float), {"wiki": np.array([[[0.0], *([value] for value in values)]])})
        for values in (forgotten, other_forgotten)
    )
    held_out = tuple(np.array([[[value] for value in values]], dtype=float) for values in (lost, other_lost))
    found = compare_pair(one, other, held_out, {"wiki": np.ones(1)})
    return found.forgotten_ratio_at_equal_loss["wiki"].value


def test_divergence_at_an_equal_held_out_loss_by_hand():
    """From 3 to 1 nats of loss one model moves 0.1 to 0.4, the other 0.4 to 1.6: always four times as far."""
    assert at_equal_loss((3, 2, 1), (3, 2, 1), (0.1, 0.2, 0.4), (0.4, 0.8, 1.6)) == pytest.approx(1 / 4)
    # Of the second only 2 to 1 is in common, where the first has 0.2 to 0.4 and the second 0.1 to 0.4.
    found = at_equal_loss((3, 2, 1), (2, 1.5, 1), (0.1, 0.2, 0.4), (0.1, 0.2, 0.4))
    assert found == pytest.approx(math.exp((math.log(2) + 0) / 2))
    assert math.isnan(at_equal_loss((3, 2.5, 2), (2, 1.5, 1)))


def test_a_loss_that_rises_again_is_reached_where_it_was_first():
    """The third point moves the model further and learns less than the second."""
    expected = math.exp(-0.75 * math.log(2))  # half a doubling from 0.1 in the mean, against one and a quarter
    for last in (2, 1):
        assert at_equal_loss((3, 1, last), (3, 2, 1)) == pytest.approx(expected)


def test_losses_of_the_whole_change_alone_say_nothing_of_an_equal_one():
    assert math.isnan(at_equal_loss((1,), (1,)))
    assert math.isnan(at_equal_loss((3, 2, 1), (1,)))


def test_a_change_that_moved_nothing_has_no_equal_divergence():
    still = curve([[[0] * 4, [0] * 4, [0] * 4]], [[[0, 0], [0, 0], [0, 0]]])
    moved = curve([[[0] * 4, [0] * 4, [100] * 4]], [[[0, 0], [0.1, 0.1], [0.2, 0.2]]])
    found = compare_pair(still, moved, (np.zeros((1, 2, 2)), np.zeros((1, 2, 2))), WEIGHTS)
    assert math.isnan(found.learned_at_equal_divergence["wiki"].value)
    assert found.forgotten_ratio["wiki"].value == 0
    assert math.isnan(
        compare_pair(moved, still, (np.zeros((1, 2, 2)), np.zeros((1, 2, 2))), WEIGHTS).forgotten_ratio["wiki"].low
    )
