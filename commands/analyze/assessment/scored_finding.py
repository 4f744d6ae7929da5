"""A finding with the scores of the scanner and of the model, and the ones that ``--trust`` selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from commands.analyze.assessment.trust import LEVELS, Trust, higher, is_lowered
from datamodules.records import SUBSCORES, Finding
from datamodules.tasks.base import truncate
from datamodules.tasks.target_answers import truncate_tags

BY_MODEL, BY_RULE = "model", "rule"  #: origin of a value
MAX_REASON = 240  #: characters of the model's reason for a lowered severity
BY_SCANNER = "scanner"  #: origin of a severity that ``--trust`` takes from the report instead of the model's answer


@dataclass(slots=True)
class ScoredFinding(Finding):
    """A finding with the scores of the analysis.

    ``severity`` and ``risk_score`` are the ones that ``--trust`` selects.

    Attributes:
        scanner_severity: severity in the report.
        scanner_risk: risk score in the report, 0..100.
        model_severity: severity of the model's answer; None if there is no valid answer.
        model_risk: risk score of the model's answer, 0..100; None if there is no valid answer.
        model_reason: rationale of the model's answer; "" if there is none.
        answered_by: origin of the scores, "model" or "rule".
    """

    scanner_severity: str = ""
    scanner_risk: float = 0.0
    model_severity: str | None = None
    model_risk: float | None = None
    model_reason: str = ""
    answered_by: str = BY_RULE

    @property
    def severity_source(self) -> str:
        """Origin of ``severity``: "model"; "scanner" if it differs from the model's; "rule" without an answer."""
        return BY_SCANNER if self.model_severity not in (None, self.severity) else self.answered_by


def score_finding(finding: Finding, answer: dict[str, Any] | None, trust: Trust = "higher") -> ScoredFinding:
    """Returns a finding with the values of the model's answer, and with the severity that ``--trust`` selects.

    Without an answer the scanner's severity and risk score are kept. Missing subscores and a missing probability
    are the risk score divided by 100. If the scanner's severity replaces a lower one of the model, the probability is
    at least that of the scanner's risk score.

    Args:
        finding: of the report.
        answer: answer to the risk task; None if there is no valid one.
        trust: whose severity and risk score are used; "higher" uses the higher severity and the higher risk score.
    """
    given = answer or {}
    severity, risk = _trusted(finding, given, trust)
    share = round(risk / 100, 2)
    subscores = {**dict.fromkeys(SUBSCORES, share), **finding.risk_subscores, **given.get("risk_subscores", {})}
    probability = given.get("probability_actionable", finding.probability_actionable)
    if probability is not None and LEVELS[severity] > LEVELS[given.get("severity", severity)]:
        probability = max(probability, share)
    values = {name: getattr(finding, name) for name in Finding.__slots__}
    values |= {
        "severity": severity,
        "risk_score": risk,
        "risk_subscores": {name: subscores[name] for name in SUBSCORES},
        "probability_actionable": share if probability is None else probability,
        "tags": truncate_tags(given.get("tags") or finding.tags or [finding.category]),
    }
    return ScoredFinding(
        **values,
        scanner_severity=finding.severity,
        scanner_risk=finding.risk_score,
        model_severity=given.get("severity"),
        model_risk=given.get("risk_score"),
        model_reason=_sentences(given.get("rationale")),
        answered_by=BY_MODEL if answer is not None else BY_RULE,
    )


def _trusted(finding: Finding, given: dict[str, Any], trust: Trust) -> tuple[str, float]:
    severity, risk = given.get("severity", finding.severity), float(given.get("risk_score", finding.risk_score))
    if trust == "scanner":
        return finding.severity, finding.risk_score
    if trust == "higher":
        return higher(finding.severity, severity), max(finding.risk_score, risk)
    return severity, risk


def _sentences(rationale: Any) -> str:
    parts = rationale if isinstance(rationale, list) else [rationale]
    return " ".join(part.strip() for part in parts if isinstance(part, str))


def rank(finding: Finding) -> tuple[int, float, str]:
    """Returns the sort key of a ranking: the most severe first, then by decreasing risk score, then by id."""
    return -LEVELS[finding.severity], -finding.risk_score, finding.id


def ceiling(finding: ScoredFinding) -> str:
    """Returns the higher one of the scanner's and the model's severity, which does not depend on ``--trust``."""
    return higher(finding.scanner_severity, finding.model_severity or finding.scanner_severity)


def worst_severity(findings: Sequence[ScoredFinding], skipped: Mapping[str, Any] | None = None) -> str:
    """Returns the highest severity that the scanner or the model gives to any finding.

    Args:
        findings: the findings of the analysis.
        skipped: result of :func:`.evidence.skipped_findings`; the scanner's severities of findings that ``--limit``
            leaves out count too.
    """
    severities = [ceiling(finding) for finding in findings]
    if skipped:
        severities.append(skipped["worst"]["severity"])
    return max(severities, key=LEVELS.__getitem__, default="info")


def lowered_findings(findings: Sequence[ScoredFinding]) -> dict[str, Any]:
    """Returns the count of lowered findings and the findings, the scanner's most severe first, for ``model_report``."""
    lowered = [f for f in findings if is_lowered(f.scanner_severity, f.model_severity)]
    lowered.sort(key=lambda f: (-LEVELS[f.scanner_severity], -f.scanner_risk, f.id))
    return {
        "count": len(lowered),
        "findings": [
            {
                "id": f.id, "scanner_severity": f.scanner_severity, "model_severity": f.model_severity,
                **({"reason": truncate(f.model_reason, MAX_REASON)} if f.model_reason else {}),
            }
            for f in lowered
        ],
    }  # fmt: skip
