"""Converts an analysis to the document that sys-scan-graph's agent (``sys-scan-agent`` 7.0.0) reads and writes.

Its model ``EnrichedOutput`` differs from ``ground_truth_v1``: a rationale is a list of sentences, an action is one line
with a whole number as its priority, ``raw_reference`` is a digest, and the triage summary is an object. The agent's
HTML report, its diff and ``sys-scan-graph analyze --prev`` sort by one severity and one risk score per finding. These
are the ones that the analysis ranks by; in an analysis that states the model's severity only, the higher of the
scanner's and the model's, so that a model which lowers a finding can't hide it. The rationale states both severities
when they differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datamodules.records import SEVERITIES, Finding
from datamodules.tasks.agent_reductions import agent_findings, redacted_reductions, reductions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VERSION = "1.0"  #: of EnrichedOutput
#: priority of an action -> the agent's number; the agent sorts actions by decreasing number
PRIORITY_NUMBERS = {"immediate": 4, "high": 3, "medium": 2, "low": 1, "none": 0}


def to_agent(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an analysis as an ``EnrichedOutput`` document.

    Args:
        document: ``ground_truth_v1`` document that ``analyze`` builds, with ``raw_reference``.
    """
    findings = [_finding(record) for record in document["enriched_findings"]]
    correlations = [_correlation(record) for record in document["correlations"]]
    return {
        "version": VERSION,
        "correlations": correlations,
        "reductions": _reductions(findings),
        "summaries": _summaries(document, findings, correlations),
        "actions": _actions(document["actions"], correlations),
        "raw_reference": (document.get("raw_reference") or {}).get("sha256"),
        "enriched_findings": findings,
        "correlation_graph": None,
        "followups": None,
        "enrichment_results": document.get("enrichment_results"),
        "multi_host_correlation": None,
        "integrity": None,
    }


def _finding(record: Mapping[str, Any]) -> dict[str, Any]:
    model, severity, risk = record.get("model_severity"), record["severity"], record["risk_score"]
    scanner, base = record.get("scanner_severity") or severity, record["base_severity_score"]
    if "model_severity" not in record:
        model, severity = severity, max(severity, scanner, key=SEVERITIES.index)
        risk = max(risk, base) if severity != model else risk
    from_model = record.get("severity_source") == "model" and severity == model
    finding = {
        "id": record["id"],
        "title": record["title"],
        "severity": severity,
        "risk_score": risk,
        "base_severity_score": base,
        "description": record["description"],
        "metadata": record["metadata"],
        "operational_error": False,
        "category": record["category"],
        "tags": list(record["tags"]),
        "risk_subscores": record["risk_subscores"],
        "correlation_refs": list(record["correlation_refs"]),
        "baseline_status": record["baseline_status"],
        "severity_source": "model" if from_model else "raw",
        "probability_actionable": record["probability_actionable"],
        "graph_degree": record.get("graph_degree"),
        "risk_total": risk,
    }
    return finding | {"rationale": _rationale(record, severity, scanner, model)}


def _rationale(record: Mapping[str, Any], severity: str, scanner: str, model: str | None) -> list[str]:
    text = record.get("rationale") or []
    sentences = [text] if isinstance(text, str) else list(text)
    if model is not None and model != scanner:
        sentences.insert(0, f"The scanner rates this {scanner}, the model {model}; {severity} is used.")
    return sentences


def _correlation(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": record["id"],
        "title": record["title"],
        "rationale": record["rationale"],
        "related_finding_ids": list(record["related_finding_ids"]),
        "risk_score_delta": record.get("risk_score_delta", 0),
        "tags": list(record["tags"]),
        "severity": record["severity"],
        "predicate_hits": None,
    }


def _reductions(findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the agent's reductions of the findings; its tags of the top findings are replaced by the analysis'."""
    inputs = [
        Finding(
            id=finding["id"], title=finding["title"], description="", category="", severity=finding["severity"],
            risk_score=finding["risk_score"], base_severity_score=finding["risk_score"], metadata=finding["metadata"],
        )
        for finding in findings
    ]  # fmt: skip
    reduced = redacted_reductions(reductions(agent_findings(inputs)))
    tags = {finding["id"]: finding["tags"] for finding in findings}
    lines = [row | {"tags": tags.get(row["id"], row["tags"])} for row in reduced["top_findings"]]
    return reduced | {"top_findings": lines, "top_risks": lines}


def _summaries(
    document: Mapping[str, Any], findings: Sequence[Mapping[str, Any]], correlations: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    given = document["summaries"]
    actions = document["actions"]
    return {
        "executive_summary": given["executive_summary"],
        "analyst": {"finding_count": len(findings), "correlation_count": len(correlations)},
        "consistency_findings": [],
        "triage_summary": {
            "text": given["triage_summary"],
            "top_findings": document["reductions"]["top_findings"],
            "correlation_count": len(correlations),
        },
        "action_narrative": "\n".join(f"{number}. {_line(action)}" for number, action in enumerate(actions, 1)),
        "metrics": given.get("metrics") or {},
    }


def _actions(
    actions: Sequence[Mapping[str, Any]], correlations: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:  # fmt: skip
    """Returns actions as one line each, most urgent first, with the correlations of their findings."""
    rows = [
        {
            "priority": PRIORITY_NUMBERS.get(action["priority"], 0),
            "action": _line(action),
            "correlation_refs": [
                item["id"] for item in correlations if set(item["related_finding_ids"]) & set(action["finding_ids"])
            ],
        }
        for action in actions
    ]
    return sorted(rows, key=lambda row: -row["priority"])


def _line(action: Mapping[str, Any]) -> str:
    parts = [action["title"], action.get("description") or ""]
    for key in ("command", "needs", "danger", "undo"):
        if value := action.get(key):
            parts.append(f"{key.capitalize()}: {value if isinstance(value, str) else ', '.join(value)}")
    return " - ".join(filter(None, parts))
