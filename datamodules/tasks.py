"""From a document to (prompt, completion) pairs: risk, correlation, summary, triage, remediation, agent templates.

A task is a small class: its texts, its schema, ``content`` (what the prompt shows of findings without answers, used
for inference too) and ``pairs``. Nothing here is random: samples are chosen by digests of ids, so that the same
document gives the same pairs in every process.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from datamodules import schemas
from datamodules.agent_templates import AgentTask, load_templates
from datamodules.answers import correlation_answer, risk_answer
from datamodules.errors import UserError
from datamodules.prompts import SYSTEM, Pair, Task, clip, compact, number
from datamodules.records import SEVERITIES
from datamodules.remediation import remediate
from datamodules.windows import (
    Window,
    executive_summary,
    finding_line,
    shown_ids,
    top_findings,
    triage_summary,
    windows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from datamodules.prompts import Schema
    from datamodules.records import Correlation, Document, Finding

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

MAX_CONTENT = 8192  #: characters of a finding in a prompt; beyond it long values are cut, see finding_content


def finding_content(finding: Finding, **head: str) -> str:
    """Writes what a scanner says of a finding: no id, no severity, no score, no tag.

    A finding of more than :data:`MAX_CONTENT` characters is cut value by value: an attacker who pads a command line
    must not push the finding out of the model's sight.

    Args:
        finding: with or without answers.
        **head: keys to put first.
    """
    record = {"title": finding.title, "description": finding.description, "category": finding.category}
    content = compact({**head, **record, "metadata": finding.metadata})
    if len(content) <= MAX_CONTENT:
        return content
    values = {clip(key, 64): _cut(value) for key, value in list(finding.metadata.items())[:16]}
    return compact({**head, **{key: clip(text, 512) for key, text in record.items()}, "metadata": values})


def _cut(value: Any) -> Any:
    text = value if isinstance(value, str) else compact(value)
    return value if len(text) <= 256 else clip(text, 256)


class RiskTask:
    """How bad is one finding: severity, risk score, subscores, probability that it needs action, tags."""

    name = "risk"
    system = SYSTEM
    instruction = (
        "Assess the risk of this finding. Answer with the keys severity (info, low, medium, high or critical), "
        "risk_score (0 to 100), risk_subscores (impact, exposure, anomaly, confidence, each 0 to 1), "
        "probability_actionable (0 to 1) and tags (list of strings); at most two decimals.\nFinding:\n"
    )
    answer_schema = schemas.RISK

    def content(self, finding: Finding) -> str:
        """Writes the finding; its severity, scores and tags are not read."""
        return finding_content(finding)

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per finding."""
        for finding in document.findings:
            answer = compact(risk_answer(finding))
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
            answer = compact(remediate(finding))
            yield Pair(self.name, self.content(finding), answer, finding.severity, finding.category, 1)


class CorrelationTask:
    """Which of these findings belong together, and why.

    The prompt shows at most ``members`` findings of a correlation (the first, and others spread over the rest; the
    start is drawn by a digest, so that correlations that share hundreds of findings show different ones) among
    ``distractors`` findings of the document that no correlation ties to them, in the document's order.

    Attributes:
        skipped: correlations without an example, by reason.
    """

    name = "correlation"
    system = SYSTEM
    instruction = (
        "Find the findings below that belong together. Answer with the keys title, related_finding_ids (ids from the "
        "list only), severity (info, low, medium, high or critical), risk_score (0 to 100), rationale (why they belong "
        "together) and tags (list of strings).\nFindings:\n"
    )

    def __init__(self, members: int = 8, distractors: int = 4) -> None:
        self.members = members
        self.distractors = distractors
        self.answer_schema = schemas.correlation(members)
        self.skipped: Counter[str] = Counter()

    def content(self, findings: Sequence[Finding]) -> str:
        """Writes scored findings, one object each."""
        return self._content(findings, shown_ids(findings), {})

    def _content(self, findings: Sequence[Finding], ids: Sequence[str], written: dict[tuple[str, int], str]) -> str:
        lines = []
        for finding, shown in zip(findings, ids, strict=True):
            key = (shown, id(finding))
            if key not in written:
                written[key] = compact(_described(finding, shown))
            lines.append(written[key])
        return f'{{"findings":[{",".join(lines)}]}}'

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per correlation with two findings in the document; counts the others as skipped."""
        position_of: dict[str, int] = {}
        for position, finding in enumerate(document.findings):
            position_of.setdefault(finding.id, position)
        members_of = [
            [position_of[key] for key in dict.fromkeys(correlation.finding_ids) if key in position_of]
            for correlation in document.correlations
        ]
        tied: dict[int, set[int]] = {}
        for index, members in enumerate(members_of):
            for member in members:
                tied.setdefault(member, set()).add(index)
        written: dict[tuple[str, int], str] = {}  # a finding stands in hundreds of correlations: its JSON is made once
        for correlation, members in zip(document.correlations, members_of, strict=True):
            if len(members) > 1:
                yield self._pair(document, correlation, members, tied, written)
            else:
                self.skipped["no finding present" if not members else "only one finding present"] += 1

    def _pair(
        self,
        document: Document,
        correlation: Correlation,
        members: list[int],
        tied: dict[int, set[int]],
        written: dict[tuple[str, int], str],
    ) -> Pair:
        seed = int.from_bytes(blake2b(correlation.id.encode("utf-8", "replace"), digest_size=8).digest(), "big")
        chosen = spread(members, self.members, seed)
        others = self._distractors(len(document.findings), chosen, tied, seed)
        positions = sorted([*chosen, *others])
        findings = [document.findings[position] for position in positions]
        shown, kept = shown_ids(findings), set(chosen)
        ids = [name for name, position in zip(shown, positions, strict=True) if position in kept]
        severity = correlation.severity or max((finding.severity for finding in findings), key=SEVERITIES.index)
        answer = compact(correlation_answer(correlation, ids))
        return Pair(self.name, self._content(findings, shown, written), answer, severity, "correlation", len(findings))

    def _distractors(self, count: int, chosen: Sequence[int], tied: dict[int, set[int]], seed: int) -> list[int]:
        """Draws findings that share no correlation with the chosen ones; fewer where few tries find them."""
        found: dict[int, None] = {}
        for step in range(4 * self.distractors):
            if len(found) == self.distractors:
                break
            # a golden-ratio walk visits all parts of the document evenly
            position = ((seed + step * 0x9E3779B97F4A7C15) % 2**64 * count) >> 64
            if position in chosen:
                continue
            ties = tied.get(position)
            if ties is None or all(map(ties.isdisjoint, map(tied.__getitem__, chosen))):
                found[position] = None
        return list(found)


def _described(finding: Finding, shown: str) -> dict[str, Any]:
    return {
        "id": shown,
        "title": clip(finding.title, schemas.MAX_TITLE),
        "description": clip(finding.description, 200),
        "category": clip(finding.category, schemas.MAX_ID),
        "severity": finding.severity,
        "risk_score": number(finding.risk_score),
    }


def spread(items: Sequence[int], most: int, seed: int) -> list[int]:
    """Picks the first item and others at even distances from a seeded start.

    Args:
        items: at least one, without repeats.
        most: how many to pick at most.
        seed: draws the start.
    """
    if len(items) <= most:
        return list(items)
    rest = items[1:]
    start = seed % len(rest)
    return [items[0], *(rest[(start + pick * len(rest) // (most - 1)) % len(rest)] for pick in range(most - 1))]


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
        return compact({"findings": lines, "correlations": [link.line() for link in window.links]})

    def answer(self, window: Window, document: Document) -> dict[str, Any]:
        """Builds the answer for a window of a document."""
        raise NotImplementedError

    def pairs(self, document: Document) -> Iterator[Pair]:
        """Yields one pair per window."""
        for window in windows(document, self.window):
            answer = compact(self.answer(window, document))
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

    def answer(self, window: Window, document: Document) -> dict[str, Any]:
        """Takes the document's own summary where the window is the whole document."""
        return {"executive_summary": own_summary(window, document, "executive_summary") or executive_summary(window)}


class TriageTask(_WindowTask):
    """Which findings to look at first."""

    name = "triage"
    instruction = (
        "Triage these findings. Answer with the keys triage_summary (a string) and top_findings (the 5 of highest "
        "risk, ties by id: list of objects with id, title, severity, risk_score, probability_actionable and reason); "
        "use only what the input says.\nScan:\n"
    )
    answer_schema = schemas.TRIAGE

    def answer(self, window: Window, document: Document) -> dict[str, Any]:
        """Takes the document's own summary where the window is the whole document; the order is always by risk."""
        text = own_summary(window, document, "triage_summary") or triage_summary(window)
        return {"triage_summary": text, "top_findings": top_findings(window)}


def own_summary(window: Window, document: Document, key: str) -> str:
    """Returns a ``ground_truth_v1`` summary that speaks of exactly this window, else ""."""
    text = document.summaries.get(key) if window.whole else None
    return clip(text.strip(), schemas.MAX_SUMMARY) if isinstance(text, str) else ""


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
