"""Progress display of work outside of the training loop: a bar on a terminal, otherwise plain lines."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from callbacks.progress import format_duration
from datamodules.output_text import printable


class TaskProgress:
    """Context manager that shows the completed fraction of a task and the remaining time.

    The object is called with the completed fraction.

    Args:
        name: name of the task.
        console: output; None shows nothing (on ranks other than zero).
        log_interval_seconds: seconds between two lines if the console is not a terminal.
    """

    def __init__(self, name: str, console: Console | None, log_interval_seconds: float = 10.0) -> None:
        self.name, self.console, self.log_interval_seconds = printable(name), console, log_interval_seconds
        self._bar: Progress | None = None
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> Self:
        """Starts the clock and shows the name of the task."""
        self._started = self._shown = time.monotonic()
        if self.console is None:
            return self
        if self.console.is_terminal:
            self._open(self.console)
        if self._bar is None:
            self.console.print(f"{self.name} ...", highlight=False, markup=False)
        return self

    def __call__(self, fraction: float) -> None:
        """Updates the progress (0..1)."""
        now = time.monotonic()
        if self.console is None:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=fraction, left=self._left(fraction, now))
        elif now - self._shown >= self.log_interval_seconds:
            self._shown = now
            self.console.print(
                f"{self.name} {fraction:.0%}  {self._left(fraction, now)}", highlight=False, markup=False
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stops the bar and prints the elapsed time."""
        if self._bar is not None:
            self._bar.stop()
        if self.console is not None and kind is None:
            self.console.print(
                f"{self.name}: {format_duration(time.monotonic() - self._started)}", highlight=False, markup=False
            )

    def _open(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        bar = Progress(*columns, TextColumn("{task.fields[left]}"), console=console, transient=True)
        try:
            bar.start()
        except LiveError:  # older versions of rich show one bar at a time, and the bar of the fit is open
            return
        bar.add_task(self.name, total=1.0, left="")
        self._bar = bar

    def _left(self, fraction: float, now: float) -> str:
        if fraction <= 0:
            return ""
        return f"{format_duration((now - self._started) * (1 - fraction) / fraction)} left"
