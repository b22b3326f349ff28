from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from plain_selection import (
    LAYER_STRATEGIES,
    MODEL_STRATEGIES,
    VOTING_STRATEGIES,
    plain_count,
    plain_groups,
    plain_selection,
)

from loki.errors import InputError
from loki.log.reader import AttributionLog
from loki.rows import RowSelection
from loki.selection import strategies, votes
from loki.selection.strategies import STRATEGIES, Election, select, select_all, winners
from loki.selection.votes import Ballot, Votes

# The fixtures are the same for all examples: a writer that begins anew each time, and a patch.
many_examples = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def select_from(path, quota, strategy, candidates_LD=None):
    with AttributionLog(path) as log:
        return select(log, quota, strategy, candidates_LD=candidates_LD)


def coarse(num_prompts, **shape):
    """Few distinct scores, so that ties of votes, means and indices are common."""
    sizes = {"num_layers": st.integers(1, 3), "num_rows": st.integers(4, 8)} | shape
    return hnp.arrays(
        np.float32,
        st.tuples(num_prompts, sizes["num_layers"], sizes["num_rows"]),
        elements=st.integers(-4, 4).map(lambda n: n / 2),
    )


def coarse_for(strategy):
    """Two shares of a layer are equal in binary too when means are: with 1, 2 or 4 prompts."""
    return coarse(st.sampled_from([1, 2, 4]) if strategy == "adaptive" else st.integers(1, 6))


QUOTAS = st.sampled_from(["25", "33.3", "50", "62.5", "100"])


def test_the_table_has_all_strategies():
    assert set(STRATEGIES) == {*VOTING_STRATEGIES, "random"}


@pytest.mark.parametrize("strategy", VOTING_STRATEGIES)
@given(data=st.data(), quota=QUOTAS)
@many_examples
def test_parity_with_a_plain_sort(write_log, strategy, data, quota):
    scores_NLD = data.draw(coarse_for(strategy))
    selection = select_from(write_log(scores_NLD), quota, strategy)
    assert selection.rows.as_lists() == plain_selection(scores_NLD.tolist(), quota, strategy)


@pytest.mark.parametrize("strategy", VOTING_STRATEGIES)
def test_parity_with_a_plain_sort_on_continuous_scores(write_log, strategy):
    scores_NLD = np.random.default_rng(1).normal(size=(7, 3, 20)).astype(np.float32)
    selection = select_from(write_log(scores_NLD), "15", strategy)
    assert selection.rows.as_lists() == plain_selection(scores_NLD.tolist(), "15", strategy)


@pytest.mark.parametrize("strategy", VOTING_STRATEGIES)
@given(data=st.data(), quota=QUOTAS)
@many_examples
def test_parity_with_a_plain_sort_among_candidates(write_log, strategy, data, quota):
    """A quota is of all rows of the layers that have candidates; where fewer stand, there is no selection."""
    scores_NLD = data.draw(coarse_for(strategy))
    candidates_LD = data.draw(hnp.arrays(bool, scores_NLD.shape[1:]).filter(np.any))
    candidates = candidates_LD.tolist()
    count = plain_count(quota, strategy, candidates)
    groups = plain_groups(candidates, "layer" if strategy in LAYER_STRATEGIES else "model")
    possible = all(len(group) >= count for group in groups)
    with nullcontext() if possible else pytest.raises(InputError, match="left to select from: lower the quota"):
        selection = select_from(write_log(scores_NLD), quota, strategy, candidates_LD)
        assert selection.rows.as_lists() == plain_selection(scores_NLD.tolist(), quota, strategy, candidates)


half = np.finfo(np.float16)
SPECIAL = [0.0, -0.0, half.smallest_subnormal, -half.smallest_subnormal, half.smallest_normal, half.max, half.min]


@pytest.mark.parametrize("strategy", [name for name in VOTING_STRATEGIES if name != "adaptive"])
@given(
    scores_NLD=hnp.arrays(
        np.float16,
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(4, 9)),
        elements=st.sampled_from(SPECIAL) | st.floats(width=16, allow_nan=False, allow_infinity=False),
    ),
    quota=QUOTAS,
)
@many_examples
def test_parity_with_a_plain_sort_on_half_precision(write_log, strategy, scores_NLD, quota):
    """Half precision ties often; sums of few such numbers are exact in double precision."""
    selection = select_from(write_log(scores_NLD, dtype=np.float16), quota, strategy)
    assert selection.rows.as_lists() == plain_selection(scores_NLD.tolist(), quota, strategy)


SCORES_BY_HAND = [[[0, 1, 2, 3], [10, 11, 12, 13]], [[0, 3, 2, 1], [10, 13, 12, 11]]]
# Magnitudes: layer 0 has 5 1 2 3 and 4 2 1 6, layer 1 has 1 7 0 8 and 2 9 1 7.
SIGNED_BY_HAND = [[[-5, 1, -2, 3], [1, -7, 0, 8]], [[4, -2, 1, -6], [-2, 9, 1, -7]]]


@pytest.mark.parametrize(
    ("strategy", "scores", "rows"),
    [
        # Layer 0: row 0 has two votes, rows 1 and 3 one each, both of mean 2.
        ("layer_balanced", SCORES_BY_HAND, [[0, 1], [0, 1]]),
        ("layer_highest", SCORES_BY_HAND, [[2, 3], [2, 3]]),
        ("global_lowest", SCORES_BY_HAND, [[0, 1, 2, 3], []]),
        ("global_highest", SCORES_BY_HAND, [[], [0, 1, 2, 3]]),
        # Layer 0: votes for 0 2 and 1 3, means −½ −½ −½ −1½; layer 1: for 1 2 and 0 3, means −½ 1 ½ ½.
        ("layer_balanced", SIGNED_BY_HAND, [[0, 3], [0, 2]]),
        # Layer 0: votes for 1 2 and 2 1; layer 1: for 2 0 and 2 0.
        ("layer_balanced_magnitude", SIGNED_BY_HAND, [[1, 2], [0, 2]]),
        # Layer 0: votes for 0 3 and 3 0, layer 1 for 3 1 and 1 3; by sign for 3 1 and 0 2, and for 3 0 and 1 2.
        ("layer_highest_magnitude", SIGNED_BY_HAND, [[0, 3], [1, 3]]),
        ("layer_highest", SIGNED_BY_HAND, [[1, 2], [1, 3]]),
        # Rows 1 and 3 have one vote each: with equal mean magnitudes the higher row wins, then the mean of 3.
        ("layer_highest_magnitude", [[[0, -4, 5, 1]], [[0, 1, -6, -4]]], [[2, 3]]),
        ("layer_highest_magnitude", [[[0, -5, 5, 1]], [[0, 1, -6, -4]]], [[1, 2]]),
    ],
)
def test_selection_by_hand(write_log, strategy, scores, rows):
    assert select_from(write_log(scores), 50, strategy).rows.as_lists() == rows


def test_capped_selection_by_hand(write_log):
    """Layers of four rows at 25 %: one each on average, two at most. Means: 1 2 3 4, then 5 0 6 7, then 8 9 10 11."""
    scores_NLD = [[[0, 2, 3, 6], [5, 0, 9, 7], [8, 9, 10, 11]], [[2, 2, 3, 2], [5, 0, 3, 7], [8, 9, 10, 11]]]
    selection = select_from(write_log(scores_NLD), 25, "capped")
    assert selection.rows.as_lists() == [[0, 1], [1], []]
    # At 50 % layer 0 has room for all of its rows, the next lowest are 0 and 5 of layer 1.
    assert select_from(write_log(scores_NLD), 50, "capped").rows.as_lists() == [[0, 1, 2, 3], [0, 1], []]
    # Twice one row is the most: the three lowest means 0 1 2 of one layer give two rows, the next is elsewhere.
    crowded = [[[0, 1, 2, 3], [9, 9, 9, 8], [7, 9, 9, 9]]]
    assert select_from(write_log(crowded), 25, "capped").rows.as_lists() == [[0, 1], [], [0]]


def test_adaptive_selection_by_hand(write_log):
    """The half is one row of each layer; at a quarter, the share of layer 1 with two and three rows is below that of
    layer 0 with two, 1/4, so that layer 1 gives three."""
    scores_LD = [[1, -1, 1, 1, 1, 1, 1, 1], [9, 5, 0.25, -9, 0, 0.5, -7, 3]]
    rows = select_from(write_log([scores_LD]), 25, "adaptive").rows
    # The prompt's votes in layer 1 go to rows 2 and 4, the third row has the next mean; in layer 0 nobody votes.
    assert rows.as_lists() == [[0], [2, 4, 5]]


@pytest.mark.parametrize(
    "strategy",
    ["layer_balanced", "layer_balanced_magnitude", "layer_highest", "layer_highest_magnitude", "random"],
)
@pytest.mark.parametrize(("quota", "count"), [("29", 29), ("1.99", 1), ("58", 58), (100, 100)])
def test_every_layer_has_exactly_the_quota(write_log, strategy, quota, count):
    selection = select_from(write_log(np.random.default_rng(0).normal(size=(3, 4, 100))), quota, strategy)
    assert [len(rows) for rows in selection.rows.rows] == [count] * 4
    assert selection.election.count == count


@pytest.mark.parametrize("strategy", MODEL_STRATEGIES)
@pytest.mark.parametrize(("quota", "count"), [("0.5", 2), ("28.75", 115), ("58", 232), (100, 400)])
def test_the_model_has_exactly_the_quota_in_all(write_log, strategy, quota, count):
    selection = select_from(write_log(np.random.default_rng(0).normal(size=(3, 4, 100))), quota, strategy)
    assert selection.rows.num_selected == selection.election.count == count


@pytest.mark.parametrize(("quota", "count"), [("29", 29), ("1.99", 1), ("58", 58), (100, 100)])
def test_adaptive_gives_each_layer_half_to_twice_the_quota_and_the_same_in_all(write_log, quota, count):
    scales_LD = np.random.default_rng(1).lognormal(sigma=[[0.1], [1], [2], [4]], size=(4, 100))
    scores_NLD = np.random.default_rng(0).normal(size=(3, 4, 100)) * scales_LD
    rows = select_from(write_log(scores_NLD), quota, "adaptive").rows
    counts = [len(layer) for layer in rows.rows]
    assert sum(counts) == 4 * count
    assert all(count <= 2 * layer <= 4 * count for layer in counts)
    # The more a layer's attribution sits on few rows, the more of the others it gives.
    assert counts == sorted(counts)
    assert len(set(counts)) > 1 or count in (1, 100)


@given(scores_NLD=coarse(st.sampled_from([1, 2, 4])), quota=QUOTAS, scale=st.sampled_from([2.0**-20, 0.5, 2.0**20]))
@many_examples
def test_the_scale_of_a_layer_has_no_say_in_the_adaptive_strategy(write_log, scores_NLD, quota, scale):
    rows = select_from(write_log(scores_NLD), quota, "adaptive").rows
    scores_NLD[:, -1] *= scale
    assert select_from(write_log(scores_NLD), quota, "adaptive").rows == rows


def selections(path, quota, candidates_LD):
    with AttributionLog(path) as log:
        elections = [Election.of(strategy, quota, candidates_LD, seed=3) for strategy in STRATEGIES]
        return {selection.election.strategy: selection.rows for selection in select_all(log, elections)}


@given(data=st.data())
@many_examples
def test_quota_and_candidates_hold_whatever_the_scores(write_log, data):
    scores_NLD = data.draw(coarse(st.integers(1, 4), num_rows=st.just(10)))
    candidates_LD = data.draw(hnp.arrays(bool, scores_NLD.shape[1:]))
    candidates_LD[:, :3] = True
    without = data.draw(st.integers(0, len(candidates_LD) - 1))
    candidates_LD[:without] = False
    standing = candidates_LD.any(axis=1)
    for strategy, rows in selections(write_log(scores_NLD), 30, candidates_LD).items():
        assert rows.num_selected == 3 * standing.sum()
        assert not (rows.as_mask(10) & ~candidates_LD).any()
        counts = rows.as_mask(10).sum(axis=1)[standing]
        if strategy == "adaptive":
            assert counts.min() >= 2
            assert counts.max() <= 6
        elif strategy == "capped":
            assert counts.max() <= 6
        elif strategy in (*LAYER_STRATEGIES, "random"):
            assert set(counts) == {3}


@given(scores_NLD=coarse(st.integers(2, 6)), seed=st.integers(0, 99))
@many_examples
def test_the_order_of_prompts_does_not_matter(write_log, scores_NLD, seed):
    """Sums of halves are exact, so that not even the last bit of a mean depends on the order."""
    candidates_LD = np.ones(scores_NLD.shape[1:], dtype=bool)
    rows = selections(write_log(scores_NLD), 25, candidates_LD)
    np.random.default_rng(seed).shuffle(scores_NLD)
    assert selections(write_log(scores_NLD), 25, candidates_LD) == rows
    assert selections(write_log(scores_NLD), 25, candidates_LD) == rows


@given(scores_NLD=coarse(st.integers(2, 6)), num_prompts=st.integers(1, 3), most=st.integers(1, 3))
@many_examples
def test_a_log_read_and_ranked_in_pieces_selects_the_same(write_log, monkeypatch, scores_NLD, num_prompts, most):
    path, candidates_LD = write_log(scores_NLD), np.ones(scores_NLD.shape[1:], dtype=bool)
    whole = selections(path, 25, candidates_LD)
    with monkeypatch.context() as patch:
        patch.setattr("loki.log.reader.CHUNK_BYTES", num_prompts * 4 * candidates_LD.size)
        patch.setattr(votes, "MOST_PROMPTS", most)
        patch.setattr(votes, "MODEL_PROMPTS", 1)
        patch.setattr(votes, "BLOCK_SCORES", 1)
        with AttributionLog(path) as log:
            assert max(len(chunk) for chunk in log.chunks()) == min(num_prompts, len(scores_NLD))
        assert selections(path, 25, candidates_LD) == whole


@pytest.mark.parametrize("strategy", VOTING_STRATEGIES)
def test_several_elections_in_one_pass_equal_one_at_a_time(write_log, monkeypatch, strategy):
    path = write_log(np.random.default_rng(4).integers(-4, 5, size=(9, 2, 16)))
    passes = []
    read = AttributionLog.stored_chunks
    monkeypatch.setattr(AttributionLog, "stored_chunks", lambda log: passes.append(1) or read(log))
    candidates_LD = np.ones((2, 16), dtype=bool)
    elections = [
        Election.of(name, quota, candidates_LD) for quota in (12.5, 25, 50) for name in (strategy, "layer_balanced")
    ]
    with AttributionLog(path) as log:
        together = select_all(log, elections)
        assert len(passes) == 1
        for election, selection in zip(elections, together, strict=True):
            assert selection.election is election
            assert selection.rows == select(log, election.quota, election.strategy).rows


@pytest.mark.parametrize("strategy", VOTING_STRATEGIES)
def test_a_log_in_which_all_abstain_still_fills_the_quota(write_log, strategy):
    selection = select_from(write_log(np.zeros((2, 2, 10))), 20, strategy)
    # Nothing but indices decides: the first rows, or the last.
    layers = {"global_lowest": [[0, 1, 2, 3], []], "global_highest": [[], [6, 7, 8, 9]], "layer_highest": [[8, 9]] * 2}
    layers |= {"capped": layers["global_lowest"], "layer_highest_magnitude": layers["layer_highest"]}
    assert selection.rows.as_lists() == layers.get(strategy, [[0, 1], [0, 1]])
    assert selection.votes.counts_LD.sum() == 0
    assert selection.votes.num_abstentions == (2 if strategy in MODEL_STRATEGIES else 4)


@pytest.mark.parametrize("strategy", VOTING_STRATEGIES)
def test_one_prompt_selects_its_own_rows(write_log, strategy):
    scores_LD = np.random.default_rng(5).normal(size=(2, 10))
    rows = select_from(write_log([scores_LD]), 20, strategy).rows.as_lists()
    assert rows == plain_selection([scores_LD.astype(np.float32).tolist()], 20, strategy)
    if strategy == "layer_balanced":
        assert rows == np.sort(np.argsort(scores_LD)[:, :2]).tolist()


def test_a_layer_of_one_row_can_be_selected_whole(write_log):
    assert select_from(write_log([[[1.0]], [[2.0]]]), 100, "layer_balanced").rows.as_lists() == [[0]]


@pytest.mark.parametrize("strategy", VOTING_STRATEGIES)
@pytest.mark.parametrize("num_rows", [17, 257, 1031])
def test_an_odd_number_of_rows(write_log, strategy, num_rows):
    scores_NLD = np.random.default_rng(6).integers(-99, 99, size=(4, 3, num_rows))
    rows = select_from(write_log(scores_NLD), "7.1", strategy).rows
    assert rows.as_lists() == plain_selection(scores_NLD.tolist(), "7.1", strategy)


def test_more_prompts_than_a_byte_counts(write_log):
    scores_NLD = np.tile([[[1.0, 0.0, 2.0]]], (600, 1, 1))
    votes_of = select_from(write_log(scores_NLD), 34, "layer_balanced").votes
    assert votes_of.counts_LD.tolist() == [[0, 600, 0]]
    assert select_from(write_log(scores_NLD), 34, "global_lowest").votes.counts_LD.tolist() == [[0, 600, 0]]


def rows_won(counts_LD, means_LD, ballot, **constraints):
    return winners(Votes(np.array(counts_LD), np.array(means_LD, dtype=float), 9, 0), ballot, **constraints)


@pytest.mark.parametrize(
    ("direction", "counts", "means", "rows"),
    [
        ("lowest", [1, 5, 3, 4], [0, 9, 0, 0], [1, 3]),
        ("highest", [1, 5, 3, 4], [9, 0, 9, 0], [1, 3]),
        ("lowest", [2, 2, 2, 2], [4, 1, 3, 2], [1, 3]),
        ("highest", [2, 2, 2, 2], [4, 1, 3, 2], [0, 2]),
        ("lowest", [2, 2, 2, 2], [1, 1, 1, 1], [0, 1]),
        ("highest", [2, 2, 2, 2], [1, 1, 1, 1], [2, 3]),
    ],
    ids=["votes", "votes-highest", "mean", "mean-mirrored", "index", "index-mirrored"],
)
def test_most_votes_then_mean_then_index_win(direction, counts, means, rows):
    assert rows_won([counts], [means], Ballot("layer", direction, 2)) == [rows]


def test_ties_over_the_model_go_to_the_first_layers_and_mirrored():
    tied = np.ones((3, 4))
    assert rows_won(tied, tied, Ballot("model", "lowest", 5)) == [[0, 1, 2, 3], [0], []]
    assert rows_won(tied, tied, Ballot("model", "highest", 5)) == [[], [3], [0, 1, 2, 3]]


def test_only_candidates_win_and_layers_may_have_numbers_of_their_own():
    counts, means = [[9, 8, 7, 6], [9, 8, 7, 6]], np.zeros((2, 4))
    candidates_LD = np.array([[False, True, True, True], [True, False, True, True]])
    ballot = Ballot("layer", "lowest", 2)
    assert rows_won(counts, means, ballot, candidates_LD=candidates_LD) == [[1, 2], [0, 2]]
    assert rows_won(counts, means, ballot, candidates_LD=candidates_LD, counts_L=[1, 3]) == [[1], [0, 2, 3]]
    ballot = Ballot("model", "lowest", 3)
    assert rows_won(counts, means, ballot, candidates_LD=candidates_LD) == [[1, 2], [0]]


def test_the_default_strategy_is_layer_balanced(write_log):
    path = write_log(np.random.default_rng(2).normal(size=(3, 2, 10)))
    with AttributionLog(path) as log:
        assert select(log, 30).rows == select(log, 30, "layer_balanced").rows != select(log, 30, "global_lowest").rows


def drawn(seed, candidates_LD, quota=30):
    (selection,) = select_all(None, [Election.of("random", quota, candidates_LD, seed=seed)])
    assert selection.votes is None
    return selection.rows


def test_random_rows_need_no_log_and_are_seeded():
    candidates_LD = np.ones((3, 20), dtype=bool)
    assert drawn(1, candidates_LD) == drawn(1, candidates_LD) != drawn(2, candidates_LD)
    assert len(set(drawn(1, candidates_LD).rows)) == 3  # no layer repeats another
    assert [len(rows) for rows in drawn(1, candidates_LD).rows] == [6, 6, 6]


def test_random_rows_are_uniform_among_the_candidates():
    """Each of 7 candidates is drawn with probability 3/7: in 2000 draws 857 times, give or take 22."""
    candidates_LD = np.ones((2, 10), dtype=bool)
    candidates_LD[1, [0, 4, 9]] = False
    times_LD = sum(drawn(seed, candidates_LD).as_mask(10).astype(int) for seed in range(2000))
    spread = (2000 * 3 / 7 * 4 / 7) ** 0.5
    assert (times_LD[1] > 0).tolist() == candidates_LD[1].tolist()
    assert abs(times_LD[1][candidates_LD[1]] - 2000 * 3 / 7).max() < 4.5 * spread
    assert abs(times_LD[0] - 2000 * 3 / 10).max() < 4.5 * spread


@pytest.mark.parametrize("strategy", VOTING_STRATEGIES)
def test_every_other_strategy_needs_a_log(strategy):
    candidates_LD = np.ones((1, 10), dtype=bool)
    elections = [Election.of(name, 10, candidates_LD) for name in ("random", strategy)]
    with pytest.raises(InputError, match=rf"^strategy '{strategy}' needs an attribution log: make one with `loki anal"):
        select_all(None, elections)


@pytest.mark.parametrize(
    ("strategy", "quota", "message"),
    [
        ("layer_balanced", 50, "quota 50 takes 5 rows, but layer 2 has 3 left to select from: lower the quota, or"),
        ("adaptive", "40.5", "quota 40.5 takes 4 rows, but layer 2 has 3 left to select from"),
        ("random", 40, "quota 40 takes 4 rows, but layer 2 has 3 left to select from"),
        # A quota of 20 rows, 3 + 10 of which stand.
        ("global_lowest", 70, "quota 70 takes 14 rows, but the model has 13 left to select from"),
    ],
)
def test_more_rows_than_candidates_are_refused(strategy, quota, message):
    candidates_LD = np.zeros((3, 10), dtype=bool)
    candidates_LD[1], candidates_LD[2, [1, 5, 6]] = True, True
    with pytest.raises(InputError, match=message):
        Election.of(strategy, quota, candidates_LD)
    assert Election.of(strategy, "30" if strategy != "global_lowest" else "65", candidates_LD).count in (3, 13)


def test_too_small_a_quota_is_refused_as_it_was_written(write_log):
    with pytest.raises(InputError, match=r"quota 0\.5 gives no row out of 100: give at least 1$"):
        select_from(write_log(np.zeros((1, 1, 100))), "0.5", "layer_balanced")


def test_an_unknown_strategy_is_refused_with_the_known_ones(write_log):
    names = ", ".join(STRATEGIES)
    with pytest.raises(InputError, match=rf"^strategy 'best' is unknown: choose one of {names}$"):
        select_from(write_log(SCORES_BY_HAND), 50, "best")
    assert strategies.parse_strategy("adaptive") == "adaptive"


def test_the_result_is_a_row_selection_of_plain_integers(write_log):
    for strategy in STRATEGIES:
        rows = select_from(write_log(SCORES_BY_HAND), 50, strategy).rows
        assert isinstance(rows, RowSelection)
        assert {type(row) for layer in rows.rows for row in layer} == {int}
