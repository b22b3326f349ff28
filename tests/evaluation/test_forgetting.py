from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loki.errors import InputError
from loki.evaluation.forgetting import forgetting

scores = st.dictionaries(
    st.text(min_size=1, max_size=3), st.tuples(st.integers(1, 100), st.integers(0, 100)), min_size=1
)


def test_forgetting_by_hand():
    """Losses 25 %, −10 % (a gain) and 0 %."""
    found = forgetting({"mmlu": 60, "arc": 50, "piqa": 80}, {"mmlu": 45, "arc": 55, "piqa": 80})
    assert found.by_benchmark == {"mmlu": 25.0, "arc": -10.0, "piqa": 0.0}
    assert found.score == 5.0
    # 25/3 is rounded once.
    assert found.losses_only == pytest.approx(25 / 3, rel=1e-15)


def test_the_loss_is_relative_to_the_score_before():
    assert forgetting({"a": 50}, {"a": 100}).score == -100.0
    assert forgetting({"a": 100}, {"a": 50}).score == 50.0


@settings(deadline=None)
@given(scores)
def test_parity_with_exact_fractions(pairs):
    before = {name: pair[0] for name, pair in pairs.items()}
    after = {name: pair[1] for name, pair in pairs.items()}
    losses = [100 * (1 - Fraction(after[name], before[name])) for name in before]
    found = forgetting(before, after)
    # A handful of roundings of terms up to 10⁴ (from 1 to 100).
    assert found.score == pytest.approx(float(sum(losses) / len(losses)), rel=1e-12, abs=1e-10)
    assert found.losses_only == pytest.approx(float(sum(max(0, x) for x in losses) / len(losses)), rel=1e-12, abs=1e-10)
    assert found.losses_only >= max(0.0, found.score) - 1e-10
    assert found.by_benchmark.keys() == before.keys()


@settings(deadline=None)
@given(scores)
def test_percent_and_share_give_the_same_score(pairs):
    before, after = ({name: pair[index] for name, pair in pairs.items()} for index in (0, 1))
    as_share = [{name: value / 100 for name, value in side.items()} for side in (before, after)]
    # Division by 100 rounds each score once, and a relative loss can magnify that a hundredfold.
    assert forgetting(*as_share).score == pytest.approx(forgetting(before, after).score, rel=1e-12, abs=1e-10)


@pytest.mark.parametrize(("before", "after"), [({}, {}), ({"a": 1}, {"b": 1}), ({"a": 1}, {"a": 1, "b": 1})])
def test_the_benchmarks_must_be_the_same(before, after):
    with pytest.raises(InputError, match=r"the same benchmarks before and after: got \[.*\] and \[.*\]"):
        forgetting(before, after)


@pytest.mark.parametrize("score", [0, -0.5, float("nan")])
def test_a_score_before_training_that_is_not_positive_is_refused_by_name(score):
    with pytest.raises(InputError, match=rf"'arc' scored {score} before training: a relative loss needs more than 0"):
        forgetting({"mmlu": 1, "arc": score}, {"mmlu": 1, "arc": 1})
