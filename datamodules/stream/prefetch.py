"""Iterables for Lightning's loops: one that restarts, and a thread that computes items ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Restartable(Generic[T]):
    """An iterable that starts again whenever it is iterated; nothing runs before the first item is requested.

    It has no length, because the length is unknown, and no state, because the data module stores it: Lightning would
    use either.

    Args:
        start: returns a new iterator.
    """

    def __init__(self, start: Callable[[], Iterator[T]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[T]:
        yield from self._start()


def prefetch(items: Iterator[T], depth: int, transform: Callable[[T], U]) -> Iterator[U]:
    """Runs an iterator in a thread, ``depth`` items ahead; its exceptions are raised here.

    Closing the generator (by Ctrl-C or by dropping the last reference, too) stops the thread.

    Args:
        items: iterator that only the thread uses from here on.
        depth: size of the bounded queue; 0 starts no thread.
        transform: applied to each item in the thread.
    """
    if depth == 0:
        yield from map(transform, items)
        return
    ahead: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, ahead, stop, transform), name="prefetch", daemon=True)
    thread.start()
    del items  # the thread's frame has the last reference to the iterator, and so to the reading processes
    try:
        while True:
            more, item = ahead.get()
            if not more:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        stop.set()
        thread.join(timeout=10)  # it may wait for a document; a daemon thread does not block the exit after that


def _fill(items: Iterator[T], ahead: queue.Queue[Any], stop: threading.Event, transform: Callable[[T], Any]) -> None:
    def put(entry: tuple[bool, Any]) -> bool:
        while not stop.is_set():
            try:
                ahead.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in items:
            if not put((True, transform(item))):
                return
        put((False, None))
    except BaseException as error:  # the consumer raises it
        put((False, error))
    finally:
        close = getattr(items, "close", None)
        if close:
            close()
