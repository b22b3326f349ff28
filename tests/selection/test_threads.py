import threading

import pytest

from loki.selection import threads
from loki.selection.threads import in_threads, read_ahead


@pytest.mark.parametrize("num_processors", [1, 2, 3, 8])
@pytest.mark.parametrize("num_items", [0, 1, 2, 3, 7])
def test_all_items_in_order(monkeypatch, num_processors, num_items):
    monkeypatch.setattr(threads, "_num_processors", lambda: num_processors)
    assert in_threads(lambda item: item * item, range(num_items)) == [item * item for item in range(num_items)]


def test_work_is_shared(monkeypatch):
    """Each of the two waits for the other."""
    monkeypatch.setattr(threads, "_num_processors", lambda: 2)
    together = threading.Barrier(2, timeout=20)
    in_threads(lambda _: together.wait(), [1, 2])


def test_an_error_of_the_work_comes_out():
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda item: 1 // item, [1, 0])


@pytest.mark.parametrize("num_pieces", [0, 1, 5])
def test_the_same_pieces_in_order(num_pieces):
    assert list(read_ahead(iter(range(num_pieces)))) == list(range(num_pieces))


def test_the_next_piece_is_read_while_one_is_worked_on():
    asked = threading.Event()

    def pieces():
        yield 1
        asked.set()
        yield 2

    ahead = read_ahead(pieces())
    assert next(ahead) == 1
    assert asked.wait(timeout=20)
    assert list(ahead) == [2]


def test_an_error_of_the_reading_comes_after_the_pieces_before_it():
    def pieces():
        yield 1
        raise ValueError("damaged")

    ahead = read_ahead(pieces())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(ahead)
