"""Callbacks: throughput, progress, run record, adapter checkpoints, evaluation, and stop by signal."""

from callbacks.adapter_checkpoint import AdapterCheckpoint
from callbacks.evaluation import Evaluation
from callbacks.preemption import Interrupted, Preemption
from callbacks.progress import ConsoleProgress
from callbacks.run_record import RunRecord
from callbacks.throughput import Throughput
from callbacks.xla_monitor import XLAMonitor

__all__ = [
    "AdapterCheckpoint",
    "ConsoleProgress",
    "Evaluation",
    "Interrupted",
    "Preemption",
    "RunRecord",
    "Throughput",
    "XLAMonitor",
]
