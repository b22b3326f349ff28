from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loki.errors import ArtefactError, InputError
from loki.log.reader import AttributionLog
from loki.rows import RowSelection
from loki.selection.strategies import STRATEGIES, select, winners
from loki.selection.votes import Ballot, Votes


def select_from(path, quota, strategy):
    with AttributionLog(path) as log:
        return select(log, quota, strategy)


def sorted_plainly(scores_NLD, quota, strategy):
    """The strategies in nothing but sorting of Python lists and exact fractions: a list of rows for each layer."""
    num_layers, num_rows = len(scores_NLD[0]), len(scores_NLD[0][0])
    sign = 1 if strategy in ("layer_balanced", "global_lowest") else -1
    everything = [(layer, row) for layer in range(num_layers) for row in range(num_rows)]
    groups = [everything]
    if strategy in ("layer_balanced", "layer_highest"):
        groups = [[place for place in everything if place[0] == layer] for layer in range(num_layers)]
    selected = [[] for _ in range(num_layers)]
    for group in groups:
        count = Fraction(quota) * len(group) // 100
        votes = dict.fromkeys(group, 0)
        totals = {(layer, row): sum(Fraction(prompt[layer][row]) for prompt in scores_NLD) for layer, row in group}
        for prompt in scores_NLD:
            ranked = sorted(group, key=lambda p: (sign * prompt[p[0]][p[1]], sign * p[0], sign * p[1]))
            if len({prompt[layer][row] for layer, row in group}) > 1:
                for place in ranked[:count]:
                    votes[place] += 1
        best = sorted(group, key=lambda p: (-votes[p], sign * totals[p], sign * p[0], sign * p[1]))
        for layer, row in best[:count]:
            selected[layer].append(row)
    return [sorted(rows) for rows in selected]


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(
    scores_NLD=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(4, 8)),
        elements=st.integers(-4, 4).map(lambda n: n / 2),
    ),
    quota=st.sampled_from(["25", "33.3", "50", "62.5", "100"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parity_with_a_plain_sort(write_log, strategy, scores_NLD, quota):
    """Few distinct scores make ties of votes, means and indices common; the writer is the same for all examples."""
    selection = select_from(write_log(scores_NLD), quota, strategy)
    assert selection.rows.as_lists() == sorted_plainly(scores_NLD.tolist(), quota, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parity_with_a_plain_sort_on_continuous_scores(write_log, strategy):
    scores_NLD = np.random.default_rng(1).normal(size=(7, 3, 20)).astype(np.float32)
    selection = select_from(write_log(scores_NLD), "15", strategy)
    assert selection.rows.as_lists() == sorted_plainly(scores_NLD.tolist(), "15", strategy)


SCORES_BY_HAND = [[[0, 1, 2, 3], [10, 11, 12, 13]], [[0, 3, 2, 1], [10, 13, 12, 11]]]


@pytest.mark.parametrize(
    ("strategy", "rows"),
    [
        # Layer 0: row 0 has two votes, rows 1 and 3 one each, both of mean 2.
        ("layer_balanced", [[0, 1], [0, 1]]),
        ("layer_highest", [[2, 3], [2, 3]]),
        ("global_lowest", [[0, 1, 2, 3], []]),
        ("global_highest", [[], [0, 1, 2, 3]]),
    ],
)
def test_selection_by_hand(write_log, strategy, rows):
    assert select_from(write_log(SCORES_BY_HAND), 50, strategy).rows.as_lists() == rows


@pytest.mark.parametrize("strategy", ["layer_balanced", "layer_highest"])
@pytest.mark.parametrize(("quota", "count"), [("29", 29), ("1.99", 1), ("58", 58), (100, 100)])
def test_every_layer_has_exactly_the_quota(write_log, strategy, quota, count):
    selection = select_from(write_log(np.random.default_rng(0).normal(size=(3, 4, 100))), quota, strategy)
    assert [len(rows) for rows in selection.rows.rows] == [count] * 4
    assert selection.ballot.count == count


@pytest.mark.parametrize("strategy", ["global_lowest", "global_highest"])
@pytest.mark.parametrize(("quota", "count"), [("0.5", 2), ("28.75", 115), ("58", 232), (100, 400)])
def test_the_model_has_exactly_the_quota_in_all(write_log, strategy, quota, count):
    selection = select_from(write_log(np.random.default_rng(0).normal(size=(3, 4, 100))), quota, strategy)
    assert selection.rows.num_selected == selection.ballot.count == count


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_log_in_which_all_abstain_still_fills_the_quota(write_log, strategy):
    selection = select_from(write_log(np.zeros((2, 2, 10))), 20, strategy)
    assert selection.rows.num_selected == 4
    assert selection.votes.counts_LD.sum() == 0


def rows_won(counts_LD, means_LD, ballot):
    return winners(Votes(np.array(counts_LD), np.array(means_LD, dtype=float), 9, 0), ballot)


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


def test_the_default_strategy_is_layer_balanced(write_log):
    path = write_log(np.random.default_rng(2).normal(size=(3, 2, 10)))
    with AttributionLog(path) as log:
        assert select(log, 30).rows == select(log, 30, "layer_balanced").rows != select(log, 30, "global_lowest").rows


def test_a_log_read_in_pieces_selects_the_same(write_log, monkeypatch):
    path = write_log(np.random.default_rng(3).integers(-4, 5, size=(11, 2, 16)))
    whole = {strategy: select_from(path, 25, strategy).rows for strategy in STRATEGIES}
    monkeypatch.setattr("loki.log.reader.CHUNK_BYTES", 3 * 4 * 2 * 16)
    with AttributionLog(path) as log:
        assert [len(chunk) for chunk in log.chunks()] == [3, 3, 3, 2]
    assert {strategy: select_from(path, 25, strategy).rows for strategy in STRATEGIES} == whole


def test_too_small_a_quota_is_refused_as_it_was_written(write_log):
    with pytest.raises(InputError, match=r"quota 0\.5 gives no row out of 100: give at least 1$"):
        select_from(write_log(np.zeros((1, 1, 100))), "0.5", "layer_balanced")


def test_an_unknown_strategy_is_refused_with_the_known_ones(write_log):
    with pytest.raises(InputError, match=r"strategy 'best' is unknown: choose one of layer_balanced, layer_highest, "):
        select_from(write_log(SCORES_BY_HAND), 50, "best")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_refused_by_place(write_log, bad):
    scores_NLD = np.zeros((3, 2, 4))
    scores_NLD[2, 1, 3] = bad
    with pytest.raises(ArtefactError, match=rf"has {bad} at prompt 2, layer 1, row 3"):
        select_from(write_log(scores_NLD), 50, "layer_balanced")


def test_the_result_is_a_row_selection_of_plain_integers(write_log):
    rows = select_from(write_log(SCORES_BY_HAND), 50, "layer_balanced").rows
    assert isinstance(rows, RowSelection)
    assert {type(row) for layer in rows.rows for row in layer} == {int}
