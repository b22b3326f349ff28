"""Draws against brute force and against what they promise: exact counts, order, and small draws inside large ones."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki.errors import InputError
from loki.prompts.prompt import Prompt
from loki.prompts.sampling import apportion, draw, largest_total, sample_per_subject


def prompts_of(*subjects):
    return [Prompt(f"{index}", text="a", subject=subject) for index, subject in enumerate(subjects)]


MIXED = prompts_of(*["bees", None, "ants"] * 20, *["bees"] * 10, "cats")


def ids(prompts):
    return [prompt.id for prompt in prompts]


def in_order(prompts):
    return [prompt for prompt in MIXED if prompt in prompts]


@pytest.mark.parametrize("count", [1, 5, 19, 20, 21, 30, 99])
def test_each_subject_keeps_at_most_so_many_in_order(count):
    found = sample_per_subject(MIXED, count, 0)
    for subject, available in (("bees", 30), ("ants", 20), ("cats", 1)):
        assert sum(prompt.subject == subject for prompt in found) == min(count, available)
    assert sum(prompt.subject is None for prompt in found) == 20
    assert found == in_order(found)


def test_a_smaller_sample_of_a_subject_is_part_of_a_larger_one():
    samples = [set(ids(sample_per_subject(MIXED, count, 3))) for count in range(1, 32)]
    for smaller, larger in pairwise(samples):
        assert smaller <= larger


def test_another_subject_changes_no_sample():
    more = [*MIXED[:7], *prompts_of(*["dogs"] * 9), *MIXED[7:]]
    found = [prompt for prompt in sample_per_subject(more, 4, 0) if prompt.subject != "dogs"]
    assert found == sample_per_subject(MIXED, 4, 0)


def test_subjects_and_seeds_draw_differently():
    pairs = prompts_of(*["a"] * 40, *["b"] * 40)
    first, other = sample_per_subject(pairs, 10, 0), sample_per_subject(pairs, 10, 1)
    places = [[int(prompt.id) % 40 for prompt in first if prompt.subject == subject] for subject in "ab"]
    assert first != other
    assert places[0] != places[1]
    assert first == sample_per_subject(pairs, 10, 0)


def test_the_draw_of_a_seed_is_the_same_for_ever():
    """Published subsets are named by their seed, so a change of these numbers needs a line in the changelog."""
    hundred = prompts_of(*["anatomy"] * 100)
    assert ids(sample_per_subject(hundred, 5, 0)) == ["2", "23", "64", "88", "97"]
    assert ids(draw(hundred, 5, "0")) == ["9", "11", "67", "70", "96"]


@pytest.mark.parametrize("count", [0, -1])
def test_samples_of_none(count):
    with pytest.raises(InputError, match=f"{count} samples per subject are not possible: ask for 1 or more"):
        sample_per_subject(MIXED, count, 0)


def test_every_prompt_is_drawn_about_as_often():
    """2,000 draws of 3 of 10: 600 each, standard deviation 20; five of them are allowed."""
    drawn = [prompt for seed in range(2000) for prompt in ids(draw(MIXED[:10], 3, f"{seed}"))]
    assert all(500 < drawn.count(prompt) < 700 for prompt in ids(MIXED[:10]))


@given(count=st.integers(0, 80), seed=st.text(max_size=3))
def test_draws_keep_order_and_contain_smaller_ones(count, seed):
    found = draw(MIXED, count, seed)
    assert len(set(ids(found))) == len(found) == min(count, len(MIXED))
    assert found == in_order(found)
    assert set(ids(draw(MIXED, count // 2, seed))) <= set(ids(found))


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [
        (10, [0.7, 0.3], [7, 3]),
        (100, [70, 30], [70, 30]),
        (7, [1, 1], [4, 3]),
        (8, [1, 1, 1], [3, 3, 2]),
        (1, [0.1, 0.9], [0, 1]),
        (0, [1, 2], [0, 0]),
        (5, [2], [5]),
        # Hamilton's method on 26 seats for populations of 9061, 7179, 5259, 3319 and 1182 (quotas 9.061, 7.179 …).
        (26, [9061, 7179, 5259, 3319, 1182], [9, 7, 5, 4, 1]),
        # Remainders are equal, 0.5 each; with binary floats 0.7·5 = 3.5 but 0.1·5 + 0.2·5 are not.
        (5, [0.1, 0.2, 0.7], [1, 1, 3]),
        (5, [0.7, 0.3], [4, 1]),
        (5, [0.3, 0.7], [2, 3]),
    ],
)
def test_counts_by_hand(total, shares, counts):
    assert apportion(total, shares) == counts


@given(total=st.integers(0, 12), weights=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_counts_are_the_whole_numbers_nearest_to_the_quotas(total, weights):
    """Of all ways to write `total` as a sum, largest remainders has the least sum of distances to the quotas."""
    # Distances are multiplied by the sum of weights, so that they are whole.
    every = [parts for parts in product(range(total + 1), repeat=len(weights)) if sum(parts) == total]
    distances = {
        parts: sum(abs(part * sum(weights) - total * weight) for part, weight in zip(parts, weights, strict=True))
        for parts in every
    }
    counts = apportion(total, weights)
    assert sum(counts) == total
    assert distances[tuple(counts)] == min(distances.values())
    for tenfold in ([weight / 10 for weight in weights], [weight * 10.0 for weight in weights]):
        assert apportion(total, tenfold) == counts


@given(
    parts=st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.1, 0.25, 0.3, 1, 2, 7])), min_size=1, max_size=3)
)
def test_the_largest_total_by_trying_all(parts):
    available, shares = ([part[index] for part in parts] for index in (0, 1))
    fitting = [
        total
        for total in range(sum(available) + 1)
        if all(count <= number for count, number in zip(apportion(total, shares), available, strict=True))
    ]
    assert largest_total(available, shares) == max(fitting)


def test_the_largest_total_by_hand():
    # 381 is 114.3 and 266.7, so 114 and 267; 382 is 114.6 and 267.4, so 115.
    assert largest_total([114, 14042], [0.3, 0.7]) == 381
    assert largest_total([4, 3], [1, 1]) == 7
    assert largest_total([3, 4], [1, 1]) == 6
    assert largest_total([5], [0.5]) == 5
    assert largest_total([1, 1000], [1e-9, 1]) == 1000
