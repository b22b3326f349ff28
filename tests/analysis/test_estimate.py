"""The estimate, with a clock that stands still but for what an analysis is said to cost."""

from types import SimpleNamespace

import pytest
import torch

from loki.analysis import estimate as estimate_module
from loki.analysis.estimate import Estimate, estimate
from loki.analysis.plan import Plan


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class PretendedAnalysis:
    """An analysis whose batches take 0.1 s and 0.01 s for each column, and ten times that at first."""

    def __init__(self, lengths, clock, *, batch_size=1, dtype="float32", shard=None):
        self.encoded = [SimpleNamespace(ids_T=torch.zeros(length)) for length in lengths]
        self.plan = Plan.of(lengths, batch_size, shard)
        self.header = SimpleNamespace(num_layers=3, num_rows=20, dtype=dtype)
        self.num_prompts = sum(map(len, self.plan.parts))
        self.clock, self.calls = clock, []

    def attribute(self, places):
        columns = len(places) * max(len(self.encoded[place].ids_T) for place in places)
        self.clock.now += (0.1 + 0.01 * columns) * (1 if self.calls else 10)
        self.calls.append(list(places))
        return []


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(estimate_module.time, "perf_counter", clock.perf_counter)
    return clock


def test_a_cost_that_grows_with_length_is_told_exactly(clock):
    """Lengths 10, 20, 60, 90: 4 × 0.1 s and 180 columns of 0.01 s are 2.2 s; the slow first call does not count."""
    analysis = PretendedAnalysis([20, 90, 10, 60], clock)
    found = estimate(analysis)
    assert found.seconds == pytest.approx(2.2)
    assert (found.num_prompts, found.num_tokens, found.log_bytes) == (4, 180, 4 * 3 * 20 * 4)
    # To warm up, then the shortest, the middle and the longest; nothing else is computed.
    assert analysis.calls[0] == analysis.calls[1]
    assert len(analysis.calls) == 4
    assert {place for (place,) in analysis.calls} >= {2, 1}


def test_padding_costs_what_tokens_cost(clock):
    """Batches (90, 60) and (20, 10) have 180 and 40 columns, and 180 tokens: 0.2 + 2.2 s."""
    found = estimate(PretendedAnalysis([20, 90, 10, 60], clock, batch_size=2))
    assert found.seconds == pytest.approx(2.4)
    assert found.num_tokens == 180


def test_a_batch_that_is_not_full_costs_less(clock):
    """Five prompts of 10 tokens in batches of two: 0.3 + 0.3 + 0.2 s."""
    assert estimate(PretendedAnalysis([10] * 5, clock, batch_size=2)).seconds == pytest.approx(0.8)


def test_a_single_prompt_and_equal_lengths(clock):
    assert estimate(PretendedAnalysis([7], clock)).seconds == pytest.approx(0.17)
    assert estimate(PretendedAnalysis([7] * 5, clock)).seconds == pytest.approx(5 * 0.17)


def test_a_shard_is_told_what_the_shard_costs(clock):
    """32 prompts are two parts; of lengths 1 to 32 the first shard has the longer half, 17 to 32."""
    found = estimate(PretendedAnalysis(range(1, 33), clock, shard=(1, 2)))
    assert (found.num_prompts, found.num_tokens) == (16, sum(range(17, 33)))
    assert found.seconds == pytest.approx(16 * 0.1 + 0.01 * sum(range(17, 33)))


def test_half_precision_halves_the_log(clock):
    assert estimate(PretendedAnalysis([5, 5], clock, dtype="float16")).log_bytes == 2 * 3 * 20 * 2


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            (14042, 2_100_000, 970_583_040, 15_400.4),
            "14,042 prompts, 2,100,000 tokens, a log of 970.6 MB, about 4 h 16 min 40 s (0.91 prompts/s)",
        ),
        ((2, 30, 480, 0.5), "2 prompts, 30 tokens, a log of 480 bytes, about 0 h 00 min 00 s (4.00 prompts/s)"),
        ((25, 30, 6_000, 59.6), "25 prompts, 30 tokens, a log of 6.0 kB, about 0 h 01 min 00 s (0.42 prompts/s)"),
        ((1, 1, 2_500_000_000, 3600), "1 prompts, 1 tokens, a log of 2.5 GB, about 1 h 00 min 00 s (0.00 prompts/s)"),
    ],
)
def test_for_people(values, text):
    assert str(Estimate(*values)) == text
