"""Builds the parts of a ``ground_truth_v1`` document from scored findings and correlations."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import orjson

from commands.analyze.assessment.scored_finding import ScoredFinding, rank
from commands.analyze.assessment.trust import is_lowered
from datamodules.records import SEVERITIES, Finding
from datamodules.tasks.base import compact_json

if TYPE_CHECKING:
    from datamodules.records import Correlation


def enriched_findings(findings: Sequence[ScoredFinding], correlations: Sequence[Correlation]) -> list[dict[str, Any]]:
    """Returns the part ``enriched_findings``, the most severe first, with the correlations of each finding."""
    refs: dict[str, list[str]] = defaultdict(list)
    for correlation in correlations:
        for name in correlation.finding_ids:
            refs[name].append(correlation.id)
    return [_finding_record(finding, refs[finding.id]) for finding in sorted(findings, key=rank)]


def _finding_record(finding: ScoredFinding, refs: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": finding.id,
        "title": finding.title,
        "severity": finding.severity,
        "risk_score": whole_number(finding.risk_score),
        "base_severity_score": whole_number(finding.base_severity_score),
        "description": finding.description,
        "metadata": orjson.loads(compact_json(finding.metadata)),
        "category": finding.category,
        "tags": finding.tags,
        "risk_subscores": finding.risk_subscores,
        "correlation_refs": refs or finding.correlation_refs,
        "baseline_status": finding.baseline_status,
        "severity_source": finding.severity_source,
        "scanner_severity": finding.scanner_severity,
        "scanner_risk_score": whole_number(finding.scanner_risk),
        "model_severity": finding.model_severity,
        "model_risk_score": None if finding.model_risk is None else whole_number(finding.model_risk),
        "lowered": is_lowered(finding.scanner_severity, finding.model_severity),
        "probability_actionable": finding.probability_actionable,
        "graph_degree": len(refs),
        "risk_total": whole_number(finding.risk_score),
    }
    return record | ({"rationale": " ".join(finding.rationale)} if finding.rationale else {})


def correlation_record(correlation: Correlation) -> dict[str, Any]:
    """Returns one entry of the part ``correlations``."""
    record: dict[str, Any] = {
        "id": correlation.id,
        "title": correlation.title,
        "rationale": correlation.insight or correlation.description,
        "related_finding_ids": correlation.finding_ids,
        "tags": correlation.tags,
        "severity": correlation.severity,
        "correlation_type": correlation.type,
    }
    if correlation.risk_score is not None:
        record["risk_score"] = whole_number(correlation.risk_score)
    if correlation.risk_score_delta is not None:
        record["risk_score_delta"] = round(correlation.risk_score_delta)
    return record


def reductions(findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns counts of the categories that the schema has, and the highest risk of every category."""
    parts = {"module_summary": "modules", "suid_summary": "suid", "network_summary": "network"}
    summaries = {name: [f for f in findings if f.category == category] for name, category in parts.items()}
    reductions: dict[str, Any] = {name: severity_metrics(inside) for name, inside in summaries.items() if inside}
    risks: dict[str, int] = {}
    for finding in findings:
        risks[finding.category] = max(risks.get(finding.category, 0), whole_number(finding.risk_score))
    highest = dict(sorted(risks.items(), key=lambda item: (-item[1], item[0])))
    return reductions | {"top_risks": {"highest_by_category": highest}}


def severity_metrics(findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns the number of findings, in total and by severity."""
    counts = Counter(finding.severity for finding in findings)
    return {"findings": len(findings), "by_severity": {name: counts[name] for name in SEVERITIES if counts[name]}}


def whole_number(value: float) -> int:
    """Returns a score as the schema requires it: an integer of 0..100."""
    return min(max(round(value), 0), 100)
