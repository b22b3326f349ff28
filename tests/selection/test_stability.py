import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from plain_selection import VOTING_STRATEGIES, plain_selection

from loki.errors import ArtefactError, InputError
from loki.log.reader import AttributionLog
from loki.selection import stability as module
from loki.selection.candidates import candidate_rows
from loki.selection.stability import RESAMPLES, stability
from loki.selection.strategies import Election, select, select_all

many_examples = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stability_of(path, quota, strategy="layer_balanced", candidates_LD=None, **options):
    with AttributionLog(path) as log:
        return stability(log, select(log, quota, strategy, candidates_LD=candidates_LD), **options)


def coarse(num_prompts):
    return hnp.arrays(
        np.float32,
        st.tuples(num_prompts, st.integers(1, 3), st.integers(4, 7)),
        elements=st.integers(-4, 4).map(lambda n: n / 2),
    )


@pytest.mark.parametrize("strategy", VOTING_STRATEGIES)
@given(data=st.data(), seed=st.integers(0, 9))
@many_examples
def test_parity_with_selections_from_resampled_logs(write_log, strategy, data, seed):
    """Every resample written out, prompt for prompt, and selected from as if it were a log."""
    # With 1, 2 or 4 prompts, shares of a layer that are equal are equal in binary too.
    scores_NLD = data.draw(coarse(st.sampled_from([1, 2, 4]) if strategy == "adaptive" else st.integers(1, 6)))
    num_prompts, num_layers, num_rows = scores_NLD.shape
    candidates_LD = data.draw(hnp.arrays(bool, (num_layers, num_rows)))
    candidates_LD[:, :2] = True
    candidates_LD[: data.draw(st.integers(0, num_layers - 1))] = False
    found = stability_of(write_log(scores_NLD), 30, strategy, candidates_LD, resamples=5, seed=seed)

    even = [1 / num_prompts] * num_prompts
    weights_BN = np.random.default_rng(seed).multinomial(num_prompts, even, size=5)
    times_LD = np.zeros((num_layers, num_rows))
    for weights_N in weights_BN:
        resampled = [
            prompt for prompt, weight in zip(scores_NLD.tolist(), weights_N, strict=True) for _ in range(weight)
        ]
        for layer, rows in enumerate(plain_selection(resampled, 30, strategy, candidates_LD.tolist())):
            times_LD[layer, rows] += 1
    np.testing.assert_array_equal(found.shares_LD, (times_LD / 5).astype(np.float32))
    chosen = plain_selection(scores_NLD.tolist(), 30, strategy, candidates_LD.tolist())
    shares = [times_LD[layer, row] / 5 for layer, rows in enumerate(chosen) for row in rows]
    assert found.mean == pytest.approx(sum(shares) / len(shares), rel=1e-12)
    assert found.num_resamples == 5
    assert found.shares_LD.dtype == np.float32


def test_by_hand(write_log, monkeypatch):
    """The second prompt's row 1 has the lower mean, so that row 0 wins only where the first prompt is drawn twice."""
    path = write_log([[[0.0, 1.0]], [[3.0, 0.0]]])
    draws = np.array([[2, 0], [1, 1], [0, 2], [1, 1]], dtype=np.float32)
    monkeypatch.setattr(module, "_weights", lambda num_prompts, resamples, seed: draws.T)
    found = stability_of(path, 50, resamples=4)
    assert found.mean == 0.75
    assert found.shares_LD.tolist() == [[0.25, 0.75]]


def test_means_of_a_resample_are_in_double_precision(write_log, monkeypatch):
    """One vote each, and sums of 2²⁵ + 2 and 2²⁵ + 1, which are one number in single precision."""
    path = write_log([[[2.0**25, 2.0**25]], [[2, 0]], [[0, 1]]])
    monkeypatch.setattr(module, "_weights", lambda num_prompts, resamples, seed: np.ones((3, 2), dtype=np.float32))
    assert stability_of(path, 50, resamples=2).shares_LD.tolist() == [[0, 1]]


def test_each_resample_draws_as_many_prompts_as_there_are():
    weights_NB = module._weights(50, 400, 0)
    assert weights_NB.shape == (50, 400)
    assert (weights_NB.sum(axis=0) == 50).all()
    # A prompt is left out with probability (1 − 1/50)^50 = 0.364, here of 20,000 draws, that is give or take 0.0034.
    assert (weights_NB == 0).mean() == pytest.approx(0.364, abs=0.015)
    assert abs(weights_NB.mean(axis=1) - 1).max() < 0.25  # 5 standard deviations of a mean of 400
    np.testing.assert_array_equal(weights_NB, module._weights(50, 400, 0))
    assert (weights_NB != module._weights(50, 400, 1)).any()


@pytest.mark.parametrize("strategy", VOTING_STRATEGIES)
def test_one_prompt_is_as_stable_as_can_be(write_log, strategy):
    assert stability_of(write_log(np.random.default_rng(0).normal(size=(1, 3, 20))), 10, strategy).mean == 1.0


@pytest.mark.parametrize("strategy", VOTING_STRATEGIES)
@pytest.mark.parametrize("num_rows", [17, 33, 100])
def test_equal_prompts_are_as_stable_as_can_be(write_log, strategy, num_rows):
    """Also where all rows tie: sums of equal numbers must not differ from row to row by a rounding."""
    scores_LD = np.random.default_rng(0).normal(size=(4, num_rows))
    scores_LD[1] = 0.1
    scores_LD[2] = -0.7
    assert stability_of(write_log([scores_LD] * 97), 10, strategy, resamples=5).mean == 1.0


def test_noise_is_hardly_more_stable_than_chance_and_more_prompts_are_more_stable(write_log):
    generator = np.random.default_rng(0)
    noise_NLD = generator.normal(size=(300, 2, 50))
    signal_LD = generator.normal(size=(2, 50))
    few = stability_of(write_log((noise_NLD + signal_LD)[:10]), 10).mean
    many = stability_of(write_log(noise_NLD + signal_LD), 10).mean
    assert 0.1 < stability_of(write_log(noise_NLD), 10).mean < few < many < 1


def test_a_log_in_pieces_is_the_same(write_log, monkeypatch):
    path = write_log(np.random.default_rng(3).integers(-4, 5, size=(40, 2, 16)))
    whole = {strategy: stability_of(path, 25, strategy, resamples=7) for strategy in VOTING_STRATEGIES}
    monkeypatch.setattr("loki.log.reader.CHUNK_BYTES", 3 * 4 * 2 * 16)
    monkeypatch.setattr(module, "MODEL_PROMPTS", 2)
    for strategy, found in whole.items():
        again = stability_of(path, 25, strategy, resamples=7)
        np.testing.assert_array_equal(again.shares_LD, found.shares_LD)
        assert again.mean == found.mean


def test_it_is_seeded_and_has_a_hundred_resamples_unless_told(write_log):
    path = write_log(np.random.default_rng(3).normal(size=(5, 2, 20)))
    first, again, other = (stability_of(path, 20, seed=seed) for seed in (0, 0, 1))
    assert first.num_resamples == RESAMPLES == 100
    assert (first.shares_LD == again.shares_LD).all()
    assert (first.shares_LD != other.shares_LD).any()


def test_rows_that_do_not_stand_are_never_chosen_again(write_log):
    path = write_log(np.random.default_rng(3).normal(size=(5, 3, 10)))
    candidates_LD = candidate_rows(3, 10, layers="1-2")
    candidates_LD[1, :5] = False
    for strategy in VOTING_STRATEGIES:
        found = stability_of(path, 30, strategy, candidates_LD, resamples=9)
        assert not found.shares_LD[~candidates_LD].any()
        assert found.shares_LD.sum() == pytest.approx(6)


def test_random_rows_have_no_stability(write_log):
    path = write_log(np.zeros((2, 1, 10)))
    with AttributionLog(path) as log:
        (selection,) = select_all(None, [Election.of("random", 10, np.ones((1, 10), dtype=bool))])
        with pytest.raises(
            InputError, match=r"^strategy 'random' draws rows without a log: its stability says nothing$"
        ):
            stability(log, selection)


@pytest.mark.parametrize("resamples", [1, 0, -3])
def test_too_few_resamples_are_refused(write_log, resamples):
    with pytest.raises(InputError, match=rf"^{resamples} resamples are too few: give at least 2$"):
        stability_of(write_log(np.zeros((2, 1, 10))), 10, resamples=resamples)


def test_scores_that_are_not_finite_are_refused(write_log):
    good, bad = np.zeros((2, 1, 10)), np.zeros((2, 1, 10))
    bad[1, 0, 3] = np.inf
    with AttributionLog(write_log(good, "good.h5")) as log:
        selection = select(log, 10)
    with (
        AttributionLog(write_log(bad, "bad.h5")) as log,
        pytest.raises(ArtefactError, match="has inf at prompt 1, layer 0, row 3"),
    ):
        stability(log, selection)
