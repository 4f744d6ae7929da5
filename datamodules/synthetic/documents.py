"""Builds the document of one shard, in the batch layout of the archive or in the layout ``ground_truth_v1``.

All values are computed from the findings and their correlations; nothing is random.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from datamodules.records import SEVERITIES, SUBSCORES
from datamodules.synthetic.labeling_rules import TABLES, DerivedCorrelation

Json = dict[str, Any]
_TOP = 10  #: largest number of findings in the reductions and per action


def write_correlations(
    findings: list[Json], derived: list[DerivedCorrelation], *, stamp: str, whole_numbers: bool
) -> list[Json]:
    """Returns correlations in the format of the archive, and sets the fields of their findings that refer to them.

    Args:
        findings: findings of a shard; ``correlation_refs``, ``graph_degree`` and ``cluster_id`` are set in place.
        derived: correlations of these findings.
        stamp: time stamp of the generator.
        whole_numbers: whether risk scores are integers (``ground_truth_v1``) instead of floats.
    """
    written = []
    for number, correlation in enumerate(derived):
        members = [findings[index] for index in correlation.members]
        (key, value), kind = correlation.shared, correlation.type
        title, reason = TABLES["correlations"][kind]
        identifier = f"corr_{kind}_{members[0]['id'].rpartition('_')[2]}_{number:x}"
        for member in members:
            member["correlation_refs"].append(identifier)
            member["graph_degree"] = member.get("graph_degree", 0) + len(members) - 1
            member["cluster_id"] = identifier
        written.append({
            "id": identifier,
            "title": title,
            "severity": correlation.severity,
            "risk_score": correlation.score if whole_numbers else float(correlation.score),
            "base_severity_score": correlation.score,
            "description": f"{reason[0].upper()}{reason[1:]}: {key} {value}.",
            "metadata": {"shared_key": key, "shared_value": value, "correlation_reason": reason},
            "operational_error": False,
            "category": "correlation",
            "tags": ["correlation", kind],
            "risk_subscores": {n: v / 100 for n, v in zip(SUBSCORES, correlation.subscores, strict=True)},
            "correlation_refs": [member["id"] for member in members],
            "baseline_status": "new",
            "severity_source": "correlation",
            "probability_actionable": correlation.score / 100,
            "graph_degree": len(members),
            "cluster_id": identifier,
            "rationale": reason,
            "risk_total": correlation.score,
            "risk_score_delta": correlation.delta,
            "correlation_type": kind,
            "correlation_strength": correlation.strength,
            "timestamp": stamp,
        })  # fmt: skip
    return written


def batch_document(findings: list[Json], correlations: list[Json], *, dataset_id: str, stamp: str) -> Json:
    """Returns a document in the batch layout: findings by category and severity, with statistics and indexes."""
    grouped: dict[str, dict[str, list[Json]]] = {}
    for finding in findings:
        grouped.setdefault(finding["category"], {}).setdefault(finding["severity"], []).append(finding)
    return {
        "metadata": {
            "dataset_id": dataset_id,
            "creation_timestamp": stamp,
            "version": "2.0",
            "format": "optimized_json",
            "compression": False,
            "langchain_enriched": False,
            "data_characteristics": {
                "total_findings": len(findings),
                "total_correlations": len(correlations),
                "scanner_coverage": len(grouped),
            },
        },
        "data": {
            "version": "2.0",
            "generated_at": stamp,
            "dataset_type": "synthetic_security_findings",
            "findings": grouped,
            "correlations": correlations,
            "statistics": _statistics(findings, correlations),
            "indexes": _indexes(findings, correlations),
        },
    }


def _statistics(findings: list[Json], correlations: list[Json]) -> Json:
    scores = [finding["risk_total"] for finding in findings]
    strengths = [correlation["correlation_strength"] for correlation in correlations]
    return {
        "total_findings": len(findings),
        "total_correlations": len(correlations),
        "scanner_types": len({finding["category"] for finding in findings}),
        "severity_distribution": Counter(finding["severity"] for finding in findings),
        "category_distribution": Counter(finding["category"] for finding in findings),
        "risk_score_stats": {
            "mean": round(float(np.mean(scores)), 2),
            "median": float(np.median(scores)),
            "min": float(min(scores)),
            "max": float(max(scores)),
            "std_dev": round(float(np.std(scores)), 2),
        },
        "correlation_stats": {
            "types": Counter(correlation["correlation_type"] for correlation in correlations),
            "avg_strength": round(float(np.mean(strengths)), 2) if strengths else 0.0,
        },
    }


def _indexes(findings: list[Json], correlations: list[Json]) -> Json:
    by_id: Json = {}
    by_severity, by_category, by_type, by_finding = (defaultdict[str, list[str]](list) for _ in range(4))
    for finding in findings:
        identifier, category, severity = finding["id"], finding["category"], finding["severity"]
        by_id[identifier] = {"scanner": category, "severity": severity, "category": category}
        by_severity[severity].append(identifier)
        by_category[category].append(identifier)
    for correlation in correlations:
        by_type[correlation["correlation_type"]].append(correlation["id"])
        for identifier in correlation["correlation_refs"]:
            by_finding[identifier].append(correlation["id"])
    return {
        "findings_by_id": by_id,
        "findings_by_severity": by_severity,
        "findings_by_category": by_category,
        "correlations_by_type": by_type,
        "correlations_by_finding": by_finding,
    }


def ground_truth_document(findings: list[Json], correlations: list[Json], *, dataset_id: str, stamp: str) -> Json:
    """Returns a document in the layout ``ground_truth_v1``, with summaries and actions computed from the findings."""
    ranked = sorted(findings, key=lambda finding: (-finding["risk_score"], finding["id"]))
    urgent = [finding for finding in ranked if finding["severity"] in ("high", "critical")]
    return {
        "version": "ground_truth_v1",
        "enriched_findings": findings,
        "correlations": [_related(correlation) for correlation in correlations],
        "reductions": _reductions(findings, ranked),
        "summaries": _summaries(findings, ranked, urgent, correlations),
        "actions": _actions(urgent),
        "raw_reference": {"dataset_id": dataset_id, "generated_at": stamp, "findings": len(findings)},
        "followups": [],
        "enrichment_results": {},
        "multi_host_correlation": [],
    }


def _related(correlation: Json) -> Json:
    names = ("id", "title", "rationale", "risk_score_delta", "tags", "severity", "correlation_type")
    related = {"related_finding_ids": correlation["correlation_refs"], "exposure_tags": []}
    return {name: correlation[name] for name in names} | related


def _reductions(findings: list[Json], ranked: list[Json]) -> Json:
    def summary(category: str) -> Json:
        chosen = [finding for finding in findings if finding["category"] == category]
        tags = Counter(tag for finding in chosen for tag in finding["tags"])
        return {"count": len(chosen), "tags": {tag: tags[tag] for tag in sorted(tags)}}

    names = ("id", "title", "severity", "risk_score", "probability_actionable")
    worst: dict[str, int] = {}
    for finding in ranked:
        worst.setdefault(finding["category"], finding["risk_score"])
    return {
        "module_summary": summary("modules"),
        "suid_summary": summary("suid"),
        "network_summary": summary("network"),
        "top_findings": [{name: finding[name] for name in names} for finding in ranked[:_TOP]],
        "top_risks": worst,
    }


def _summaries(findings: list[Json], ranked: list[Json], urgent: list[Json], correlations: list[Json]) -> Json:
    severities = Counter(finding["severity"] for finding in findings)
    counts = ", ".join(f"{severities[name]} {name}" for name in reversed(SEVERITIES) if severities[name])
    areas = Counter(finding["category"] for finding in urgent)
    worst_areas = ", ".join(sorted(areas, key=lambda name: (-areas[name], name))[:3])
    top = "; ".join(f"{finding['title']} ({finding['severity']}, {finding['risk_score']})" for finding in ranked[:3])
    types = Counter(correlation["correlation_type"] for correlation in correlations)
    linked = ", ".join(f"{types[name]} {name}" for name in sorted(types, key=lambda name: (-types[name], name)))
    attention = f"{len(urgent)} need attention, most in {worst_areas}." if urgent else "None needs attention at once."
    return {
        "executive_summary": f"{len(findings)} findings: {counts}. {attention} {len(correlations)} correlations.",
        "analyst": f"Top risks: {top}.",
        "triage_summary": "Look first at " + ", ".join(finding["id"] for finding in ranked[:_TOP]) + ".",
        "action_narrative": " ".join(f"{action['title']}." for action in _actions(urgent)) or "No action is needed.",
        "causal_hypotheses": f"Findings that share a PID or a path: {linked}." if linked else "No findings are linked.",
        "metrics": {
            "total_findings": len(findings),
            "severity_distribution": {name: severities[name] for name in SEVERITIES},
            "mean_risk_score": round(float(np.mean([finding["risk_score"] for finding in findings])), 2),
        },
    }


def _actions(urgent: list[Json]) -> list[Json]:
    """Returns one action per category of the urgent findings, in their order (highest risk first)."""
    by_category: dict[str, list[Json]] = {}
    for finding in urgent:
        by_category.setdefault(finding["category"], []).append(finding)
    actions = []
    for category, members in by_category.items():
        title, description = TABLES["actions"][category]
        actions.append({
            "id": f"action_{category}",
            "title": title,
            "description": description,
            "priority": "immediate" if members[0]["severity"] == "critical" else "high",
            "severity": members[0]["severity"],
            "related_finding_ids": [finding["id"] for finding in members[:_TOP]],
        })  # fmt: skip
    return actions
