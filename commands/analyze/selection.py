"""Which findings and correlations of a report go where: distinct ids, the riskiest window, one of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from datamodules.records import SEVERITIES
from datamodules.tasks.windows import Window, links_among

if TYPE_CHECKING:
    from datamodules.records import Correlation, Finding


def unique_ids(findings: Sequence[Finding]) -> list[Finding]:
    """Copies whose ids differ: a scanner that gives one twice would tie the wrong findings together."""
    taken, unique = {finding.id for finding in findings}, []
    seen: set[str] = set()
    for position, finding in enumerate(findings, 1):
        name, copy = finding.id, 2
        if not name or name in seen:
            name = name or f"finding_{position}"
            stem = name
            while name in taken or name in seen:
                name, copy = f"{stem}#{copy}", copy + 1
        seen.add(name)
        unique.append(replace(finding, id=name))
    return unique


def risky_window(findings: Sequence[Finding], correlations: Sequence[Correlation], size: int) -> Window:
    """The riskiest findings, in the report's order, as summary and triage see them."""
    ranked = sorted(range(len(findings)), key=lambda i: (-findings[i].risk_score, i))[:size]
    inside = [findings[position] for position in sorted(ranked)]
    return Window(inside, links_among(inside, correlations), whole=len(inside) == len(findings))


def one_of_each_kind(findings: Sequence[Finding], most: int) -> list[Finding]:
    """The riskiest findings above info; the second of a kind comes after the first of every other."""
    ranked = sorted(
        (finding for finding in findings if finding.severity != "info"),
        key=lambda finding: (-SEVERITIES.index(finding.severity), -finding.risk_score, finding.id),
    )
    before: Counter[tuple[str, str]] = Counter()
    rounds = []
    for place, finding in enumerate(ranked):
        kind = finding.category, finding.title
        rounds.append((before[kind], place))
        before[kind] += 1
    return [ranked[place] for _, place in sorted(rounds)[:most]]


def present_correlations(correlations: Sequence[Correlation], findings: Sequence[Finding]) -> list[Correlation]:
    """A report's own correlations: without findings that are not there, those that keep one, with distinct ids."""
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
