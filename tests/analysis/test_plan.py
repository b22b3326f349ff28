"""The plan depends on the prompts only, keeps like lengths together, and shares all of them out."""

from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki.analysis import plan as plan_module
from loki.analysis.plan import PROMPTS_PER_PART, Plan
from loki.errors import InputError

LENGTHS = [5, 9, 2, 9, 7, 1, 3]
"""By length, ties in the order in which they stand: prompts 1 3 4 0 6 2 5."""


@pytest.fixture
def parts_of(monkeypatch):
    def set_size(size: int) -> None:
        monkeypatch.setattr(plan_module, "PROMPTS_PER_PART", size)

    return set_size


def test_neighbours_in_length_are_neighbours_in_a_part(parts_of):
    parts_of(2)
    plan = Plan.of(LENGTHS, 1)
    assert plan.parts[0] == [1, 3]  # the longest first: what memory does not allow shows at once
    assert sorted(plan.parts[1:]) == [[4, 0], [5], [6, 2]]


def test_the_later_parts_are_in_no_order_of_length():
    """The time left is told from the time gone: parts of falling length would make it wrong throughout."""
    plan = Plan.of(range(1600, 0, -1), 1)
    firsts = [part[0] for part in plan.parts]
    assert firsts[0] == 0
    rising = sum(first < second for first, second in pairwise(firsts[1:]))
    assert 30 < rising < 68  # of 98 pairs; sorted parts would have 98 or none


@pytest.mark.parametrize(
    ("batch_size", "part_size", "last"),
    [(1, 16, 8), (3, 15, 10), (7, 14, 12), (8, 16, 8), (16, 16, 8), (17, 17, 6), (100, 40, 40)],
)
def test_a_part_is_whole_batches_of_about_sixteen_prompts(batch_size, part_size, last):
    assert PROMPTS_PER_PART == 16
    plan = Plan.of([1] * 40, batch_size)
    assert sorted(map(len, plan.parts)) == sorted([part_size] * (40 // part_size) + [last] * (40 % part_size > 0))
    assert plan.batch_size == batch_size


def test_batches_are_cut_from_a_part_in_order(parts_of):
    parts_of(6)
    plan = Plan.of(LENGTHS, 3)
    assert plan.parts == [[1, 3, 4, 0, 6, 2], [5]]
    assert plan.batches(0) == [[1, 3, 4], [0, 6, 2]]
    assert plan.batches(1) == [[5]]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=120),
    batch_size=st.integers(1, 40),
    num_shards=st.integers(1, 8),
)
def test_parts_and_shards_share_out_every_prompt_once(lengths, batch_size, num_shards):
    whole = Plan.of(lengths, batch_size)
    assert sorted(chain(*whole.parts)) == list(range(len(lengths)))
    assert whole == Plan.of(list(lengths), batch_size)
    for part, places in enumerate(whole.parts):
        assert list(chain(*whole.batches(part))) == places
    assert all(len(batch) <= batch_size for part in range(len(whole.parts)) for batch in whole.batches(part))
    if num_shards <= len(whole.parts):
        shards = [Plan.of(lengths, batch_size, (number, num_shards)) for number in range(1, num_shards + 1)]
        assert sorted(chain(*(shard.parts for shard in shards))) == sorted(whole.parts)  # the same parts: the same bits
        sizes = [len(shard.parts) for shard in shards]
        assert max(sizes) - min(sizes) <= 1


def test_a_batch_does_not_depend_on_what_others_are_asked_for(parts_of):
    """A shard computes the very batches of the whole run, so that its scores are the same bit for bit."""
    parts_of(2)
    whole = Plan.of(LENGTHS, 2)
    batches = [whole.batches(part) for part in range(4)]
    second = Plan.of(LENGTHS, 2, (2, 3))
    assert [second.batches(part) for part in range(len(second.parts))] == [batches[1]]
    first = Plan.of(LENGTHS, 2, (1, 3))
    assert [first.batches(part) for part in range(len(first.parts))] == [batches[0], batches[3]]


def test_a_batch_size_below_one_is_refused():
    for batch_size in (0, -3):
        with pytest.raises(InputError, match=f"batch size {batch_size} is not possible: give 1 or more"):
            Plan.of(LENGTHS, batch_size)


def test_more_shards_than_parts_are_refused(parts_of):
    parts_of(2)
    Plan.of(LENGTHS, 1, (4, 4))
    with pytest.raises(InputError, match="5 shards are more than the 4 parts of 2 prompts that there are: use at most"):
        Plan.of(LENGTHS, 1, (1, 5))
