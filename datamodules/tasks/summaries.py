"""The tasks about a window of scored findings: an executive summary, and triage.

A window is a bounded part of a document's findings, see :mod:`datamodules.tasks.windows`. The target answers are the
document's own texts if it has any, else texts that are computed from the findings of the window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from datamodules.tasks import schemas
from datamodules.tasks.base import SYSTEM, Pair, compact_json
from datamodules.tasks.windows import executive_summary, finding_line, iter_windows, top_findings, triage_summary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datamodules.records import Document
    from datamodules.tasks.base import Schema
    from datamodules.tasks.windows import Window


class _WindowTask(ABC):
    """Base class of the tasks about a window of scored findings.

    Args:
        window: largest number of findings in a prompt.
    """

    name: str
    system = SYSTEM
    instruction: str
    answer_schema: Schema

    def __init__(self, window: int = 24) -> None:
        self.window = window

    def content(self, window: Window) -> str:
        """Returns the findings of a window, one object each, and the correlations among them, as compact JSON."""
        lines = [finding_line(finding, shown) for finding, shown in zip(window.findings, window.ids, strict=True)]
        return compact_json({"findings": lines, "correlations": [link.line() for link in window.links]})

    @abstractmethod
    def answer(self, window: Window) -> dict[str, Any]:
        """Returns the target answer for a window of a document."""

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per window of a document."""
        for window in iter_windows(document, self.window):
            answer = compact_json(self.answer(window))
            yield Pair(self.name, self.content(window), answer, window.severity, "mixed", len(window.findings))


class SummaryTask(_WindowTask):
    """Summarises a window of findings for an executive."""

    name = "summary"
    instruction = (
        "Summarise these findings for an executive: counts by severity, the top risks by name, what is correlated, and "
        "one recommendation. Answer with the key executive_summary (a string of a few sentences); use only what the "
        "input says.\nScan:\n"
    )
    answer_schema = schemas.SUMMARY

    def answer(self, window: Window) -> dict[str, Any]:
        """Returns the summary, see :func:`~datamodules.tasks.windows.executive_summary`."""
        return {"executive_summary": executive_summary(window)}


class TriageTask(_WindowTask):
    """Selects the findings to investigate first, and describes how urgent the window is."""

    name = "triage"
    instruction = (
        "Triage these findings. Answer with the keys triage_summary (a string) and top_findings (the 5 of highest "
        "risk, ties by id: list of objects with id, title, severity, risk_score, probability_actionable and reason); "
        "use only what the input says.\nScan:\n"
    )
    answer_schema = schemas.TRIAGE

    def answer(self, window: Window) -> dict[str, Any]:
        """Returns the triage text and the riskiest findings, highest risk first."""
        return {"triage_summary": triage_summary(window), "top_findings": top_findings(window)}
