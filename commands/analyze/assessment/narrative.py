"""Texts of an analysis that are computed by rule: summary, triage and reasons.

The texts of :mod:`datamodules.tasks.windows` are targets of training and depend on the severities of a window only. The
texts here also consider the scanner's severities and the findings that were skipped: none of them states that nothing
is urgent while the scanner or the model rates any finding medium or above.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from commands.analyze.assessment.scored_finding import ceiling, worst_severity
from commands.analyze.assessment.trust import LEVELS, counts_text, is_calming, is_lowered
from datamodules.tasks.base import round_number, truncate
from datamodules.tasks.schemas import MAX_SUMMARY
from datamodules.tasks.windows import ADVICE, URGENT

if TYPE_CHECKING:
    from commands.analyze.assessment.scored_finding import ScoredFinding
    from datamodules.tasks.windows import Link

MAX_NAME = 80  #: characters of a title in a sentence


@dataclass(frozen=True)
class Overview:
    """The findings and correlations that the texts of an analysis are about.

    Attributes:
        findings: all findings, the most severe first.
        links: correlations, the riskiest first.
        skipped: findings that were not analysed, see :func:`.evidence.skipped_findings`; None if all were.
        unread: number of records that could not be read and of scanners that failed; their severity is unknown.
    """

    findings: Sequence[ScoredFinding]
    links: Sequence[Link] = ()
    skipped: Mapping[str, Any] | None = None
    unread: int = 0

    @property
    def worst(self) -> str:
        """Highest severity of the scanner or the model, skipped findings included."""
        return worst_severity(self.findings, self.skipped)

    @property
    def may_calm(self) -> bool:
        """Whether everything was read and rated below medium, so that a text may state that nothing is urgent."""
        return LEVELS[self.worst] < LEVELS["medium"] and not self.unread

    def by_ceiling(self) -> list[ScoredFinding]:
        """Returns the findings by the higher severity of the scanner and the model."""
        return sorted(self.findings, key=lambda f: (-LEVELS[ceiling(f)], -max(f.risk_score, f.scanner_risk), f.id))


def executive(overview: Overview) -> str:
    """Returns the executive summary: counts, disagreement, highest risks, correlations and one recommendation."""
    findings = overview.findings
    if not findings:
        return f"The scan reports no findings. {recommendation(overview)}"
    sentences = [f"{_count(len(findings))}: {counts_text(f.severity for f in findings)}.", *disagreement(findings)]
    titles = Counter(finding.title for finding in findings)
    risks: dict[str, str] = {}
    for finding in overview.by_ceiling():
        times = f"{titles[finding.title]} findings, highest " if titles[finding.title] > 1 else ""
        shown = f"{truncate(finding.title, MAX_NAME)} ({times}risk {round_number(finding.risk_score)})"
        risks.setdefault(finding.title, shown)
    sentences.append(f"Top risks: {'; '.join(list(risks.values())[:3])}.")
    if overview.links:
        linked = "; ".join(f"{link.title} ({len(link.finding_ids)} findings)" for link in overview.links[:2])
        sentences.append(f"Correlated: {linked}.")
    sentences.append(recommendation(overview))
    return truncate(" ".join(sentences), MAX_SUMMARY)


def recommendation(overview: Overview) -> str:
    """Returns one sentence of advice for the worst finding of the scanner or the model."""
    worst = max(map(ceiling, overview.findings), key=LEVELS.__getitem__, default="info")
    if overview.skipped and LEVELS["medium"] <= LEVELS[overview.worst] > LEVELS[worst]:
        skipped = overview.skipped["worst"]
        return (
            f"Analyse the skipped findings: the scanner rates one of them {skipped['severity']}, "
            f"{truncate(skipped['title'], MAX_NAME)}."
        )
    if overview.unread and LEVELS[worst] < LEVELS["medium"]:
        return f"The scan is incomplete: check the {overview.unread} failures under 'Skipped' before relying on it."
    if not overview.findings:
        return "No action is needed."
    return ADVICE[worst].replace("{top}", truncate(overview.by_ceiling()[0].title, MAX_NAME))


def disagreement(findings: Sequence[ScoredFinding]) -> list[str]:
    """Returns one sentence about the findings that the model lowers; empty if there are none."""
    lowered = [f for f in findings if is_lowered(f.scanner_severity, f.model_severity)]
    if not lowered:
        return []
    shown = counts_text(f.scanner_severity for f in lowered)
    return [
        f"The model lowers {len(lowered)} of them against the scanner, which rates them {shown}: "
        "check each before relying on the model."
    ]


def triage(overview: Overview) -> str:
    """Returns the triage text: how many findings need attention, by when, and the finding to start with."""
    findings = overview.findings
    counts = Counter(ceiling(finding) for finding in findings)
    urgent, planned = sum(counts[name] for name in URGENT), counts["medium"]
    if not urgent and not planned and not overview.may_calm:
        return recommendation(overview)
    if not urgent and not planned:
        text = f"{_count(len(findings))} below medium by the scanner and the model."
    else:
        parts = [f"{urgent} of {_count(len(findings))} {_need(urgent)} attention now"] if urgent else []
        whole = "" if urgent else f" of {_count(len(findings))}"
        parts += [f"{planned}{whole} {_need(planned)} a fix in the next maintenance window"] if planned else []
        text = "; ".join(parts) + "."
    if findings and LEVELS[ceiling(overview.by_ceiling()[0])] > 0:
        top = overview.by_ceiling()[0]
        place = "" if top.title == top.id else f"{truncate(top.id, MAX_NAME)}: "
        text += f" Start with {place}{truncate(top.title, MAX_NAME)} (risk {round_number(top.risk_score)})."
    return text


def reason(finding: ScoredFinding, links: Sequence[Link], shown: str) -> str:
    """Returns the reason for a finding among the top findings.

    Args:
        finding: the finding.
        links: correlations of the window.
        shown: id of the finding in the window.
    """
    parts = [_agreement(finding)]
    if finding.baseline_status == "new":
        parts.append("new since the baseline")
    if link := next((link for link in links if shown in link.finding_ids), None):
        parts.append(f"part of: {link.title}")
    return "; ".join(parts)


def _agreement(finding: ScoredFinding) -> str:
    scanner, model = finding.scanner_severity, finding.model_severity
    if model is None:
        return f"{scanner} by the scanner"
    if scanner == model:
        return f"{scanner} by the scanner and the model"
    return f"the model {'lowers' if LEVELS[model] < LEVELS[scanner] else 'raises'} it from {scanner} to {model}"


def acceptable(text: str, overview: Overview) -> bool:
    """Returns whether a text of the model may be used: it must not play danger down while there is any."""
    return overview.may_calm or not is_calming(text)


def lead(overview: Overview, text: str) -> str:
    """Returns a sentence about the worst finding, for a model's summary or triage that does not mention its severity.

    Args:
        overview: the findings.
        text: the model's text.
    """
    if overview.may_calm or not overview.findings or re.search(rf"\b{overview.worst}\b", text.lower()):
        return ""
    top = overview.by_ceiling()[0]
    return f"Highest severity: {ceiling(top)}, {truncate(top.title, MAX_NAME)}. "


def _count(number: int) -> str:
    return f"{number} finding" if number == 1 else f"{number} findings"


def _need(number: int) -> str:
    return "needs" if number == 1 else "need"
