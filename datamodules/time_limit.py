"""Ends a computation that takes too long, such as an endless loop in the chat template of an unknown model."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERVAL_SECONDS = 0.2  #: time between two attempts, because the code may catch the first one


class TimeLimitReached(BaseException):
    """Raised inside the block of :func:`time_limit`. No Exception, so that the block can't catch it as one."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises :class:`TimeLimitReached` in the block if it takes longer than ``seconds``.

    In the main thread a signal interrupts the block, also inside the arithmetic of large integers. In another thread
    Python raises the exception before the next bytecode.

    Args:
        seconds: wall-clock time.

    Raises:
        TimeLimitReached: the time is over.
    """
    main = threading.current_thread() is threading.main_thread()
    with _signal_limit(seconds) if main and hasattr(signal, "setitimer") else _thread_limit(seconds):
        yield


@contextmanager
def _signal_limit(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeLimitReached

    previous = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, INTERVAL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if left:  # a timer of the caller, such as a test's
            signal.setitimer(signal.ITIMER_REAL, left, interval)


@contextmanager
def _thread_limit(seconds: float) -> Iterator[None]:
    ident, ended, lock = threading.get_ident(), threading.Event(), threading.Lock()

    def watch() -> None:
        if ended.wait(seconds):
            return
        while True:
            with lock:
                if ended.is_set():
                    return
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(TimeLimitReached))
            ended.wait(INTERVAL_SECONDS)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        with lock:
            ended.set()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), None)  # one that is not raised yet
