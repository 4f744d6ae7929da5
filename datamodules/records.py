"""Data classes of a scanner finding, a correlation and a document."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SEVERITIES = ("info", "low", "medium", "high", "critical")
CATEGORIES = (
    "processes", "network", "kernel_params", "modules", "world_writable",
    "suid", "ioc", "mac", "dns", "endpoint_behavior",
)  # fmt: skip
SUBSCORES = ("impact", "exposure", "anomaly", "confidence")
BASELINE_STATUSES = ("new", "existing", "unknown")


@dataclass(slots=True)
class Finding:
    """One scanner finding.

    Attributes:
        id: unique within its document.
        title: short name of the observation.
        description: one or two sentences.
        category: scanner category; any string, lower case ("unknown" if the file has none).
        severity: one of :data:`SEVERITIES`.
        risk_score: 0..100.
        base_severity_score: 0..100, the scanner's own score before analysis.
        metadata: free fields of the scanner, unchanged.
        tags: labels, in the order of the file.
        risk_subscores: :data:`SUBSCORES` in 0..1; empty if the file has none.
        probability_actionable: 0..1; None if the file has none.
        baseline_status: one of :data:`BASELINE_STATUSES`.
        rationale: sentences; empty if the file has none.
        correlation_refs: ids of correlations (or findings) that the finding refers to.
        enrichment: the archive's LangChain fields (``mitigation_steps``, ``attack_vectors``, ``compliance_impact``,
            ``business_impact``, ``technical_details``); empty if there are none or if the enrichment failed.
    """

    id: str
    title: str
    description: str
    category: str
    severity: str
    risk_score: float
    base_severity_score: float
    metadata: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    risk_subscores: dict[str, float] = field(default_factory=dict)
    probability_actionable: float | None = None
    baseline_status: str = "unknown"
    rationale: list[str] = field(default_factory=list)
    correlation_refs: list[str] = field(default_factory=list)
    enrichment: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Correlation:
    """A group of related findings.

    Attributes:
        id: unique within its document.
        title: short name.
        description: the reason for the relation, as text for people.
        type: ``correlation_type`` of the file, "" if there is none.
        strength: 0..1; None if the file has none.
        finding_ids: ids of the related findings; some may be absent from the document.
        severity: one of :data:`SEVERITIES`, or None.
        risk_score: 0..100; None if the file has none.
        risk_score_delta: increase of the findings' risk score by the correlation; None if the file has none.
        tags: labels.
        insight: the archive's LangChain insight, "" if there is none.
        metadata: free fields.
    """

    id: str
    title: str
    description: str
    type: str
    strength: float | None
    finding_ids: list[str]
    severity: str | None = None
    risk_score: float | None = None
    risk_score_delta: float | None = None
    tags: list[str] = field(default_factory=list)
    insight: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Document:
    """A bounded part of a source: one shard, or consecutive records of a long file.

    Attributes:
        source: the source as the user named it.
        member: path inside the source ("" for a single file).
        position: index of the first record of this document within the member.
        findings: in the order of the file.
        correlations: in the order of the file.
        summaries: ``ground_truth_v1`` summaries (``executive_summary``, ``triage_summary``, ...); empty otherwise.
        actions: ``ground_truth_v1`` actions; empty otherwise.
    """

    source: str
    member: str
    position: int
    findings: list[Finding] = field(default_factory=list)
    correlations: list[Correlation] = field(default_factory=list)
    summaries: dict[str, Any] = field(default_factory=dict)
    actions: list[dict[str, Any]] = field(default_factory=list)
