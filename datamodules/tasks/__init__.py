"""Documents to (prompt, completion) pairs: one class a task, its texts, its answer's schema, its pairs."""

from datamodules.tasks.registry import (
    TASKS,
    CorrelationTask,
    Pair,
    RemediationTask,
    RiskTask,
    SummaryTask,
    Task,
    TriageTask,
    build_tasks,
)

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
