import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from plain_selection import plain_ballot, plain_groups

from loki.selection import votes as module
from loki.selection.votes import Ballot, VoteCounter, count_votes, mark_votes

BALLOTS = [
    Ballot(scope, direction, 2, score)
    for scope in ("layer", "model")
    for direction in ("lowest", "highest")
    for score in ("signed", "magnitude")
]


def chosen(scores, ballot):
    """Indices that one prompt votes for."""
    (marks_NC,) = mark_votes(np.asarray(scores, dtype=np.float32)[None], [ballot])
    return np.flatnonzero(marks_NC[0])


def votes_of(scores_NLD, ballot):
    (votes,) = count_votes([np.asarray(scores_NLD, dtype=np.float32)], [ballot])
    return votes


@pytest.mark.parametrize(
    ("direction", "scores", "expected"),
    [
        ("lowest", [3, -1, 2, 0], {1, 3}),
        ("highest", [3, -1, 2, 0], {0, 2}),
        ("lowest", [5, 1, 1, 1], {1, 2}),
        ("highest", [1, 5, 5, 5], {2, 3}),
        ("lowest", [0, 1, 0, 1], {0, 2}),
        ("highest", [0, 1, 0, 1], {1, 3}),
        ("lowest", [0.0, -0.0, 1.0, 0.0], {0, 1}),
    ],
)
def test_choice_by_hand_where_ties_go_to_the_lower_index_and_mirrored(direction, scores, expected):
    assert set(chosen(scores, Ballot("layer", direction, 2))) == expected


@settings(deadline=None)
@given(hnp.arrays(np.float32, st.integers(2, 12), elements=st.integers(-3, 3).map(float)), st.integers(1, 12))
def test_highest_mirrors_lowest(scores, count):
    """The highest of some scores are the lowest of the negated scores read backwards."""
    count = min(count, scores.size)
    highest = chosen(scores, Ballot("layer", "highest", count))
    lowest = chosen(-scores[::-1], Ballot("layer", "lowest", count))
    assert highest.tolist() == (scores.size - 1 - lowest)[::-1].tolist()


def test_votes_by_hand():
    scores_NLD = [
        [[1, 2, 3], [9, 8, 7]],
        [[3, 1, 2], [0, 0, 0]],
        [[-5, 4, 4], [4, -6, 4]],
    ]
    votes = votes_of(scores_NLD, Ballot("layer", "lowest", 1))
    assert votes.counts_LD.tolist() == [[2, 1, 0], [0, 1, 1]]
    assert votes.mean_scores_LD.tolist() == [[-1 / 3, 7 / 3, 3], [13 / 3, 2 / 3, 11 / 3]]
    assert (votes.num_prompts, votes.num_abstentions) == (3, 1)
    assert votes.counts_LD.dtype == np.int64
    assert votes.mean_scores_LD.dtype == np.float64


def test_model_wide_votes_by_hand():
    scores_NLD = [[[1, 2, 3], [-1, 0, 7]], [[5, 5, 5], [5, 5, 4]]]
    lowest, highest = (votes_of(scores_NLD, Ballot("model", direction, 2)) for direction in ("lowest", "highest"))
    assert lowest.counts_LD.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert highest.counts_LD.tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("ballot", BALLOTS, ids=str)
def test_equal_scores_abstain_and_are_counted(ballot):
    scores_NLD = np.zeros((3, 2, 4), dtype=np.float32)
    scores_NLD[0] = 5.0
    scores_NLD[1, 1] = -0.0
    scores_NLD[2, 0, 3] = 1.0
    votes = votes_of(scores_NLD, ballot)
    # The third prompt differs in its first layer only, which is enough for the whole model to differ.
    assert votes.num_abstentions == (5 if ballot.scope == "layer" else 2)
    assert votes.counts_LD.sum() == ballot.count


def test_layers_of_one_prompt_abstain_alone():
    votes = votes_of([[[1, 1, 1], [1, 2, 1]]], Ballot("layer", "highest", 1))
    assert votes.counts_LD.tolist() == [[0, 0, 0], [0, 1, 0]]


dyadic = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(2, 5)),
    elements=st.integers(-8, 8).map(lambda n: n / 4),
)


@settings(deadline=None)
@given(dyadic, st.data())
def test_chunked_equals_whole(scores_NLD, data):
    """Quarters of small numbers add up exactly, so that even the means are equal to the last bit."""
    cuts = data.draw(st.lists(st.integers(1, len(scores_NLD)), unique=True).map(sorted))
    chunks = [chunk for chunk in np.split(scores_NLD, cuts) if len(chunk)]
    for whole, chunked in zip(count_votes([scores_NLD], BALLOTS), count_votes(chunks, BALLOTS), strict=True):
        assert np.array_equal(whole.counts_LD, chunked.counts_LD)
        assert np.array_equal(whole.mean_scores_LD, chunked.mean_scores_LD)
        assert (whole.num_prompts, whole.num_abstentions) == (chunked.num_prompts, chunked.num_abstentions)


@settings(deadline=None)
@given(dyadic)
def test_several_ballots_in_one_pass_equal_one_at_a_time(scores_NLD):
    together = count_votes(iter([scores_NLD]), BALLOTS)
    for ballot, votes in zip(BALLOTS, together, strict=True):
        alone = votes_of(scores_NLD, ballot)
        assert np.array_equal(votes.counts_LD, alone.counts_LD)
        assert votes.num_abstentions == alone.num_abstentions


@settings(deadline=None)
@given(dyadic)
def test_every_prompt_votes_for_exactly_count_rows_or_abstains(scores_NLD):
    num_layers = scores_NLD.shape[1]
    for ballot in BALLOTS:
        votes = votes_of(scores_NLD, ballot)
        num_groups = len(scores_NLD) * (num_layers if ballot.scope == "layer" else 1)
        # The smallest drawn group has two rows, so that none has fewer than the two votes of a ballot.
        assert votes.counts_LD.sum() == ballot.count * (num_groups - votes.num_abstentions)
        assert votes.counts_LD.max() <= len(scores_NLD)


def test_min_max_normalising_changes_no_vote():
    """The paper normalises each layer's scores of a prompt; votes depend on ranks only."""
    scores_NLD = np.random.default_rng(0).normal(size=(9, 3, 12))
    low, high = scores_NLD.min(-1, keepdims=True), scores_NLD.max(-1, keepdims=True)
    for direction in ("lowest", "highest"):
        ballot = Ballot("layer", direction, 4)
        plain, normalised = (votes_of(scores, ballot) for scores in (scores_NLD, (scores_NLD - low) / (high - low)))
        assert np.array_equal(plain.counts_LD, normalised.counts_LD)


def test_means_are_summed_in_double_precision():
    """In float32, 2²⁴ + 1 is 2²⁴ again and the ones would be lost."""
    scores_NLD = np.ones((5, 1, 2), dtype=np.float32)
    scores_NLD[0, 0, 0] = 2.0**24
    votes = votes_of(scores_NLD, Ballot("layer", "lowest", 1))
    assert votes.mean_scores_LD.tolist() == [[(2**24 + 4) / 5, 1.0]]


def plain_votes(scores_NLD, ballot, candidates):
    """Votes for each row, and how many prompts abstained in a group."""
    votes = [[0] * len(rows) for rows in candidates]
    num_abstentions = 0
    for prompt in scores_NLD:
        for group in plain_groups(candidates, ballot.scope):
            is_highest, is_magnitude = ballot.direction == "highest", ballot.score == "magnitude"
            chosen = plain_ballot(prompt, group, ballot.count, highest=is_highest, magnitude=is_magnitude)
            num_abstentions += not chosen
            for layer, row in chosen:
                votes[layer][row] += 1
    return votes, num_abstentions


@settings(deadline=None)
@given(dyadic, st.data(), st.integers(1, 3))
def test_parity_with_plain_votes_among_candidates(scores_NLD, data, most):
    """Layers may have no candidate at all, or as many as the ballot takes."""
    candidates_LD = data.draw(hnp.arrays(bool, scores_NLD.shape[1:]))
    candidates_LD[candidates_LD.sum(axis=1) < 2] = False
    if not candidates_LD.any():
        candidates_LD[0, :2] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_PROMPTS", most)
        patch.setattr(module, "MODEL_PROMPTS", 2)
        patch.setattr(module, "BLOCK_SCORES", 7)
        counter = VoteCounter(BALLOTS, candidates_LD)
        for piece_NLD in np.array_split(scores_NLD, data.draw(st.integers(1, len(scores_NLD)))):
            counter.add(piece_NLD)
    for ballot, found in zip(BALLOTS, counter.result(), strict=True):
        votes, num_abstentions = plain_votes(scores_NLD.tolist(), ballot, candidates_LD.tolist())
        assert found.counts_LD.tolist() == votes
        assert found.num_abstentions == num_abstentions
        assert found.num_prompts == len(scores_NLD)
        # Means are of all rows, and of what the ballot ranks by.
        values_NLD = np.abs(scores_NLD) if ballot.score == "magnitude" else scores_NLD
        assert np.array_equal(found.mean_scores_LD, values_NLD.astype(np.float64).mean(axis=0))


def test_several_numbers_of_votes_equal_one_at_a_time():
    """Several take one sort, one takes a partition."""
    scores_NLD = np.random.default_rng(0).integers(-9, 10, size=(8, 2, 30)).astype(np.float32)
    ballots = [
        Ballot(scope, direction, count, score)
        for scope, size in (("layer", 30), ("model", 60))
        for direction in ("lowest", "highest")
        for count in (1, 2, size // 2, size - 1, size)
        for score in ("signed", "magnitude")
    ]
    for ballot, together in zip(ballots, count_votes([scores_NLD], ballots), strict=True):
        assert np.array_equal(together.counts_LD, votes_of(scores_NLD, ballot).counts_LD)
        votes, _ = plain_votes(scores_NLD.tolist(), ballot, [[True] * 30] * 2)
        assert together.counts_LD.tolist() == votes


def test_magnitudes_by_hand():
    scores_NLD = [[[-3, 1, 2], [0, -1, 1]], [[1, -1, -2], [5, -6, 7]]]
    lowest, highest = (votes_of(scores_NLD, Ballot("layer", where, 1, "magnitude")) for where in ("lowest", "highest"))
    # Ties: 1 and −1 in the second prompt's first layer, −1 and 1 in the first prompt's second.
    assert lowest.counts_LD.tolist() == [[1, 1, 0], [2, 0, 0]]
    assert highest.counts_LD.tolist() == [[1, 0, 1], [0, 0, 2]]
    assert lowest.mean_scores_LD.tolist() == [[2, 1, 2], [2.5, 3.5, 4]]


@pytest.mark.parametrize("ballot", BALLOTS, ids=str)
def test_magnitudes_that_are_all_equal_abstain(ballot):
    votes = votes_of([[[2.0, -2.0, 2.0], [-2.0, 2.0, -2.0]]], ballot)
    abstains = ballot.score == "magnitude"
    assert votes.num_abstentions == abstains * (2 if ballot.scope == "layer" else 1)
    assert votes.counts_LD.any() != abstains


def test_rows_that_do_not_stand_are_as_if_they_were_not_there():
    scores_NLD = np.random.default_rng(0).integers(-4, 5, size=(7, 2, 12)).astype(np.float32)
    standing_D = np.arange(12) % 3 != 1
    counter = VoteCounter(BALLOTS, np.stack([standing_D] * 2))
    counter.add(scores_NLD)
    for found, without in zip(counter.result(), count_votes([scores_NLD[..., standing_D]], BALLOTS), strict=True):
        assert np.array_equal(found.counts_LD[:, standing_D], without.counts_LD)
        assert not found.counts_LD[:, ~standing_D].any()


def test_more_votes_than_a_byte_holds():
    scores_NLD = np.tile(np.array([[[1, 0, 2], [2, 1, 0]]], dtype=np.float32), (1000, 1, 1))
    for scope, expected in (("layer", [[0, 1000, 0], [0, 0, 1000]]), ("model", [[0, 1000, 0], [0, 0, 0]])):
        assert votes_of(scores_NLD, Ballot(scope, "lowest", 1)).counts_LD.tolist() == expected


def test_half_precision_votes_as_the_same_numbers_in_single_precision():
    """All finite numbers of half precision in random order, zeros of both signs and subnormal ones among them."""
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    numbers = numbers[np.isfinite(numbers)]
    scores_NLD = np.stack([np.random.default_rng(seed).permutation(numbers).reshape(2, -1) for seed in range(3)])
    ballots = [
        Ballot(scope, direction, count, score)
        for scope in ("layer", "model")
        for direction in ("lowest", "highest")
        for count in (1, 3000, 15_872, 31_743)  # of 31,744 rows of a layer, the median among them
        for score in ("signed", "magnitude")
    ]
    half, single = (count_votes([values], ballots) for values in (scores_NLD, scores_NLD.astype(np.float32)))
    for ballot, found, expected in zip(ballots, half, single, strict=True):
        assert np.array_equal(found.counts_LD, expected.counts_LD)
        assert np.array_equal(found.mean_scores_LD, expected.mean_scores_LD)
        (alone,) = count_votes([scores_NLD], [ballot])  # which takes a partition in place of a sort
        assert np.array_equal(found.counts_LD, alone.counts_LD)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_zeros_of_both_signs_tie_in_half_precision(scope):
    scores_NLD = np.array([[[0.0, -0.0, 1.0, -0.0, 0.0]]], dtype=np.float16)
    for ballot, rows in (("lowest", [0, 1]), ("highest", [2, 4])):
        (votes,) = count_votes([scores_NLD], [Ballot(scope, ballot, 2)])
        assert np.flatnonzero(votes.counts_LD).tolist() == rows
    equal = np.array([[[0.0, -0.0, -0.0]]], dtype=np.float16)
    assert count_votes([equal], [Ballot(scope, "lowest", 1)])[0].num_abstentions == 1
