"""The prefetch thread: order, exceptions, bound and end; and the restartable iterable."""

import threading
import time

import pytest

from datamodules.stream.prefetch import Restartable, prefetch


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_items_are_transformed_in_order(depth):
    assert list(prefetch(iter(range(50)), depth, lambda n: 2 * n)) == list(range(0, 100, 2))


@pytest.mark.parametrize("depth", [0, 2])
def test_exceptions_are_raised_in_the_consumer(depth):
    def items():
        yield 1
        raise KeyError("inside")

    stream = prefetch(items(), depth, lambda n: n)
    assert next(stream) == 1
    with pytest.raises(KeyError, match="inside"):
        next(stream)


def test_the_thread_is_bounded_and_stops_when_the_generator_is_closed():
    made, closed = [], threading.Event()

    def items():
        try:
            for n in range(1000):
                made.append(n)
                yield n
        finally:
            closed.set()

    before = threading.active_count()
    stream = prefetch(items(), 3, lambda n: n)
    assert next(stream) == 0
    time.sleep(0.05)
    assert len(made) <= 1 + 3 + 1  # consumed, queued, and the thread's current item
    stream.close()
    assert closed.is_set()
    assert threading.active_count() == before


def test_a_restartable_starts_again_and_runs_nothing_before_its_first_item():
    starts = []

    def start():
        starts.append(len(starts))
        yield from range(3)

    restartable = Restartable(start)
    iterator = iter(restartable)
    assert starts == []
    assert next(iterator) == 0
    assert list(restartable) == list(restartable) == [0, 1, 2]
    assert len(starts) == 3
    assert not hasattr(restartable, "__len__")  # Lightning would take it for the length of the epoch
