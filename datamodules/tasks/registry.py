"""From a document to (prompt, completion) pairs: risk, correlation, summary, triage, remediation, agent templates.

A task is a small class: its texts, its schema, ``content`` (what the prompt shows of findings without answers, used
for inference too) and ``pairs``. Nothing here is random: samples are chosen by digests of ids, so that the same
document gives the same pairs in every process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datamodules.errors import UserError
from datamodules.tasks import schemas
from datamodules.tasks.agent_templates import AgentTask, load_templates
from datamodules.tasks.base import SYSTEM, Pair, Task, compact_json, finding_content
from datamodules.tasks.correlation import CorrelationTask
from datamodules.tasks.remediation import remediate
from datamodules.tasks.target_answers import risk_answer
from datamodules.tasks.windows import Window, executive_summary, finding_line, top_findings, triage_summary, windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from datamodules.records import Document, Finding
    from datamodules.tasks.base import Schema

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

TASKS = ("risk", "correlation", "summary", "triage", "remediation")
AGENT_PREFIX = "agent_"


class RiskTask:
    """How bad is one finding: severity, risk score, subscores, probability that it needs action, tags."""

    name = "risk"
    system = SYSTEM
    instruction = (
        "Assess the risk of this finding. Answer with the keys tags (list of strings), "
        "severity (info, low, medium, high or critical), risk_score (0 to 100), "
        "risk_subscores (impact, exposure, anomaly, confidence, each 0 to 1) "
        "and probability_actionable (0 to 1).\nFinding:\n"
    )
    answer_schema = schemas.RISK

    def content(self, finding: Finding) -> str:
        """Writes the finding; its severity, scores and tags are not read."""
        return finding_content(finding)

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per finding."""
        for finding in document.findings:
            answer = compact_json(risk_answer(finding))
            yield Pair(self.name, self.content(finding), answer, finding.severity, finding.category, 1)


class RemediationTask:
    """What to do about one finding whose severity is known: concrete actions, each with a check, and the source."""

    name = "remediation"
    system = SYSTEM
    instruction = (
        "Say how to remediate this finding. Answer with the key actions (list of objects with title, description, "
        "command, check and priority: none, low, medium, high or immediate) and source (benchmark section, man page or "
        "kernel documentation). Where no action is needed, say so and how to verify it.\nFinding:\n"
    )
    answer_schema = schemas.REMEDIATION

    def content(self, finding: Finding) -> str:
        """Writes the finding with its severity."""
        return finding_content(finding, severity=finding.severity)

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per finding."""
        for finding in document.findings:
            answer = compact_json(remediate(finding))
            yield Pair(self.name, self.content(finding), answer, finding.severity, finding.category, 1)


class _WindowTask:
    """Base of the tasks that look at a window of scored findings."""

    name: str
    system = SYSTEM
    instruction: str
    answer_schema: Schema

    def __init__(self, window: int = 24) -> None:
        self.window = window

    def content(self, window: Window) -> str:
        """Writes a window: its findings, one object each, and the correlations among them."""
        lines = [finding_line(finding, shown) for finding, shown in zip(window.findings, window.ids, strict=True)]
        return compact_json({"findings": lines, "correlations": [link.line() for link in window.links]})

    def answer(self, window: Window) -> dict[str, Any]:
        """Builds the answer for a window of a document."""
        raise NotImplementedError

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per window."""
        for window in windows(document, self.window):
            answer = compact_json(self.answer(window))
            yield Pair(self.name, self.content(window), answer, window.severity, "mixed", len(window.findings))


class SummaryTask(_WindowTask):
    """What a manager should know about these findings."""

    name = "summary"
    instruction = (
        "Summarise these findings for an executive: counts by severity, the top risks by name, what is correlated, and "
        "one recommendation. Answer with the key executive_summary (a string of a few sentences); use only what the "
        "input says.\nScan:\n"
    )
    answer_schema = schemas.SUMMARY

    def answer(self, window: Window) -> dict[str, Any]:
        """See :func:`~datamodules.tasks.windows.executive_summary`."""
        return {"executive_summary": executive_summary(window)}


class TriageTask(_WindowTask):
    """Which findings to look at first."""

    name = "triage"
    instruction = (
        "Triage these findings. Answer with the keys triage_summary (a string) and top_findings (the 5 of highest "
        "risk, ties by id: list of objects with id, title, severity, risk_score, probability_actionable and reason); "
        "use only what the input says.\nScan:\n"
    )
    answer_schema = schemas.TRIAGE

    def answer(self, window: Window) -> dict[str, Any]:
        """The order is always by risk."""
        return {"triage_summary": triage_summary(window), "top_findings": top_findings(window)}


def build_tasks(
    names: Sequence[str],
    *,
    agent_templates: str | None = None,
    window: int = 24,
    members: int = 8,
    distractors: int = 4,
) -> dict[str, Task]:
    """Builds tasks by name.

    Args:
        names: of :data:`TASKS`, or ``agent_NAME`` for a template NAME_v1.json.
        agent_templates: folder of the agent's prompt templates.
        window: most findings in a prompt of summary, triage and the agent's templates.
        members: most findings of a correlation in a prompt.
        distractors: most findings beside them that don't belong to it.

    Returns:
        The tasks, in the order of ``names``.

    Raises:
        UserError: an unknown name, a size out of range, or a template that is absent or asks for what no target is
            built for.
    """
    for option, value, least in (("window", window, 1), ("members", members, 2), ("distractors", distractors, 0)):
        if value < least:
            raise UserError(f"{option}={value}: must be at least {least}")
    builders: dict[str, Callable[[], Task]] = {
        "risk": RiskTask,
        "correlation": lambda: CorrelationTask(members, distractors),
        "summary": lambda: SummaryTask(window),
        "triage": lambda: TriageTask(window),
        "remediation": RemediationTask,
    }
    templates = load_templates(agent_templates) if agent_templates else {}
    for name, template in templates.items():
        builders[AGENT_PREFIX + name] = lambda template=template, name=name: AgentTask(  # type: ignore[misc]
            AGENT_PREFIX + name, template, window
        )
    tasks: dict[str, Task] = {}
    for name in names:
        if name not in builders:
            way_out = "" if templates else f"; for {AGENT_PREFIX}... set agent_templates to the folder of its templates"
            raise UserError(f"tasks: {name!r} is not one of {', '.join(builders)}{way_out}")
        tasks[name] = builders[name]()
    return tasks
