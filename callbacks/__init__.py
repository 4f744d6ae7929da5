"""Callbacks: speed and memory, progress, run record, adapters, stopping by signal."""

from callbacks.adapter import AdapterExport
from callbacks.preemption import Interrupted, Preemption
from callbacks.progress import ConsoleProgress
from callbacks.run_record import RunRecord
from callbacks.throughput import Throughput

__all__ = ["AdapterExport", "ConsoleProgress", "Interrupted", "Preemption", "RunRecord", "Throughput"]
