"""Analyses the reports that are not done, in groups whose questions share batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from callbacks.task_progress import TaskProgress
from commands.analyze.inputs import Inputs, Report, ReportFile, read_all_reports
from commands.analyze.several.totals import ReportsProgress, Totals
from datamodules.errors import UserError, one_line

if TYPE_CHECKING:
    from rich.console import Console

    from commands.analyze.outputs import Results
    from commands.analyze.several.shared_batches import ShowProgress
    from lightning_modules.generation.response_cache import Progress

MAX_GROUP = 64  #: largest number of reports whose questions are answered together

Analyze = Callable[[Sequence[Report], "ShowProgress"], list[dict[str, Any]]]


class _Pending(NamedTuple):
    """A report that waits for its analysis."""

    file: ReportFile
    key: str
    report: Report


@dataclass
class ReportLoop:
    """Analyses the reports of one command.

    A group has at least ``batch`` findings or :data:`MAX_GROUP` reports; the last one may be smaller.

    Attributes:
        inputs: the reports.
        results: receives the analyses.
        totals: sums, to which the loop adds.
        parse: parses the bytes of a report.
        analyze: analyses a group of reports.
        render: turns an analysis into the text of the result.
        settings: all that a result depends on, in addition to the report.
        batch: number of answers that are generated at the same time.
    """

    inputs: Inputs
    results: Results
    totals: Totals
    parse: Callable[[bytes, ReportFile], Report]
    analyze: Analyze
    render: Callable[[dict[str, Any]], str]
    settings: dict[str, Any]
    batch: int

    def run(self, console: Console) -> None:
        """Analyses the reports that are not done.

        Args:
            console: shows the progress.

        Raises:
            UserError: the only report can't be read, or a result can't be written.
        """
        with _progress(self.inputs, console) as (progress, show_progress):
            group: list[_Pending] = []
            for pending in self._not_done(progress):
                group.append(pending)
                findings = sum(len(item.report.parsed.document.findings) for item in group)
                if findings >= self.batch or len(group) == MAX_GROUP:
                    self._analyze_group(group, progress, show_progress)
                    group = []
            if group:
                self._analyze_group(group, progress, show_progress)

    def _analyze_group(self, group: list[_Pending], progress: ReportsProgress, show_progress: ShowProgress) -> None:
        progress.start(sum(item.file.size for item in group))
        documents = self.analyze([item.report for item in group], show_progress)
        for item, document in zip(group, documents, strict=True):
            self.results.write(item.file.name, item.key, self.render(document))
            self.totals.add(document)
        progress.finish()

    def _not_done(self, progress: ReportsProgress) -> Iterator[_Pending]:
        """Yields the reports without a result; counts the others, and sets aside those that can't be read."""
        for file, data in read_all_reports(self.inputs.reports):
            try:
                if isinstance(data, str):
                    raise UserError(f"--report {file.label}: {data}. Fix: give a file that can be read.")
                key = result_key(data, self.settings)
                if self.results.is_done(file.name, key):
                    self.totals.done_before += 1
                    progress.skip(file.size)
                    continue
                report = self.parse(data, file)
            except UserError as error:
                if not self.inputs.several:
                    raise
                self.totals.set_aside.append(_unreadable(file, error))
                self.results.discard(file.name)
                progress.skip(file.size)
                continue
            yield _Pending(file, key, report)


def result_key(data: bytes, settings: dict[str, Any]) -> str:
    """Returns the digest of a report's content and of all that its analysis depends on."""
    state = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    state.update(data)
    return state.hexdigest()


def _unreadable(file: ReportFile, error: UserError) -> dict[str, str]:
    reason = one_line(error, 400).removeprefix(f"--report {file.label}: ")
    return {"report": file.label, "name": file.name, "reason": reason.partition(" Fix: ")[0].removesuffix(".")}


@contextmanager
def _progress(inputs: Inputs, console: Console) -> Iterator[tuple[ReportsProgress, ShowProgress]]:
    """Opens one display for several reports, or one for each batch of tasks of a single report."""
    sizes = sum(report.size for report in inputs.reports)
    if not inputs.several:
        yield ReportsProgress(TaskProgress("", None), sizes), partial(_task_progress, console=console)
        return
    with TaskProgress(f"{len(inputs.reports)} reports", console) as bar:
        progress = ReportsProgress(bar, sizes)
        yield progress, progress.stage


@contextmanager
def _task_progress(names: str, count: int, console: Console) -> Iterator[Progress]:
    with TaskProgress(f"{names}: {count} question{'s' * (count != 1)}", console) as progress:
        yield progress
