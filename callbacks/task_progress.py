"""Progress of work that is no training loop: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from callbacks.progress import clock


class TaskProgress:
    """Shows how much of a piece of work is done and the time left; a context manager, called with the share done.

    Args:
        name: what is being done.
        console: where to show it; None shows nothing (ranks other than zero).
        log_interval_seconds: time between two lines where the console is no terminal.
    """

    def __init__(self, name: str, console: Console | None, log_interval_seconds: float = 10.0) -> None:
        self.name, self.console, self.log_interval_seconds = name, console, log_interval_seconds
        self._bar: Progress | None = None
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> Self:
        """Starts the clock and says what is being done."""
        self._started = self._shown = time.monotonic()
        if self.console is None:
            return self
        if self.console.is_terminal:
            self._open(self.console)
        if self._bar is None:
            self.console.print(f"{self.name} ...", highlight=False)
        return self

    def __call__(self, share: float) -> None:
        """Takes note of the share done, 0..1."""
        now = time.monotonic()
        if self.console is None:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=share, left=self._left(share, now))
        elif now - self._shown >= self.log_interval_seconds:
            self._shown = now
            self.console.print(f"{self.name} {share:.0%}  {self._left(share, now)}", highlight=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Frees the terminal; says how long it took."""
        if self._bar is not None:
            self._bar.stop()
        if self.console is not None and kind is None:
            self.console.print(f"{self.name}: {clock(time.monotonic() - self._started)}", highlight=False)

    def _open(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn())
        bar = Progress(*columns, TextColumn("{task.fields[left]}"), console=console, transient=True)
        try:
            bar.start()
        except LiveError:  # older versions of rich show one bar at a time, and training's is open
            return
        bar.add_task(self.name, total=1.0, left="")
        self._bar = bar

    def _left(self, share: float, now: float) -> str:
        if share <= 0:
            return ""
        return f"{clock((now - self._started) * (1 - share) / share)} left"
