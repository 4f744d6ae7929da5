"""Builds tasks by name.

A task turns a document into (prompt, completion) pairs. It is a small class with its texts, the JSON Schema of its
answers, ``content`` (the user text of a prompt, from findings without answers; also used for inference) and ``pairs``;
see :class:`~datamodules.tasks.base.Task`. The tasks use no random numbers: samples are chosen by digests of ids, so
that the same document gives the same pairs in every process.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from datamodules.errors import UserError
from datamodules.tasks.agent_prompts import AGENT_TASKS
from datamodules.tasks.correlation import CorrelationTask
from datamodules.tasks.remediation import RemediationTask
from datamodules.tasks.risk import RiskTask
from datamodules.tasks.summaries import SummaryTask, TriageTask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from datamodules.tasks.base import Task

TASKS = ("risk", "correlation", "summary", "triage", "remediation")


def build_tasks(
    names: Sequence[str],
    *,
    rationale: bool = False,
    window: int = 24,
    members: int = 8,
    distractors: int = 4,
) -> dict[str, Task]:
    """Builds tasks by name.

    Args:
        names: names of :data:`TASKS` or of :data:`~datamodules.tasks.agent_prompts.AGENT_TASKS`.
        rationale: whether answers of the risk task have a rationale.
        window: largest number of findings in a prompt of summary, triage and the agent's tasks; at least 1.
        members: largest number of a correlation's findings in a prompt; at least 2.
        distractors: largest number of other findings in a correlation prompt; at least 0.

    Returns:
        The tasks, in the order of ``names``.

    Raises:
        UserError: a name is unknown, or a size is out of range.
    """
    for option, value, least in (("window", window, 1), ("members", members, 2), ("distractors", distractors, 0)):
        if value < least:
            raise UserError(f"{option}={value}: must be at least {least}")
    builders: dict[str, Callable[[], Task]] = {
        "risk": lambda: RiskTask(rationale),
        "correlation": lambda: CorrelationTask(members, distractors),
        "summary": lambda: SummaryTask(window),
        "triage": lambda: TriageTask(window),
        "remediation": RemediationTask,
    }
    for name, task in AGENT_TASKS.items():
        builders[name] = partial(task, window)
    tasks: dict[str, Task] = {}
    for name in names:
        if name not in builders:
            raise UserError(f"data.task_weights: there is no task {name!r}. Fix: use one of {', '.join(builders)}.")
        tasks[name] = builders[name]()
    return tasks
