from itertools import combinations, permutations

import numpy as np
import pytest

from loki.reporting.statistics import (
    NO_SUBJECT,
    SubjectTally,
    bin_rows,
    crowding,
    histogram_of_shares,
    layer_histograms,
    layer_shares,
    similar_order,
    symmetric_log,
)


def meeting_rate(high_LD, low_LD):
    """By definition: over all pairs of a high and a low vote, the share that is in one layer."""
    layers = range(len(high_LD))
    pairs = high_LD.sum() * low_LD.sum()
    return sum(high_LD[layer].sum() * low_LD[layer].sum() for layer in layers) / pairs


def test_crowding_by_hand():
    # High votes: 3 in layer 0, 1 in layer 1; low votes: 1 in layer 0, 1 in layer 1. 3·1 + 1·1 of 4·2 pairs meet.
    found = crowding(np.array([[3, 0], [1, 0]]), np.array([[0, 1], [0, 1]]))
    assert found.rate == pytest.approx(4 / 8)
    # No row has both kinds of votes, so a pair meets when two different rows do: one of the other three.
    assert found.chance == pytest.approx(1 / 3)
    assert found.ratio == pytest.approx(1.5)


@pytest.mark.parametrize("seed", range(4))
def test_chance_is_the_mean_over_all_ways_to_deal_the_rows(seed):
    rng = np.random.default_rng(seed)
    high, low = rng.integers(0, 5, 6), rng.integers(0, 5, 6)
    rates = [
        meeting_rate(high[list(order)].reshape(2, 3), low[list(order)].reshape(2, 3))
        for order in permutations(range(6))
    ]
    found = crowding(high.reshape(2, 3), low.reshape(2, 3))
    assert found.chance == pytest.approx(np.mean(rates))
    assert found.rate == pytest.approx(meeting_rate(high.reshape(2, 3), low.reshape(2, 3)))
    assert min(rates) - 1e-12 <= found.chance_range[0] <= found.chance_range[1] <= max(rates) + 1e-12


def test_crowding_tells_layers_from_rows():
    rng = np.random.default_rng(0)
    # The same rows are high and low, but they lie anywhere: no crowding.
    votes_LD = rng.integers(0, 2, (8, 200)) * rng.integers(1, 50, (8, 200))
    anywhere = crowding(votes_LD, votes_LD)
    assert anywhere.chance_range[0] <= anywhere.rate <= anywhere.chance_range[1]
    # Different rows of the same two layers: crowding. Of different layers: avoidance.
    high_LD, low_LD = np.zeros((8, 200)), np.zeros((8, 200))
    high_LD[:2, :20], low_LD[:2, 100:130] = 3, 2
    crowded = crowding(high_LD, low_LD)
    assert crowded.rate == pytest.approx(0.5)
    assert crowded.rate > crowded.chance_range[1]
    apart = crowding(high_LD, np.roll(low_LD, 4, axis=0))
    assert apart.rate == 0 < apart.chance_range[0]


def test_crowding_is_seeded_and_needs_votes():
    rng = np.random.default_rng(1)
    high_LD, low_LD = rng.integers(0, 9, (4, 30)), rng.integers(0, 9, (4, 30))
    assert crowding(high_LD, low_LD) == crowding(high_LD, low_LD)
    assert crowding(high_LD, low_LD).chance_range != crowding(high_LD, low_LD, seed=5).chance_range
    assert crowding(high_LD, np.zeros((4, 30))) is None
    assert crowding(np.zeros((4, 30)), low_LD) is None
    assert crowding(np.array([[2]]), np.array([[3]])).chance == 1


def tally_of(scores_NLD, subject_N, num_subjects, pieces=1, **options):
    tally = SubjectTally(subject_N, num_subjects, **options)
    for piece_NLD in np.array_split(scores_NLD, pieces):
        tally.add(piece_NLD)
    return tally


def z_by_definition(values_N, members_N):
    """Against the mean over all draws of as many prompts, one by one."""
    draws = [np.mean(values_N[list(chosen)]) for chosen in combinations(range(len(values_N)), members_N.sum())]
    return (values_N[members_N].mean() - np.mean(draws)) / np.std(draws)


def test_subjects_against_the_plain_definition():
    rng = np.random.default_rng(3)
    scores_NLD = rng.standard_t(3, size=(8, 2, 3)).astype(np.float32)
    subject_N = np.array([0, 1, 1, 0, 1, NO_SUBJECT, 0, 1])
    scores_NLD[subject_N == 0, 1, 2] *= 50
    profile = tally_of(scores_NLD, subject_N, 2).result()

    magnitudes_NLD = np.abs(scores_NLD.astype(np.float64))
    assert profile.counts_S.tolist() == [3, 4]
    assert profile.num_pairs == 2 * 2 * 3
    for subject in (0, 1):
        means_L = magnitudes_NLD[subject_N == subject].mean(axis=(0, 2))
        np.testing.assert_allclose(profile.layer_means_SL[subject], means_L)
    np.testing.assert_allclose(profile.relative_SL, profile.layer_means_SL / profile.layer_means_SL.mean(axis=0))

    shuffled_N = np.random.default_rng(0).permutation(subject_N)
    z_SLD, shuffled_SLD = (
        np.array(
            [
                [
                    [z_by_definition(magnitudes_NLD[:, layer, row], labels_N == s) for row in range(3)]
                    for layer in (0, 1)
                ]
                for s in (0, 1)
            ]
        )
        for labels_N in (subject_N, shuffled_N)
    )
    assert profile.threshold == pytest.approx(shuffled_SLD.max())
    assert profile.num_above == (z_SLD > shuffled_SLD.max()).sum()
    best = profile.best[0]
    assert (best.subject, best.layer, best.row) == (0, 1, 2)
    assert best.z_score == pytest.approx(z_SLD[0, 1, 2])
    own_N = subject_N == 0
    assert best.ratio == pytest.approx(magnitudes_NLD[own_N, 1, 2].mean() / magnitudes_NLD[~own_N, 1, 2].mean())


def test_subjects_do_not_depend_on_the_pieces():
    scores_NLD = np.random.default_rng(0).normal(size=(20, 2, 5)).astype(np.float32)
    subject_N = np.arange(20) % 3
    whole, parts = (tally_of(scores_NLD, subject_N, 3, pieces).result() for pieces in (1, 7))
    np.testing.assert_array_equal(whole.layer_means_SL, parts.layer_means_SL)
    assert whole.threshold == parts.threshold
    assert whole.best == parts.best


def test_subjects_that_mean_nothing_stay_about_the_threshold():
    scores_NLD = np.random.default_rng(0).standard_t(3, size=(60, 4, 50)).astype(np.float32)
    profile = tally_of(scores_NLD, np.arange(60) % 4, 4).result()
    assert profile.num_above < 20 < profile.num_pairs / 10
    assert 2 < profile.threshold < 8


def test_rows_that_are_alike_in_all_prompts_have_no_z_score():
    scores_NLD = np.full((9, 1, 3), 0.1, dtype=np.float32)
    scores_NLD[:3, 0, 2] = 0.7
    profile = tally_of(scores_NLD, np.repeat([0, 1, 2], 3), 3).result()
    assert [(best.subject, best.row) for best in profile.best] == [(0, 2)]
    assert profile.best[0].z_score == pytest.approx(z_by_definition(scores_NLD[:, 0, 2], np.arange(9) < 3))


def test_row_that_nothing_else_uses_has_an_infinite_ratio():
    scores_NLD = np.zeros((8, 1, 2), dtype=np.float32)
    scores_NLD[:4, 0, 1] = 1
    profile = tally_of(scores_NLD, np.repeat([0, 1], 4), 2).result()
    assert profile.best[0].ratio == float("inf")
    np.testing.assert_array_equal(profile.relative_SL, [[2], [0]])


def test_relative_means_of_a_silent_layer_are_one():
    scores_NLD = np.ones((4, 2, 2), dtype=np.float32)
    scores_NLD[:, 1] = 0
    assert (tally_of(scores_NLD, np.array([0, 0, 1, 1]), 2).result().relative_SL == 1).all()


def test_similar_order_puts_like_profiles_side_by_side():
    profiles_SL = np.array([[0.0, 1, 2], [5, 1, 0], [0, 1, 2.1], [5.2, 1, 0], [2.5, 1, 1]])
    order = similar_order(profiles_SL).tolist()
    assert {frozenset(order[:2]), frozenset(order[3:])} == {frozenset({0, 2}), frozenset({1, 3})}
    assert order[2] == 4
    assert similar_order(profiles_SL + 7).tolist() == order


def test_symmetric_log():
    np.testing.assert_allclose(symmetric_log(np.array([-9.0, 0, 0.9, 99]), 1.0), [-1, 0, np.log10(1.9), 2])
    np.testing.assert_allclose(symmetric_log(np.array([0.09]), 0.01), [1])


def test_layer_histograms_count_every_row_once():
    means_LD = np.random.default_rng(0).normal(size=(3, 50)) ** 3
    counts_LB, edges = layer_histograms(means_LD, 0.1, 10)
    assert counts_LB.shape == (3, 10)
    assert (counts_LB.sum(axis=1) == 50).all()
    np.testing.assert_allclose(edges, -edges[::-1], atol=1e-15)
    assert edges[5] == pytest.approx(0, abs=1e-15)
    # An independent count of what lies in the fourth bin: back from the axis to attributions.
    low, high = (np.sign(edge) * 0.1 * (10 ** abs(edge) - 1) for edge in edges[3:5])
    assert counts_LB[1, 3] == ((means_LD[1] >= low) & (means_LD[1] < high)).sum() > 0


def test_layer_histograms_of_scores_without_a_sign_begin_at_zero():
    """On the axis log10(1 + x) the means stand at 0, 1 and 1, and at 2, 2 and 1."""
    counts_LB, edges = layer_histograms(np.array([[0.0, 9, 9], [99, 99, 9]]), 1.0, 4, signed=False)
    np.testing.assert_allclose(edges, [0, 0.5, 1, 1.5, 2])
    assert counts_LB.tolist() == [[1, 0, 2, 0], [0, 0, 1, 2]]


def test_layer_histograms_of_nothing_but_zeros():
    counts_LB, _ = layer_histograms(np.zeros((2, 5)), 1.0, 4)
    assert counts_LB.tolist() == [[0, 0, 5, 0]] * 2


def test_bins_are_means_over_neighbours_and_the_last_may_be_short():
    values_LD = np.arange(2 * 577, dtype=np.float64).reshape(2, 577)

    binned_LB, bin_size = bin_rows(values_LD, 288)

    assert bin_size == 3
    assert binned_LB.shape == (2, 193)
    assert binned_LB[0, 0] == 1.0
    assert binned_LB[0, -1] == 576.0
    assert binned_LB[1, 1] == 577 + 4


@pytest.mark.parametrize(
    ("num_rows", "num_bins"), [(1, 1), (288, 288), (289, 145), (576, 288), (4096, 274), (8192, 283)]
)
def test_number_of_bins(num_rows, num_bins):
    assert bin_rows(np.zeros((1, num_rows)), 288)[0].shape == (1, num_bins)


def test_layer_shares_sum_to_one_and_survive_no_votes():
    np.testing.assert_array_equal(layer_shares(np.array([[0.5, 0.25], [0.25, 0.0]])), [0.75, 0.25])
    np.testing.assert_array_equal(layer_shares(np.zeros((2, 3))), [0.0, 0.0])


def test_histogram_of_shares_has_both_ends():
    assert histogram_of_shares([0, 0.05, 0.5, 1, 1], 4).tolist() == [2, 0, 1, 2]
