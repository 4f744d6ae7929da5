"""Progress over all reports of one command, and the lines that it prints at its end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from callbacks.task_progress import TaskProgress

SHOWN_REASONS = 10  #: largest number of reports that were set aside in the printed lines
STAGES = 3  #: batches of questions of one analysis: risk; correlation and remediation; summary and triage


class ReportsProgress:
    """Shows the progress over all reports, by their sizes in bytes.

    Args:
        progress: the display.
        total: bytes of all reports.
    """

    def __init__(self, progress: TaskProgress, total: int) -> None:
        self._progress, self._total = progress, max(total, 1)
        self._done = self._size = self._stage = 0

    def start(self, size: int) -> None:
        """Starts a report of a size in bytes."""
        self._size, self._stage = size, 0

    def finish(self) -> None:
        """Adds the current report to the work that is done."""
        self._done += self._size
        self._progress(min(self._done / self._total, 1.0))

    def skip(self, size: int) -> None:
        """Removes a report without work from the total, so that it does not shorten the remaining time."""
        self._total = max(self._total - size, 1)

    @contextmanager
    def stage(self, names: str, count: int) -> Iterator[Callable[[float], None]]:
        """Shows one stage of the current report; the arguments are those of the pipeline's ``ShowProgress``."""

        def show(share: float) -> None:
            inside = min((self._stage + share) / STAGES, 1.0) * self._size
            self._progress(min((self._done + inside) / self._total, 1.0))

        yield show
        self._stage += 1


@dataclass
class Totals:
    """Sums over the reports of one command.

    Attributes:
        describe: returns lines about the analysis of the only report.
        reports: number of reports that were analysed.
        findings: number of their findings.
        correlations: number of their correlations.
        actions: number of their actions.
        lowered: findings that the model rates far lower than the scanner.
        lowered_reports: number of reports with such findings.
        skipped: findings that ``--limit`` left out, by severity.
        unusable: records that can't be used.
        done_before: reports whose results exist from an earlier run of the same command.
        set_aside: reports that can't be read, with ``report``, ``name`` and ``reason``.
        answers: counts of answers by task: ``by_model``, and one for each reason for a value by rule.
        only: the analysis, as long as it is the only one.
    """

    describe: Callable[[dict[str, Any]], list[str]]
    reports: int = 0
    findings: int = 0
    correlations: int = 0
    actions: int = 0
    lowered: int = 0
    lowered_reports: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    unusable: int = 0
    done_before: int = 0
    set_aside: list[dict[str, str]] = field(default_factory=list)
    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    only: dict[str, Any] | None = None

    def add(self, document: dict[str, Any]) -> None:
        """Adds the analysis of one report."""
        self.reports += 1
        self.findings += len(document["enriched_findings"])
        self.correlations += len(document["correlations"])
        self.actions += len(document["actions"])
        about = document["enrichment_results"]["model_report"]
        self.only = document if self.reports == 1 else None
        self.lowered += about["lowered"]["count"]
        self.lowered_reports += about["lowered"]["count"] > 0
        self.skipped += Counter(document["raw_reference"].get("skipped", {}).get("by_severity", {}))
        self.unusable += len(document["raw_reference"]["unusable"])
        for task, counts in about["answers"].items():
            self.answers[task] += Counter(counts["by_rule"])
            self.answers[task]["by_model"] += counts["by_model"]

    def lines(self, target: Path, seconds: float, reused: int, ignored: int) -> list[str]:
        """Returns the lines that ``analyze`` prints at its end.

        Args:
            target: the output.
            seconds: duration of the command.
            reused: answers read from an interrupted run, and answers to equal questions of several reports.
            ignored: files whose name is not that of a report.
        """
        seconds = max(seconds, 1e-9)
        again = f", {reused} answers reused" if reused else ""
        lines = [
            f"{self.reports} report{'s' * (self.reports != 1)}, {self.findings} findings, {self.correlations} "
            f"correlations, {self.actions} actions in {seconds:.0f} s ({self.reports / seconds:.2g} reports/s, "
            f"{self.findings / seconds:.2g} findings/s{again}): {target}"
        ]
        if self.done_before:
            lines.append(f"  done before  {self.done_before} reports, by an earlier run of this command")
        for task, counts in self.answers.items():
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if reason != "by_model")
            lines.append(f"  {task:<12} {counts['by_model']} by the model" + (f"; by rule: {reasons}" * bool(reasons)))
        if self.only is not None and not self.done_before and not self.set_aside:
            lines += self.describe(self.only)
        else:
            lines += self._sum_lines()
        if ignored:
            lines.append(f"  ignored      {ignored} files whose name does not end with .json")
        return lines + self._set_aside_lines()

    def _sum_lines(self) -> list[str]:
        lines = []
        if self.lowered:
            lines.append(
                f"  LOWERED      The model rates {self.lowered} finding{'s' * (self.lowered != 1)} of "
                f"{self.lowered_reports} report{'s' * (self.lowered_reports != 1)} far lower than the scanner; "
                "the results list them first"
            )
        if self.unusable:
            lines.append(f"  not usable   {self.unusable} records of the reports; see raw_reference.unusable")
        if self.skipped:
            lines.append(f"  skipped      {skipped_text(self.skipped)} by --limit")
        return lines

    def _set_aside_lines(self) -> list[str]:
        if not self.set_aside:
            return []
        lines = [f"  set aside    {len(self.set_aside)} reports that can't be read:"]
        lines += [f"    {item['report']}: {item['reason']}" for item in self.set_aside[:SHOWN_REASONS]]
        rest = len(self.set_aside) - SHOWN_REASONS
        return lines + ([f"    and {rest} more; the output's set_aside.json has all"] if rest > 0 else [])


def skipped_text(by_severity: dict[str, int]) -> str:
    """Returns a number of findings as text: "3 findings (1 high, 2 low)"."""
    count = sum(by_severity.values())
    parts = ", ".join(f"{number} {severity}" for severity, number in by_severity.items())
    return f"{count} finding{'s' * (count != 1)} ({parts})"
