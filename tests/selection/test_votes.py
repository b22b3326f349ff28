import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loki.selection.votes import Ballot, chosen, count_votes

BALLOTS = [Ballot(scope, direction, 2) for scope in ("layer", "model") for direction in ("lowest", "highest")]


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
    assert set(chosen(np.array(scores, dtype=np.float32), Ballot("layer", direction, 2))) == expected


@settings(deadline=None)
@given(hnp.arrays(np.float32, st.integers(2, 12), elements=st.integers(-3, 3).map(float)), st.integers(1, 12))
def test_highest_mirrors_lowest(scores, count):
    """The highest of some scores are the lowest of the negated scores read backwards."""
    count = min(count, scores.size)
    highest = chosen(scores, Ballot("layer", "highest", count))
    lowest = chosen(-scores[::-1], Ballot("layer", "lowest", count))
    assert highest.tolist() == (scores.size - 1 - lowest).tolist()


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
