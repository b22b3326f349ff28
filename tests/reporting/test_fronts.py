from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki.errors import InputError
from loki.reporting.fronts import KEY_LINE, Point, front, front_chart


def point(learned, forgotten, label="a"):
    return Point(label, "other", float(learned), float(forgotten))


def test_a_front_by_hand():
    """Of five runs two are beaten: one by less forgotten for as much, one by more learned for less."""
    best = [point(10, 1), point(20, 2), point(30, 4)]
    beaten = [point(20, 3), point(5, 4)]
    assert front([*beaten, *reversed(best)]) == best


def test_equal_runs_do_not_beat_each_other():
    assert len(front([point(1, 1, "a"), point(1, 1, "b")])) == 2


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_a_front_rises_and_beats_all_others(pairs):
    points = [point(*pair) for pair in pairs]
    found = front(points)
    assert found
    for one, other in pairwise(found):
        assert (one.forgotten < other.forgotten and one.learned < other.learned) or (
            one.forgotten == other.forgotten and one.learned == other.learned
        )
    for one in points:
        assert one in found or any(
            other.learned >= one.learned and other.forgotten <= one.forgotten and other != one for other in found
        )


def test_the_key_names_every_label_once_and_the_most_learned_first():
    """The number of a label stands at the best of its whole runs."""
    points = [Point("LoRA", "other", 11, 0.1), Point("LoKI", "loki", 10, 0.01), Point("LoKI", "loki", 12, 0.02)]
    picture = front_chart(points, learned="task, %", forgotten="KL", title="Front")
    svg = picture.inline()
    assert svg.count(">1 \u25cf LoKI<") == svg.count(">2 \u25b2 LoRA<") == 1
    numbers = {text.get_text(): text.xy for text in picture.figure.axes[0].texts}
    assert numbers == {"1": (0.02, 12), "2": (0.1, 11)}
    assert "task, %" in svg
    assert 'aria-label="Front"' in svg


def test_points_of_a_run_are_joined_and_the_whole_is_named():
    plain = [Point("LoKI", "loki", 10, 0.01)]
    part = Point("LoKI", "loki", 12, 0.005, "LoKI 0", "part")
    joined = [Point("LoKI", "loki", 10, 0.01, "LoKI 0"), part]
    options = {"learned": "task", "forgotten": "KL", "title": "Front"}
    figures = [front_chart(points, **options).figure for points in (plain, joined)]
    lines = [len(figure.axes[0].lines) for figure in figures]
    assert lines[1] == lines[0] + 1
    path = figures[1].axes[0].lines[-1].get_xydata().tolist()
    assert path == [[0.005, 12.0], [0.01, 10.0]]
    (number,) = figures[1].axes[0].texts
    assert number.xy == (0.01, 10)


def test_single_seeds_are_on_no_front_and_in_no_key():
    seed = Point("LoKI", "loki", 14, 0.001, role="seed")
    mean = Point("LoKI", "loki", 12, 0.002)
    assert front([seed, mean]) == [mean]
    svg = front_chart([seed, mean], learned="task", forgotten="KL", title="Front").inline()
    assert svg.count("LoKI") == 1


def test_long_labels_have_a_line_of_their_own():
    def height(name):
        points = [Point(f"{name} {number}", "loki", number, 1 + number) for number in range(4)]
        return front_chart(points, learned="task", forgotten="KL", title="Front").height

    assert height("a name that is too long to stand beside another") - height("short") == 2 * KEY_LINE


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(InputError, match="there is no run to draw: run the study first"):
        front_chart([], learned="", forgotten="", title="")
    with pytest.raises(InputError, match="'a' forgot 0: a logarithmic axis takes what is above 0"):
        front_chart([point(1, 0)], learned="", forgotten="", title="")
