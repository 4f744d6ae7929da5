"""Tests of TaskProgress: lines without a terminal, bars on a terminal, remaining and elapsed time."""

from io import StringIO

import pytest
from rich.console import Console

from callbacks import task_progress
from callbacks.task_progress import TaskProgress
from tests.helpers.fake_clock import FakeClock


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(task_progress, "time", clock)
    return clock


def test_lines_show_the_fraction_and_the_remaining_time_without_a_terminal(clock):
    console = Console(file=StringIO(), width=80)
    with TaskProgress("work", console, log_interval_seconds=0) as progress:
        clock.now += 10
        progress(0.25)
        clock.now += 30
        progress(1.0)
        clock.now += 5
    expected = ["work ...", "work 25%  0:30 left", "work 100%  0:00 left", "work: 0:45"]
    assert console.file.getvalue().splitlines() == expected


def test_lines_are_printed_once_per_interval(clock):
    console = Console(file=StringIO(), width=80)
    with TaskProgress("work", console, log_interval_seconds=10) as progress:
        for step in range(1, 10):
            clock.now += 4
            progress(step / 10)
    lines = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines[1:-1]] == ["30%", "60%", "90%"]  # after 12, 24 and 36 seconds


def test_nothing_is_left_to_estimate_at_the_start(clock):
    console = Console(file=StringIO(), width=80)
    with TaskProgress("work", console, log_interval_seconds=0) as progress:
        progress(0.0)
    assert console.file.getvalue().splitlines()[1].rstrip() == "work 0%"


def test_without_a_console_nothing_happens():
    with TaskProgress("silent", None) as progress:
        progress(0.5)


def test_bars_on_a_terminal_can_be_nested():
    console = Console(file=StringIO(), width=80, force_terminal=True)
    with TaskProgress("outer", console) as outer, TaskProgress("inner", console) as inner:
        inner(0.5)
        outer(0.5)
    assert "inner" in console.file.getvalue()
    assert "outer" in console.file.getvalue()


def test_an_error_stops_the_bar_and_prints_no_elapsed_time():
    console = Console(file=StringIO(), width=80, force_terminal=True)
    with pytest.raises(RuntimeError, match="broken"), TaskProgress("work", console) as progress:
        progress(0.5)
        raise RuntimeError("broken")
    assert console._live_stack == []
    assert "work: " not in console.file.getvalue()
