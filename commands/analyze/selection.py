"""Selects the findings and correlations of a report for each part of the analysis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from datamodules.records import SEVERITIES, Finding
from datamodules.tasks.windows import Window, links_among

if TYPE_CHECKING:
    from datamodules.records import Correlation

AnyFinding = TypeVar("AnyFinding", bound=Finding)


def unique_ids(findings: Sequence[Finding]) -> list[Finding]:
    """Returns copies with distinct ids: if two findings had one id, correlations would refer to the wrong one."""
    existing, unique = {finding.id for finding in findings}, []
    used: set[str] = set()
    for position, finding in enumerate(findings, 1):
        name, copy = finding.id, 2
        if not name or name in used:
            name = name or f"finding_{position}"
            stem = name
            while name in existing or name in used:
                name, copy = f"{stem}#{copy}", copy + 1
        used.add(name)
        unique.append(replace(finding, id=name))
    return unique


def riskiest_window(findings: Sequence[Finding], correlations: Sequence[Correlation], size: int) -> Window:
    """Returns the most severe findings in the report's order, ties by risk: the input of the tasks summary and triage.

    Args:
        findings: of the report.
        correlations: those between findings of the window are kept.
        size: largest number of findings.
    """
    severity = [-SEVERITIES.index(finding.severity) for finding in findings]
    ranked = sorted(range(len(findings)), key=lambda i: (severity[i], -findings[i].risk_score, i))[:size]
    inside = [findings[position] for position in sorted(ranked)]
    return Window(inside, links_among(inside, correlations), whole=len(inside) == len(findings))


def one_of_each_kind(findings: Sequence[AnyFinding], count: int) -> list[AnyFinding]:
    """Returns the riskiest findings above severity info, of as many kinds as possible.

    The second finding of a kind (category and title) comes after the first finding of every other kind.

    Args:
        findings: of the report.
        count: largest number of findings.
    """
    ranked = sorted(
        (finding for finding in findings if finding.severity != "info"),
        key=lambda finding: (-SEVERITIES.index(finding.severity), -finding.risk_score, finding.id),
    )
    earlier: Counter[tuple[str, str]] = Counter()
    order = []
    for rank, finding in enumerate(ranked):
        kind = finding.category, finding.title
        order.append((earlier[kind], rank))
        earlier[kind] += 1
    return [ranked[rank] for _, rank in sorted(order)[:count]]


def present_correlations(correlations: Sequence[Correlation], findings: Sequence[Finding]) -> list[Correlation]:
    """Returns a report's own correlations with distinct ids, without references to findings that don't exist.

    A correlation without any existing finding is left out.
    """
    known, taken = {finding.id for finding in findings}, set[str]()
    kept: list[Correlation] = []
    for position, correlation in enumerate(correlations, 1):
        ids = [name for name in dict.fromkeys(correlation.finding_ids) if name in known]
        name = correlation.id or f"correlation_{position}"
        while name in taken:
            name += "_"
        if ids:
            taken.add(name)
            kept.append(replace(correlation, id=name, finding_ids=ids))
    return kept
