"""A clock that replaces the ``time`` module in a test."""


class FakeClock:
    """Returns ``now`` as the monotonic time; a test advances it by hand.

    Attributes:
        now: current time, in seconds.
    """

    def __init__(self, now=100.0):
        self.now = now

    def monotonic(self):
        return self.now


def slow_step(clock, step, seconds):
    """Returns a step function that advances the clock by some seconds before it calls ``step``."""

    def wrapped(self, batch, batch_idx):
        clock.now += seconds
        return step(self, batch, batch_idx)

    return wrapped
