"""Turns documents into (prompt, completion) pairs.

A task has its texts, the JSON Schema of its answers, and methods that write prompts and pairs; see
:class:`~datamodules.tasks.base.Task`. There is one class per task, in a module of its own or with a related task.
"""

from datamodules.tasks.base import Pair, Task
from datamodules.tasks.correlation import CorrelationTask
from datamodules.tasks.registry import TASKS, build_tasks
from datamodules.tasks.remediation import RemediationTask
from datamodules.tasks.risk import RiskTask
from datamodules.tasks.summaries import SummaryTask, TriageTask

__all__ = [
    "TASKS",
    "CorrelationTask",
    "Pair",
    "RemediationTask",
    "RiskTask",
    "SummaryTask",
    "Task",
    "TriageTask",
    "build_tasks",
]
