"""Lines that ``analyze`` prints about severities, lowered findings, known limits and skipped parts."""

from __future__ import annotations

from typing import Any

from commands.analyze.assessment.evidence import evidence, skipped_lines
from commands.analyze.assessment.trust import SHOWN_LOWERED, counts_text
from commands.analyze.markdown import by_rank, lowered_rows, lowered_title, rated, visible

MAX_TEXT = 100  #: characters of a text of the report in a line


def trust_lines(document: dict[str, Any]) -> list[str]:
    """Returns the lines; lowered findings come first, control characters in texts are escaped.

    Args:
        document: the analysis, with ``raw_reference``.
    """
    about, findings = document["enrichment_results"]["model_report"], by_rank(document)
    lines = []
    if title := lowered_title(document):
        rows = lowered_rows(document)
        lines.append(f"  LOWERED      {title}:")
        lines += [f"               {_finding(finding)}" for finding, _ in rows[:SHOWN_LOWERED]]
        if len(rows) > SHOWN_LOWERED:
            lines.append(f"               and {len(rows) - SHOWN_LOWERED} more, see the output")
    if findings:
        lines.append(f"  worst        {_finding(findings[0])}")
        lines.append(f"  severities   {_counts(findings, 'severity')} by --trust {about['trust']}")
        lines.append(f"  scanner      {_counts(findings, 'scanner_severity')}")
        lines.append(f"  model        {_counts(findings, 'model_severity') or 'no valid answer'}")
    lines += [f"  limits       {visible(line, 600)}" for line in about["known_limits"].get("banner", [])]
    return lines + [f"  skipped      {visible(line, 600)}" for line in skipped_lines(document)]


def _finding(finding: dict[str, Any]) -> str:
    shown = ", ".join(f"{label} {value}" for label, value in evidence(finding)) or "no evidence in the report"
    title, name = visible(finding["title"], MAX_TEXT), visible(finding["id"], MAX_TEXT)
    return f"{finding['severity']} ({rated(finding)})  {title} [{name}]: {visible(shown, MAX_TEXT)}"


def _counts(findings: list[dict[str, Any]], key: str) -> str:
    return counts_text(finding[key] for finding in findings if finding[key])
